"""The verbs that measure: mt-bench, win-rate, checks, ratings, compare.  Parses, calls, prints."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from pydantic import ValidationError

from starling.base.errors import InputError
from starling.base.explain import explain
from starling.bench.mt_bench.options import MtBench
from starling.judging.config import JudgeSection
from starling.options import parse_options

if TYPE_CHECKING:
    from starling.base.context import Context
    from starling.bench.answers import Contestant

DEFAULTS = MtBench()


def mt_bench(verb: str, arguments: list[str]) -> None:
    """`starling mt-bench`."""

    def measure(options: Annotated[MtBench, tyro.conf.arg(name="")] = DEFAULTS) -> None:
        """Judge a model's answers to MT-Bench as published, and count them.

        Args:
            options: Whose answers, by whom, and how.
        """
        from starling.bench.mt_bench.run import run
        from starling.serve.find import resolve_model

        policy = options.policy
        if policy is not None and options.policy_url is None and not options.plan:
            policy = resolve_model(policy)
        print(run(options, policy))

    parse_options(measure, verb, arguments)


@dataclass(frozen=True, kw_only=True)
class JudgedBy:
    """Who judges."""

    judge_url: str | None = None
    """OpenAI-compatible server of the judge."""
    judge_model: str | None = None
    """The judge's name there, or a model folder."""
    judge_key_env: str | None = None
    """Environment variable that holds the key of --judge-url; a server without one needs none."""
    judge_kind: Literal["endpoint", "local", "logits"] = "endpoint"
    """endpoint: a server; local: a folder, asked for text; logits: a folder, asked for
    probabilities."""
    concurrency: int = 16
    """Calls in flight."""
    timeout_seconds: float = 100.0
    """One call's time limit."""
    allowed_failures: float = 0.05
    """Share of judgments that may fail before there is no score."""

    def section(self) -> JudgeSection:
        """The same as a recipe has it; InputError for what a recipe would refuse."""
        if self.judge_model is None or (self.judge_kind == "endpoint" and not self.judge_url):
            raise InputError(
                "who judges? Give --judge-url URL and --judge-model NAME, or --judge-kind local "
                "(or logits) and --judge-model FOLDER"
            )
        try:
            return JudgeSection.model_validate(
                {
                    "kind": self.judge_kind,
                    "url": self.judge_url,
                    "model": self.judge_model,
                    "api_key_env": self.judge_key_env,
                    "concurrency": self.concurrency,
                    "timeout_seconds": self.timeout_seconds,
                }
            )
        except ValidationError as error:
            problems = (f"--judge: {line}" for line in explain(error, JudgeSection))
            raise InputError("\n".join(problems)) from error


NOBODY = JudgedBy()


def win_rate(
    answers: Path,
    baseline: Path,
    *,
    judge: Annotated[JudgedBy, tyro.conf.arg(name="")] = NOBODY,
    weighted: bool = False,
    length_controlled: bool = False,
    out: Path = Path("runs/win-rate"),
    seed: int = 0,
    plan: bool = False,
) -> None:
    """Ask a judge whose outputs it prefers, a model's or a baseline's, in both seats.

    Args:
        answers: The model's outputs in AlpacaEval's columns, JSON or JSONL: instruction, output,
            generator.
        baseline: The baseline's, to the same instructions.
        judge: Who judges.
        weighted: Read the judge's probabilities, as AlpacaEval 2 does, one call a pair.
        length_controlled: Also estimate, by a model, what is left at equal lengths.
        out: Folder for annotations, scores.json and results.md.
        seed: Of seats and of the intervals.
        plan: Only say which calls would be made.
    """
    from starling.bench.alpaca_eval import WinRate, run_win_rate

    failures = judge.allowed_failures
    asked = WinRate(answers, baseline, judge.section(), weighted, length_controlled, failures, plan)
    print(run_win_rate(asked, out, _context(seed, judge.judge_kind)))


def checks(
    prompts: Path,
    *,
    policy: str,
    baseline: str | None = None,
    sampled: bool = False,
    max_tokens: int = 1024,
    out: Path = Path("runs/checks"),
    device: str | None = None,
    seed: int = 0,
) -> None:
    """Check by rule what a model's answers keep to and what they refuse; no judge is asked.

    Args:
        prompts: JSONL prompts with instructions, with good_natured, or with both.
        policy: Run folder, model folder or hub id.
        baseline: Likewise, to see what was gained or lost; its name in the results is its folder's.
        sampled: At temperature 1; absent, greedily.
        max_tokens: Longest answer.
        out: Folder for answers, scores.json and results.md.
        device: cpu or cuda; absent, a GPU when there is one.
        seed: Of sampled answers and of the intervals.
    """
    from starling.bench.checks import run_checks

    if max_tokens < 1:
        raise InputError(f"--max-tokens is {max_tokens}; it is at least 1")
    named = {"policy": policy} | ({"baseline": baseline} if baseline is not None else {})
    decoding = "sampled" if sampled else "greedy"
    with ExitStack() as stack:
        contestants = [
            stack.enter_context(
                _contestant(name, model, decoding, max_tokens, out, _context(seed, "local", device))
            )
            for name, model in named.items()
        ]
        before = "baseline" if baseline is not None else None
        print(run_checks(prompts, contestants, out, baseline=before, seed=seed))


@contextmanager
def _contestant(
    name: str,
    model: str,
    decoding: Literal["sampled", "greedy"],
    max_tokens: int,
    out: Path,
    context: "Context",
) -> "Iterator[Contestant]":
    from starling.bench.answers import Contestant
    from starling.bench.mt_bench.answers import context_room
    from starling.judging.recorded import Recorded
    from starling.models.local import load_local
    from starling.serve.find import resolve_model

    local = load_local(resolve_model(model), context.device)
    with Recorded(local, out / "calls.sqlite") as recorded:
        room = context_room(local)
        yield Contestant(name, decoding, recorded, max_tokens, context.seed, room=room)


def _context(seed: int, kind: str, device: str | None = None) -> "Context":
    from starling.base.context import Context, single_process_context

    if kind == "endpoint":  # nothing is computed here, and torch takes longer to load than to count
        return Context(0, 1, "cpu", 1, seed=seed)
    return single_process_context(1, device, seed=seed)


def ratings(votes: Path, *, out: Path | None = None, rounds: int = 100, seed: int = 0) -> None:
    """Rate models by votes between them: Bradley-Terry with intervals, Elo, win rate.

    Args:
        votes: JSONL or CSV: model_a, model_b, winner (or left, right, winner).
        out: The figures as JSON, and as Markdown beside it; absent, only the table is printed.
        rounds: Of the bootstrap.
        seed: Of the bootstrap.
    """
    from starling.bench.ratings import rate

    print(rate(votes, out=out, rounds=rounds, seed=seed))


def compare(runs: tuple[Path, ...], *, out: Path = Path("compare.html")) -> None:
    """Write one page about several benches side by side, with every question and answer.

    Args:
        runs: Run folders, and folders of starling mt-bench.
        out: The page.
    """
    from starling.report.compare import write_comparison

    print(f"Report:  {write_comparison(runs, out)}")
