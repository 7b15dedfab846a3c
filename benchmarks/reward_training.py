"""Race reward-model training on packed rankings against the ways people train one; prints JSON.

    python benchmarks/reward_training.py --quick --json rows.json
    python benchmarks/reward_training.py --settings 128/96 nectar --kinds fixed ragged

Every side trains the same random model on the same rankings of seven, in turns in every repeat.
`packed` holds the prompt once and its seven answers: Plackett-Luce, one optimizer step a prompt.

packed/k-wise        against seven padded sequences: the same loss, the same steps
packed/trl-21-pairs  against TRL's RewardTrainer on all pairs of a ranking, seven a step, so three
                     steps a prompt; `equal_steps`: accumulated to one step a prompt; `as_shipped`
                     (not with --quick): bf16, gradient checkpointing and random order, its defaults
packed/trl-6-pairs   the same on the six pairs of neighbours, one step a prompt

TRL is installed into .peers on first use.  It is timed inside `RewardTrainer.train()`, from the
fetch of the first batch to the end of the last step: no set-up, logging, saving or evaluation; its
pairs are grouped by length.  One thread.  `ratio` is our prompts per second of wall time over the
peer's; `ratio_cpu` that of process CPU time, which other programs disturb less.  `token_bound` is
the peer's real tokens over ours; `matmul_share` the time that the products which nobody can leave
out would take at the measured rate of a large one, over the time taken.  Recorded results:
reward_training.md beside this file.
"""

import argparse
import gc
import importlib
import itertools
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from racing import (
    MOST_TOKENS,
    Seconds,
    autocast,
    model_shape,
    options_parser,
    peak_mib,
    quiet_rates,
    rounded,
    spread,
    two_word_tokenizer,
    with_peer,
    write_rows,
)
from torch import Tensor
from transformers import MistralForSequenceClassification, PrinterCallback, TrainerCallback

from starling.models.causal_lm import Batch
from starling.models.packing import Packed, packed_ends, share_prompt
from starling.models.reward_model import score_head
from starling.reward.loss import plackett_luce_loss

K = 7
PAIRS_PER_STEP = 7
PASSES = 3
CHARS_PER_TOKEN = 4
# Prompts in a repeat: the peer takes as long as this, and groups its pairs by length within it.
SETTINGS = {"128/96": 2, "512/128": 1, "64/256": 2, "nectar": 5, "rankings_k7": 5}
RAGGED_PROMPTS = 5
REAL = ("nectar", "rankings_k7")
KINDS = ("fixed", "bf16", "ragged", "bf16 ragged")
RACES = ("packed/trl-21-pairs", "packed/trl-6-pairs", "packed/k-wise")
PEER = "trl-1.16.0"


@dataclass(frozen=True)
class Ranking:
    """A prompt and its answers, the best first."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        return [self.prompt + answer for answer in self.answers]


Side = Callable[[Sequence[Ranking]], Seconds]
"""Trains on the rankings; what one pass over them took."""

Pairs = Sequence[tuple[int, int]]
"""The places in the ranking that are compared, the better first."""

ALL_PAIRS: Pairs = tuple(itertools.combinations(range(K), 2))
NEIGHBOURS: Pairs = tuple(itertools.pairwise(range(K)))


def new_model(name: str, device: str) -> Any:
    """A random reward model of the named shape, in fp32."""
    torch.manual_seed(0)
    shape = model_shape(name)
    shape.num_labels = 1
    model: Any = MistralForSequenceClassification(shape)
    return model.to(device).train()


def new_rankings(setting: str, ragged: bool, vocab: int, count: int, seed: int) -> list[Ranking]:
    """Random tokens in the setting's lengths; real ones are characters / 4, cut as training cuts.

    Ragged: the prompt uniform in 0.5-1.5 x its mean, answers uniform in 1..maximum.
    """
    rng = random.Random(f"{setting} {seed}")
    tokens = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab, (length,), generator=tokens).tolist())

    def lengths() -> tuple[int, list[int]]:
        mean, most = map(int, setting.split("/"))
        if not ragged:
            return mean, [most] * K
        return rng.randint(mean // 2, mean * 3 // 2), [rng.randint(1, most) for _ in range(K)]

    drawn = (
        rng.sample(real_lengths(setting), count)
        if setting in REAL
        else [lengths() for _ in range(count)]
    )
    rankings = []
    for prompt, answers in drawn:
        kept = [min(answer, MOST_TOKENS - 1) for answer in answers]
        kept_prompt = min(prompt, MOST_TOKENS - max(kept))
        rankings.append(Ranking(ids(kept_prompt), tuple(map(ids, kept))))
    return rankings


def real_lengths(name: str) -> list[tuple[int, list[int]]]:
    """Prompt and answer lengths of a file of the third-party data, in tokens of four characters."""

    def length(text: str) -> int:
        return max(1, math.ceil(len(text) / CHARS_PER_TOKEN))

    path = Path(os.environ["STARLING_TEST_DATA"]) / name / "rankings.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [[length(each["answer"]) for each in row["answers"]] for row in rows]
    return [(length(row["prompt"]), each) for row, each in zip(rows, answers, strict=True)]


def packed_scores(model: Any, ranking: Ranking) -> Tensor:
    """Scores [K] from one sequence that holds the prompt once."""
    packed = Packed([share_prompt(ranking.sequences)], str(model.device))
    return score_head(model)(packed_ends(model, packed)).float()[:, 0]


def padded_scores(model: Any, ranking: Ranking) -> Tensor:
    """Scores [K] from a batch of seven sequences."""
    batch = Batch(ranking.sequences, 0, str(model.device))
    hidden = model.base_model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
    last = hidden[torch.arange(K, device=hidden.device), batch.lengths - 1]
    return score_head(model)(last).float()[:, 0]


def kwise_loss(model: Any, ranking: Ranking, scores: Callable[[Any, Ranking], Tensor]) -> Tensor:
    """Plackett-Luce's loss of one ranking, best answer first."""
    found = scores(model, ranking)[None]
    ranks = torch.arange(1, K + 1, device=found.device)[None]
    return plackett_luce_loss(found, ranks, torch.ones_like(ranks, dtype=torch.bool))[0]


def train_kwise(
    rankings: Sequence[Ranking],
    *,
    model: Any,
    scores: Callable[[Any, Ranking], Tensor],
    dtype: str,
    passes: int = PASSES,
) -> Seconds:
    """One step a prompt; several passes, since one is short beside the peer's."""
    device = model.device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    start = Seconds.now(device)
    for ranking in itertools.chain.from_iterable([rankings] * passes):
        with autocast(dtype, device):
            loss = kwise_loss(model, ranking, scores)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Seconds.now(device).since(start, passes)


class Stopwatch(TrainerCallback):
    """From the fetch of the first batch to the end of the last step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.start = self.end = Seconds.now(device)
        self.steps = 0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = Seconds.now(self.device)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.end = Seconds.now(self.device)
        self.steps += 1


@dataclass(frozen=True)
class Trl:
    """TRL's RewardTrainer on chosen pairs of each ranking."""

    model: Any
    dtype: str
    pairs: Pairs
    per_forward: int
    forwards_per_step: int = 1
    as_shipped: bool = False

    @property
    def steps_per_prompt(self) -> float:
        return len(self.pairs) / (self.per_forward * self.forwards_per_step)

    def __call__(self, rankings: Sequence[Ranking]) -> Seconds:
        trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
        rows = [
            {
                "chosen_ids": (chosen := list(ranking.prompt + ranking.answers[better])),
                "rejected_ids": (rejected := list(ranking.prompt + ranking.answers[worse])),
                "length": max(len(chosen), len(rejected)),
            }
            for ranking in rankings
            for better, worse in self.pairs
        ]
        watch = Stopwatch(self.model.device.type)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trl.RewardTrainer(
                model=self.model,
                args=trl.RewardConfig(output_dir=folder, **self.options()),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=two_word_tokenizer(),
                callbacks=[watch],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        expected = math.ceil(len(rows) / self.per_forward / self.forwards_per_step)
        assert watch.steps == expected, (watch.steps, expected)
        assert torch.get_num_threads() == 1
        return watch.end.since(watch.start)

    def options(self) -> dict[str, Any]:
        """One pass, nothing written; without `as_shipped` also the tuned ones."""
        fixed = {
            "num_train_epochs": 1,
            "per_device_train_batch_size": self.per_forward,
            "gradient_accumulation_steps": self.forwards_per_step,
            "learning_rate": 1e-5,
            "max_length": None,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "use_cpu": self.model.device.type == "cpu",
        }
        tuned = {
            "bf16": self.dtype == "bf16",
            "gradient_checkpointing": False,
            "train_sampling_strategy": "group_by_length",
            # Else the column of lengths is dropped before the sampler asks for it.
            "remove_unused_columns": False,
        }
        return fixed if self.as_shipped else fixed | tuned


def check_equal(model: Any, ranking: Ranking) -> None:
    """Packed and padded give one loss and gradient norm, and the scores that the peer reads."""
    losses, norms = [], []
    for scores in (packed_scores, padded_scores):
        model.zero_grad()
        loss = kwise_loss(model, ranking, scores)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.get_total_norm(p.grad for p in model.parameters())))
    model.zero_grad()
    assert math.isclose(*losses, rel_tol=1e-5), f"losses differ: {losses}"
    assert math.isclose(*norms, rel_tol=1e-4), f"gradient norms differ: {norms}"
    with torch.no_grad():
        batch = Batch(ranking.sequences, 0, str(model.device))
        logits = model(batch.token_ids, attention_mask=(batch.token_ids != 0).long()).logits
        torch.testing.assert_close(
            packed_scores(model, ranking), logits[:, 0].float(), atol=1e-5, rtol=1e-4
        )


def necessary_flops(model: Any, rankings: Sequence[Ranking]) -> float:
    """Forward and backward over every token of the packed rows, attention to what each may see."""
    config = model.config
    weights = sum(p.numel() for p in model.base_model.layers.parameters() if p.dim() == 2)
    head_dim = config.hidden_size // config.num_attention_heads
    per_seen = 2 * 2 * head_dim * config.num_attention_heads * config.num_hidden_layers
    flops = 0.0
    for ranking in rankings:
        prompt, answers = len(ranking.prompt), [len(answer) for answer in ranking.answers]
        seen = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in answers)
        flops += 3 * (2 * weights * (prompt + sum(answers)) + per_seen * seen)
    return flops


def num_tokens(rankings: Sequence[Ranking], race: str) -> int:
    """Real tokens that a side computes, padding apart."""
    total = 0
    for ranking in rankings:
        lengths = [len(ids) for ids in ranking.sequences]
        if race == "packed":
            total += len(ranking.prompt) + sum(map(len, ranking.answers))
        elif race == "packed/k-wise":
            total += sum(lengths)
        else:
            pairs = ALL_PAIRS if race == "packed/trl-21-pairs" else NEIGHBOURS
            total += sum(lengths[better] + lengths[worse] for better, worse in pairs)
    return total


def new_peers(race: str, name: str, dtype: str, options: argparse.Namespace) -> dict[str, Side]:
    """The peer of a race, and the other ways to run it, each with a model of its own."""
    model = partial(new_model, name, options.device)
    if race == "packed/k-wise":
        side = partial(train_kwise, model=model(), scores=padded_scores, dtype=dtype)
        return {"peer": side}
    if race == "packed/trl-6-pairs":
        return {"peer": Trl(model(), dtype, NEIGHBOURS, len(NEIGHBOURS))}
    accumulated = len(ALL_PAIRS) // PAIRS_PER_STEP
    peers: dict[str, Side] = {
        "peer": Trl(model(), dtype, ALL_PAIRS, PAIRS_PER_STEP),
        "equal_steps": Trl(model(), dtype, ALL_PAIRS, PAIRS_PER_STEP, accumulated),
    }
    if not options.quick:
        shipped = Trl(model(), dtype, ALL_PAIRS, PAIRS_PER_STEP, as_shipped=True)
        peers["as_shipped"] = shipped
    return peers


def compete(
    race: str, setting: str, kind: str, options: argparse.Namespace, rate: float
) -> dict[str, Any]:
    """One row: every repeat has prompts of its own, which ours trains on before each peer."""
    dtype = "bf16" if "bf16" in kind else "fp32"
    ragged = "ragged" in kind
    count = options.prompts or (RAGGED_PROMPTS if ragged else SETTINGS[setting])
    model = new_model(options.model, options.device)
    vocab = model.config.vocab_size
    draw = partial(new_rankings, setting, ragged, vocab, count)
    check_equal(model, draw(0)[0])
    ours: Side = partial(train_kwise, model=model, scores=packed_scores, dtype=dtype)
    peers = new_peers(race, options.model, dtype, options)
    warm = draw(0)
    memory = {name: peak_mib(partial(run, warm), options.device) for name, run in peers.items()}
    memory["ours"] = peak_mib(partial(ours, warm), options.device)
    work = [draw(number) for number in range(1, options.repeats + 1)]
    times: dict[str, list[tuple[Seconds, Seconds]]] = {name: [] for name in peers}
    for rankings in work:
        for name, run in peers.items():
            gc.collect()
            times[name].append((ours(rankings), run(rankings)))

    def record(name: str, side: int, tokens: str, steps: float) -> dict[str, Any]:
        """The figures of one side, all repeats together."""
        found = [pair[side] for pair in times["peer" if name == "ours" else name]]
        wall, cpu = sum(each.wall for each in found), sum(each.cpu for each in found)
        flops = sum(necessary_flops(model, rankings) for rankings in work)
        clock = cpu if options.device == "cpu" else wall
        return {
            "prompts_per_second": rounded(count * len(work) / wall),
            "tokens_per_second": rounded(sum(num_tokens(r, tokens) for r in work) / wall),
            "prompts_per_cpu_second": rounded(count * len(work) / cpu),
            "matmul_share": rounded(flops / rate / clock),
            "peak_mib": memory[name],
            "optimizer_steps_per_prompt": steps,
        }

    def against(name: str) -> dict[str, Any]:
        pairs = times[name]
        steps = getattr(peers[name], "steps_per_prompt", 1)
        return {
            "ratio": spread([theirs.wall / mine.wall for mine, theirs in pairs]),
            "ratio_cpu": spread([theirs.cpu / mine.cpu for mine, theirs in pairs]),
            "peer": record(name, 1, race, steps),
        }

    mine = record("ours", 0, "packed", 1)
    computed = [sum(num_tokens(r, tokens) for r in work) for tokens in (race, "packed")]
    return {
        "race": race,
        "setting": setting if kind == "fixed" else f"{setting} {kind}",
        "model": options.model,
        "device": options.device,
        "repeats": len(work),
        "prompts_per_repeat": count,
        **against("peer"),
        "ours": mine,
        "token_bound": rounded(computed[0] / computed[1]),
        "matmul_share": mine["matmul_share"],
        **{name: against(name) for name in peers if name != "peer"},
        "load": round(os.getloadavg()[0], 1),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options_parser(__doc__, repeats=5)
    parser.add_argument("--quick", action="store_true", help="128/96 and 512/128, fp32, fixed")
    parser.add_argument("--races", nargs="+", choices=RACES, default=RACES)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--prompts", type=int, help="per repeat, instead of the setting's own")
    options = parser.parse_args(arguments)
    if options.quick:
        options.settings, options.kinds = ["128/96", "512/128"], ["fixed"]
    return options


def plan(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Kind, setting and race of every row; real lengths are what they are, never `ragged`."""
    for kind, setting in itertools.product(options.kinds, options.settings):
        if setting in REAL and "ragged" in kind:
            continue
        if setting in REAL and "STARLING_TEST_DATA" not in os.environ:
            print(f"{setting}: skipped, STARLING_TEST_DATA names no folder", file=sys.stderr)
            continue
        for race in options.races:
            yield kind, setting, race


def main(arguments: Sequence[str] | None = None) -> None:
    """Race every row that was asked for."""
    options = parse(arguments)
    if set(options.races) != {"packed/k-wise"}:
        with_peer(PEER)
    dtypes = {kind: "bf16" if "bf16" in kind else "fp32" for kind in options.kinds}
    rates = quiet_rates(options.device, dict.fromkeys(dtypes.values()))
    rows = (
        compete(race, setting, kind, options, rates[dtypes[kind]])
        for kind, setting, race in plan(options)
    )
    write_rows(rows, rates, options)


if __name__ == "__main__":
    main()
