"""Say when a run goes wrong: limits on what each iteration measures, looked at before it learns.

GUARDS is the whole list; `Guards` in the recipe holds the limits.  `check` judges a rollout batch
before the update, `check_update` an update after it: what was taken cannot be undone, so its flags
are raised at once and speak against learning from the next batch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from operator import gt, lt
from typing import Any, Literal, NamedTuple

from starling.ppo.config import Guards

KL_TARGETS = 4
"""Multiples of `kl_target` that the KL may reach where the recipe has no limit of its own."""

LENGTH_RATIO, LENGTH_CORRELATION = "length ratio", "length correlation"
"""What is worked out here from several iterations; no keys of metrics.jsonl."""


class Guard(NamedTuple):
    """One limit: `is_beyond(found, limit)` raises a flag."""

    name: str
    """Its limit's name in `Guards`."""
    metric: str
    is_beyond: Callable[[float, float], bool]
    when: Literal["rollout", "settled", "update"]
    """Before each update, only after `warmup` iterations, or after each update."""
    sentence: str
    """What it means and what to do; says `found` and `limit`."""
    is_optional: bool = False
    """Whether there may be no such figure."""


GUARDS = (
    Guard(
        "max_sequence_kl",
        "ppo/sequence_kl",
        gt,
        "rollout",
        "The policy is {found:.3g} nats a sequence from its reference, more than {limit:.3g}: "
        "raise ppo.kl_coef or lower ppo.lr, and read its answers.",
    ),
    Guard(
        "min_sequence_kl",
        "ppo/sequence_kl",
        lt,
        "rollout",
        "The KL is {found:.3g} nats a sequence, less than {limit:.3g}, and its true value is never "
        "negative: responses and logprobs are not of one policy; look at ppo.temperature, at "
        "dropout and at the engine.",
    ),
    Guard(
        "max_sampler_mismatch",
        "ppo/sampler_mismatch",
        gt,
        "rollout",
        "The engine's logprobs differ from the trainer's by {found:.3g} nats a token, more than "
        "{limit:.3g}: the engine holds other weights or computes otherwise; set "
        "ppo.importance_cap, or sample with the trainer's own engine.",
        is_optional=True,
    ),
    Guard(
        "min_entropy",
        "ppo/entropy",
        lt,
        "rollout",
        "The entropy is {found:.3g} nats a token, less than {limit:.3g}: the policy says one thing "
        "only; raise ppo.kl_coef or lower ppo.lr, and go back to an earlier checkpoint.",
    ),
    Guard(
        "min_score_std",
        "ppo/shaped_score_std",
        lt,
        "rollout",
        "The scores of a batch spread by {found:.3g}, less than {limit:.3g}: there is nothing to "
        "learn from; look at the reward model and its clipping.",
    ),
    Guard(
        "min_explained_variance",
        "ppo/explained_variance",
        lt,
        "settled",
        "The critic explains {found:.3g} of the returns' variance, less than {limit:.3g}: its "
        "values are worse than none; raise ppo.critic_warmup or ppo.value_coef.",
        is_optional=True,
    ),
    Guard(
        "min_end_rate",
        "ppo/end_rate",
        lt,
        "settled",
        "Only {found:.1%} of the responses ended by themselves, less than {limit:.1%}: the others "
        "were cut; set ppo.missing_end_penalty or raise ppo.max_response_tokens.",
    ),
    Guard(
        "max_length_ratio",
        LENGTH_RATIO,
        gt,
        "rollout",
        "Responses are {found:.2f} times as long as at the start, more than {limit:.2f}: the "
        "policy may earn its score by length; see what the reward model scores long answers, and "
        "set ppo.length_penalty.",
        is_optional=True,
    ),
    Guard(
        "max_length_correlation",
        LENGTH_CORRELATION,
        gt,
        "rollout",
        "Score and length correlate by {found:.2f} over the last iterations, more than "
        "{limit:.2f}: the reward model scores little but length; train it against length, or set "
        "ppo.length_penalty.",
        is_optional=True,
    ),
    Guard(
        "max_clip_fraction",
        "ppo/clip_fraction",
        gt,
        "update",
        "The update clipped {found:.1%} of the tokens, more than {limit:.1%}: its steps are too "
        "large; lower ppo.lr or ppo.ppo_epochs.",
    ),
    Guard(
        "max_ratio",
        "ppo/ratio",
        gt,
        "update",
        "New probabilities were {found:.3g} times the old ones on average, more than {limit:.3g}: "
        "the update ran away from the policy that sampled; lower ppo.lr or ppo.ppo_epochs.",
    ),
    Guard(
        "max_first_approx_kl",
        "ppo/first_approx_kl",
        gt,
        "update",
        "Before the first step old and new logprobs are of the same weights, and differ by "
        "{found:.3g} nats a token, more than {limit:.3g}: look at ppo.precision and at dropout.",
    ),
    Guard(
        "max_approx_kl",
        "ppo/approx_kl",
        gt,
        "update",
        "The update went {found:.3g} nats a token from the policy that sampled, more than "
        "{limit:.3g}: its steps are too large; lower ppo.lr or ppo.ppo_epochs.",
    ),
)
"""Every guard but the one on figures that are not finite, which has no limit and is always on."""

NOT_FINITE = "finite"
_NOT_FINITE = (
    "{metric} is {found}, which no update can learn from: lower ppo.lr, and look at the reward "
    "model's scores and the policy's weights."
)


@dataclass(frozen=True)
class Flag:
    """One limit that one iteration went beyond."""

    step: int
    """The iteration, counted from 1 as in metrics.jsonl."""
    guard: str
    """The limit's name in `ppo.guards`, or "finite"."""
    found: float | None
    """None where it is not finite; there `limit` is None too."""
    limit: float | None
    sentence: str
    """What it means and what to do."""


@dataclass
class Health:
    """The guards of one run, with what they keep of its past."""

    guards: Guards
    kl_target: float | None = None
    num_seen: int = 0
    """Rollout batches so far."""
    start_tokens: list[float] = field(default_factory=list)
    """Mean response lengths of the first `warmup` batches."""
    correlations: list[float] = field(default_factory=list)
    """Those of score and length of the last `warmup` batches that have one."""
    flags: list[Flag] = field(default_factory=list)
    """All of the run, in the order in which they were raised."""
    num_pending: int = 0
    """How many of the last ones are of an update after which no batch was checked."""

    @staticmethod
    def resume(state: Mapping[str, Any], guards: Guards, kl_target: float | None) -> "Health":
        """As `state` stored it; a new one from an empty state.  ValueError for other fields."""
        health = Health(guards, kl_target)
        if not state:
            return health
        if state.keys() != health.state().keys():
            raise ValueError(f"a state of guards has {[*health.state()]}, found {[*state]}")
        flags = [Flag(**row) for row in state["flags"]]
        return Health(guards, kl_target, **{**state, "flags": flags})

    def state(self) -> dict[str, Any]:
        """Plain JSON for the checkpoint."""
        return {
            "num_seen": self.num_seen,
            "start_tokens": list(self.start_tokens),
            "correlations": list(self.correlations),
            "flags": [asdict(flag) for flag in self.flags],
            "num_pending": self.num_pending,
        }

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Flag]:
        """What speaks against learning from a batch: flags of the last update, then its own."""
        of_update = self.flags[len(self.flags) - self.num_pending :]
        self.num_pending = 0
        is_settled = self.num_seen >= self.guards.warmup
        watched = {"rollout", "settled"} if is_settled else {"rollout"}
        return of_update + self._raise(step, {**metrics, **self._trends(metrics)}, watched)

    def check_update(self, step: int, metrics: Mapping[str, float]) -> list[Flag]:
        """The flags of an update that was taken; the next `check` returns them once more."""
        raised = self._raise(step, metrics, {"update"})
        self.num_pending = len(raised)
        return raised

    def _trends(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Note a batch; its length against the start's, and the mean of the last correlations.

        Each is there from when `warmup` iterations had what it needs.
        """
        warmup, trends = self.guards.warmup, dict[str, float]()
        tokens = metrics["ppo/response_tokens"]
        correlation = metrics.get("ppo/score_length_correlation")
        if math.isfinite(tokens):
            if self.num_seen >= warmup and self.start_tokens:
                trends[LENGTH_RATIO] = tokens * len(self.start_tokens) / sum(self.start_tokens)
            else:
                self.start_tokens.append(tokens)
        if correlation is not None and math.isfinite(correlation):
            self.correlations = [*self.correlations, correlation][-warmup:]
            if len(self.correlations) == warmup:
                trends[LENGTH_CORRELATION] = sum(self.correlations) / warmup
        self.num_seen += 1
        return trends

    def _raise(self, step: int, metrics: Mapping[str, float], watched: set[str]) -> list[Flag]:
        raised = [
            Flag(step, NOT_FINITE, None, None, _NOT_FINITE.format(metric=metric, found=found))
            for metric, found in metrics.items()
            if not math.isfinite(found)
        ]
        for guard in GUARDS:
            limit = self._limit(guard.name)
            if guard.when not in watched or limit is None:
                continue
            found = metrics.get(guard.metric) if guard.is_optional else metrics[guard.metric]
            if found is not None and math.isfinite(found) and guard.is_beyond(found, limit):
                sentence = guard.sentence.format(found=found, limit=limit)
                raised.append(Flag(step, guard.name, found, limit, sentence))
        self.flags += raised
        return raised

    def _limit(self, name: str) -> float | None:
        limit = getattr(self.guards, name)
        if name == "max_sequence_kl" and limit is None and self.kl_target is not None:
            return KL_TARGETS * self.kl_target
        return limit


def health_line(metrics: Mapping[str, float], *, kl_target: float | None = None) -> str:
    """`score 0.42  kl 1.9/2.0  len 9.1  end 98%  clip 8%  ev 0.55`; what is absent is left out."""
    target = "" if kl_target is None else f"/{kl_target:.1f}"
    parts = (
        ("ppo/score", "score {:z.2f}"),
        ("ppo/sequence_kl", "kl {:z.1f}" + target),
        ("ppo/response_tokens", "len {:.1f}"),
        ("ppo/end_rate", "end {:.0%}"),
        ("ppo/clip_fraction", "clip {:.0%}"),
        ("ppo/explained_variance", "ev {:z.2f}"),
    )
    return "  ".join(form.format(metrics[key]) for key, form in parts if key in metrics)
