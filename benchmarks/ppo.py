"""Race an update of PPO against TRL's PPOTrainer; prints JSON.

    python benchmarks/ppo.py --quick --json rows.json
    python benchmarks/ppo.py --kinds fp32 --races separate-critic/trl --model m50
    python benchmarks/ppo.py --table rows.json

An update answers 64 prompts of 64 tokens with 64 at most, scores the answers with a reward model,
and takes 16 optimizer steps on them: four epochs of four minibatches.  The peer is TRL 1.12.0, the
last release that had a PPOTrainer, with the separate value model that it always has:

separate-critic/trl     ours with a critic apart too: the same work
shared-trunk/trl        ours with a value head on the policy's trunk
top-quarter/trl         that, and the top quarter of the layers learns, with the norm and the heads;
                        what the layers below make of a rollout is computed once
top-quarter/trl-frozen  the same, against the peer with the same layers frozen

fixed: every answer has exactly 64 tokens.  ragged: prompts uniform in 0.5-1.5 x their mean; every
token of an answer is its last by the same chance, that for which the mean is 32.  Both sides decode
with the same head, which has that chance built in (`ppo_peer.new_policy`).  bf16: the peer's models
are loaded in it, ours compute in it over fp32 weights; left out, unless named in --kinds, where a
processor has no such products.

Every repeat has fresh prompts, which all sides answer in turns, each with answers of its own.  One
thread.  `ratio` is the peer's wall time over ours, `ratio_cpu` that of process CPU time, which
other programs disturb less.  `token_bound`: layers that the peer's real tokens pass, over those
that ours pass.  `product_bound`: what the peer multiplies, padding included, over what our method
has to.  `matmul_share`: the time that this would take at the measured rate of a large product, over
the time taken (the peer's: what its method would have to, without padding).  `phases`: seconds of
an update, of CPU time on a CPU.

TRL is installed into .peers on first use, and timed from the fetch of the prompts to the end of the
last optimizer step and its metrics: no set-up, logging or saving.  `check` says what is made sure
of before anything is timed.  Recorded results: ppo.md beside this file.
"""

import argparse
import gc
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ppo_ours import Ours, method_of
from ppo_peer import END, EPOCHS, MINIBATCHES, TRL, Heard, Prompts, TrlPpo, new_policy
from ppo_products import Lengths, Method, Shape
from racing import (
    Seconds,
    model_shape,
    options_parser,
    peak_mib,
    quiet_rates,
    rounded,
    spread,
    with_peer,
    write_rows,
)

from starling.base.seeding import permutation

PROMPTS = PROMPT_TOKENS = 64
RACES = ("separate-critic/trl", "shared-trunk/trl", "top-quarter/trl", "top-quarter/trl-frozen")
KINDS = ("fp32", "fp32 ragged", "bf16", "bf16 ragged")
# While timed, so small that answers stay what they are; in the check, so large that losses move.
LR, CHECK_LR = 1e-6, 1e-3


@dataclass
class Timed:
    """A side of a race with what it took in each repeat."""

    run: Callable[[Prompts], Seconds]
    method: Method
    phases: dict[str, Seconds]
    drawn: list[Lengths]
    peak_mib: float | None
    took: list[Seconds]

    def forget(self) -> None:
        """What was timed before the race was no part of it."""
        self.phases.clear()
        self.drawn.clear()
        self.took.clear()


def new_prompts(kind: str, vocab: int, seed: int) -> Prompts:
    """Random tokens; no padding, and no end marker."""
    rng, tokens = random.Random(seed), torch.Generator().manual_seed(seed)
    low, high = PROMPT_TOKENS // 2, PROMPT_TOKENS * 3 // 2
    is_ragged = "ragged" in kind
    lengths = [rng.randint(low, high) if is_ragged else PROMPT_TOKENS for _ in range(PROMPTS)]
    return [
        tuple(torch.randint(END + 1, vocab, (length,), generator=tokens).tolist())
        for length in lengths
    ]


def new_ours(side: str, kind: str, options: argparse.Namespace, lr: float) -> Ours:
    return Ours.new(
        options.model, side, kind=kind, num_prompts=PROMPTS, device=options.device, lr=lr
    )


def new_trl(side: str, kind: str, options: argparse.Namespace, lr: float) -> TrlPpo:
    """The peer, whole or with the layers frozen that our top quarter leaves as they are."""
    layers = model_shape(options.model).num_hidden_layers
    trained = layers // 4 if side == "trl-frozen" else None
    return TrlPpo.new(options.model, kind=kind, device=options.device, trained=trained, lr=lr)


def check(
    ours: Sequence[str], peers: Sequence[str], kind: str, options: argparse.Namespace
) -> dict[str, float | None]:
    """Both sides do the same work: given the peer's answers, losses fall; returns peaks of memory.

    Every side begins with the same policy, critic and head, and visits the rows of each epoch in
    the same order.  The losses of its minibatches, taken together, are lower in the last epoch than
    in the first.  A critic apart is the same algorithm, so in fp32 the first minibatch's loss and
    gradient norm are the peer's to 1e-3; not with ragged lengths, where the peer puts the score
    behind the end marker and learns one value more.  What is left of a difference is the peer's
    whitening, by n - 1 in place of n: 1e-4 of an advantage.
    """
    prompts = new_prompts(kind, model_shape(options.model).vocab_size, 0)
    orders = [permutation(PROMPTS, 0, "ppo/minibatch/0", epoch) for epoch in range(EPOCHS)]
    theirs: dict[str, Heard] = {}
    peaks: dict[str, float | None] = {}
    for name in peers:
        trl = new_trl(name, kind, options, CHECK_LR)

        def learn(name: str = name, trl: TrlPpo = trl) -> None:
            theirs[name] = trl.heard(prompts, orders)

        peaks[name] = peak_mib(learn, options.device)
        assert fall(theirs[name]) < 0, f"{name}: {theirs[name].losses}"
    given = theirs[peers[0]]
    assert given.sequences is not None
    for side in ours:
        mine = new_ours(side, kind, options, CHECK_LR).heard(
            given.sequences.tolist(), max(map(len, prompts))
        )
        assert fall(mine) < 0, f"{side}: {mine.losses}"
        if side == "separate-critic" and kind == "fp32":
            for what in ("losses", "norms"):
                pair = getattr(mine, what)[0], getattr(given, what)[0]
                assert math.isclose(*pair, rel_tol=1e-3), f"{what} of the first step: {pair}"
        print(f"{kind}, {side}: loss {fall(mine):+.4f}, trl {fall(given):+.4f}", file=sys.stderr)
    return peaks


def fall(heard: Heard) -> float:
    """From the mean loss of the first epoch to that of the last."""
    return statistics.mean(heard.losses[-MINIBATCHES:]) - statistics.mean(
        heard.losses[:MINIBATCHES]
    )


def heat(
    races: Sequence[str], kind: str, options: argparse.Namespace, rate: float
) -> Iterator[Any]:
    """The rows of one kind: in every repeat each side takes one update, one after the other."""
    pairs = [race.split("/") for race in races]
    ours, peers = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    peaks = check(ours, peers, kind, options)
    shape = Shape.of(new_policy(options.model, ragged=False, device="cpu"))
    vocab = model_shape(options.model).vocab_size
    sides: dict[str, Timed] = {}
    for name in peers:
        trl = new_trl(name, kind, options, LR)
        trained = shape.layers // 4 if name == "trl-frozen" else None
        method = Method(trained, has_critic_apart=True)
        sides[name] = Timed(trl, method, trl.phases, trl.drawn, peaks[name], [])
    for name in ours:
        mine = new_ours(name, kind, options, LR)
        sides[name] = Timed(mine, method_of(name, shape.layers), mine.phases, mine.drawn, None, [])
        warm = new_prompts(kind, vocab, 0)
        sides[name].peak_mib = peak_mib(lambda mine=mine, warm=warm: mine(warm), options.device)
        sides[name].forget()
    for repeat in range(1, options.repeats + 1):
        prompts = new_prompts(kind, vocab, repeat)
        for name in sorted(sides, key=[n for pair in pairs for n in pair].index):
            gc.collect()
            sides[name].took.append(sides[name].run(prompts))
    for race, (mine, theirs) in zip(races, pairs, strict=True):
        yield row_of(
            race, kind, sides[mine], sides[theirs], shape=shape, rate=rate, options=options
        )


def row_of(
    race: str,
    kind: str,
    mine: Timed,
    theirs: Timed,
    *,
    shape: Shape,
    rate: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One row, as the other races have them."""
    pairs = list(zip(mine.took, theirs.took, strict=True))
    passes = [
        side.method.layer_passes(shape.layers) * statistics.mean(d.num_tokens for d in side.drawn)
        for side in (theirs, mine)
    ]
    necessary = statistics.mean(mine.method.necessary_flops(shape, d) for d in mine.drawn)
    padded = statistics.mean(theirs.method.padded_flops(shape, d) for d in theirs.drawn)
    record = record_of(mine, shape, rate, options.device)
    return {
        "race": race,
        "setting": kind,
        "model": options.model,
        "device": options.device,
        "repeats": len(pairs),
        "prompts_per_repeat": PROMPTS,
        "ratio": spread([t.wall / m.wall for m, t in pairs]),
        "ratio_cpu": spread([t.cpu / m.cpu for m, t in pairs]),
        "ours": record,
        "peer": record_of(theirs, shape, rate, options.device),
        "token_bound": rounded(passes[0] / passes[1]),
        "product_bound": rounded(padded / necessary),
        "matmul_share": record["matmul_share"],
        "load": round(os.getloadavg()[0], 1),
    }


def record_of(side: Timed, shape: Shape, rate: float, device: str) -> dict[str, Any]:
    """The figures of one side, all repeats together."""
    repeats = len(side.took)
    wall, cpu = (sum(getattr(took, clock) for took in side.took) for clock in ("wall", "cpu"))
    clock, total = ("cpu", cpu) if device == "cpu" else ("wall", wall)
    flops = sum(side.method.necessary_flops(shape, drawn) for drawn in side.drawn)
    tokens = sum(drawn.num_tokens for drawn in side.drawn)
    seconds = {name: getattr(took, clock) for name, took in side.phases.items()}
    seconds["rest"] = total - sum(seconds.values())
    return {
        "prompts_per_second": rounded(PROMPTS * repeats / wall),
        "tokens_per_second": rounded(tokens / wall),
        "prompts_per_cpu_second": rounded(PROMPTS * repeats / cpu),
        "seconds_per_update": rounded(total / repeats),
        "phases": {name: rounded(taken / repeats) for name, taken in seconds.items()},
        "answer_tokens": rounded(
            statistics.mean(length for drawn in side.drawn for length in drawn.answers)
        ),
        "matmul_share": rounded(flops / rate / total),
        "peak_mib": side.peak_mib,
        "optimizer_steps_per_update": EPOCHS * MINIBATCHES,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    columns = ("model", "race", "setting", "ratio", "of CPU time", "token bound", "product bound")
    columns += ("matmul share, ours (peer's)", "peak MiB, ours (peer's)")
    lines = [columns, ("---",) * len(columns)]
    for row in rows:
        found = [
            f"{row[ratio]['median']:.3g} ({row[ratio]['low']:.3g}-{row[ratio]['high']:.3g})"
            for ratio in ("ratio", "ratio_cpu")
        ]
        mine, theirs = row["ours"], row["peer"]
        shares = f"{mine['matmul_share']:.2f} ({theirs['matmul_share']:.2f})"
        peaks = f"{mine['peak_mib']:.0f} ({theirs['peak_mib']:.0f})"
        bounds = f"{row['token_bound']:.3g}", f"{row['product_bound']:.3g}"
        lines.append((row["model"], row["race"], row["setting"], *found, *bounds, shares, peaks))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options_parser(__doc__, repeats=3)
    parser.add_argument("--quick", action="store_true", help="every race and kind, at tiny")
    parser.add_argument("--races", nargs="+", choices=RACES, default=RACES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--table", type=Path, help="print the rows of this file in Markdown")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.races, options.kinds = "tiny", RACES, None
    return options


def kinds_here(device: str) -> list[str]:
    """All, but for bf16 where no instruction multiplies it, which takes 100 times as long."""
    if device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return list(KINDS)
    print("bf16: left out, this processor has no instructions for it", file=sys.stderr)
    return [kind for kind in KINDS if "bf16" not in kind]


def main(arguments: Sequence[str] | None = None) -> None:
    """Race every row that was asked for."""
    options = parse(arguments)
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    with_peer(TRL)
    options.kinds = options.kinds or kinds_here(options.device)
    dtypes = dict.fromkeys(kind.partition(" ")[0] for kind in options.kinds)
    rates = quiet_rates(options.device, dtypes)
    rows = (
        row
        for kind in options.kinds
        for row in heat(options.races, kind, options, rates[kind.partition(" ")[0]])
    )
    write_rows(rows, rates, options)


if __name__ == "__main__":
    main()
