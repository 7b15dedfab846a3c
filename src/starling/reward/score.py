"""What `starling score` does: a file of conversations as scores, a file of pairs as accuracies."""

from collections.abc import Iterator, Sequence
from operator import mul
from pathlib import Path
from typing import Any

from starling.base.progress import Progress
from starling.data.records import Conversation, FinishReason
from starling.data.reward_pairs import RewardPair
from starling.data.rows import read_rows
from starling.models.reward_model import RewardModel, Scored
from starling.reward.evaluate import evaluate_pairs

ROWS_AT_ONCE = 512

SECTIONS = {
    "Chat": "alpacaeval-easy alpacaeval-length alpacaeval-hard mt-bench-easy mt-bench-med",
    "Chat Hard": "mt-bench-hard llmbar-natural llmbar-adver-neighbor llmbar-adver-GPTInst "
    "llmbar-adver-GPTOut llmbar-adver-manual",
    "Safety": "refusals-dangerous refusals-offensive xstest-should-refuse xstest-should-respond "
    "donotanswer",
    "Reasoning": "math-prm hep-cpp hep-go hep-java hep-js hep-python hep-rust",
}
"""RewardBench's subsets by section, version 1 (rewardbench/constants.py @a32e272).

They weigh by the pairs in the file: the source's table has XSTest's two counts exchanged.
"""

MATHEMATICS, AS_MANY_AS_CODE = "math-prm", 984
"""The pairs that its 447 count for: as many as the six subsets of code have together."""


class ConversationRow(Conversation):
    """A finished conversation, with what a reward model's chat format can tell beside the text."""

    mode: str | None = None
    finish_reason: FinishReason | None = None


def find_reward_model(reference: str) -> str:
    """A run folder's own reward model; anything else stands for itself."""
    own = Path(reference, "reward", "model")
    return str(own) if own.is_dir() else reference


def read_conversations(file: Path, quarantine: Path) -> list[Scored]:
    """Conversations to score; one that was cut (finish_reason: length) gets no end marker."""
    rows = read_rows(file, ConversationRow, quarantine=quarantine)
    return [Scored(row.messages, row.mode, row.finish_reason != "length", row.id) for row in rows]


def score_rows(reward_model: RewardModel, items: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    """A row for each conversation: id, score, raw_score, num_tokens and was_cut."""
    with Progress("score", len(items)) as progress:
        for start in range(0, len(items), ROWS_AT_ONCE):
            part = items[start : start + ROWS_AT_ONCE]
            for item, found in zip(part, reward_model.score_each(part), strict=True):
                yield {"id": item.id, **found._asdict()}
            progress.update(start + len(part))


def measure_pairs(reward_model: RewardModel, pairs: Sequence[RewardPair]) -> dict[str, Any]:
    """How often the chosen conversation scores higher, in all and by subset; how many were cut.

    A tie is no win, as in RewardBench.  Where a file has all subsets of one of RewardBench's
    sections, that has a score too, and `rewardbench` is the mean of all four.
    """
    sides = [
        Scored(side.messages, id=f"{pair.id or number} ({name})")
        for number, pair in enumerate(pairs, start=1)
        for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]
    rows = list(score_rows(reward_model, sides))
    scores = [row["raw_score"] for row in rows]
    gaps = [chosen - other for chosen, other in zip(scores[::2], scores[1::2], strict=True)]
    figures = evaluate_pairs(pairs, [(gap or -1.0, 0.0) for gap in gaps], seed=0)
    return figures | {
        "ties": gaps.count(0.0),
        **_sections(figures["subsets"]),
        "cut": sum(row["was_cut"] for row in rows),
        "conversations": len(rows),
    }


def _sections(subsets: dict[str, Any]) -> dict[str, Any]:
    """RewardBench's sections, weighted by their pairs, as far as they are whole; and their mean."""
    found = {}
    for section, listed in SECTIONS.items():
        names = listed.split()
        if subsets.keys() >= set(names):
            means = [subsets[name]["accuracy"]["mean"] for name in names]
            sizes = [subsets[name]["accuracy"]["n"] for name in names]
            if MATHEMATICS in names:
                sizes[names.index(MATHEMATICS)] = AS_MANY_AS_CODE
            found[section] = sum(map(mul, means, sizes)) / sum(sizes)
    whole = len(found) == len(SECTIONS)
    return {"sections": found, "rewardbench": sum(found.values()) / 4 if whole else None}


def as_table(figures: dict[str, Any]) -> str:
    """Accuracy by subset with its 95 % interval, beside the rule that the longer answer wins.

    A single prompt has no interval.
    """
    subsets = figures["subsets"]
    width = max(map(len, [*subsets, "subset"]))
    lines = [f"{'subset':{width}}  {'pairs':>6}  accuracy               longer wins"]
    for name, row in [*subsets.items(), ("all", figures["all"])]:
        found = row["accuracy"]
        low, high = found["low"], found["high"]
        interval = "" if low is None else f"[{low:.3f}, {high:.3f}]"
        accuracy = f"{found['mean']:.3f} {interval:14}"
        lines.append(f"{name:{width}}  {found['n']:6}  {accuracy}   {row['longer']:.3f}")
    lines.append(f"mean of the subsets: {figures['mean_of_subsets']:.3f}")
    lines += [f"RewardBench, {name}: {mean:.3f}" for name, mean in figures["sections"].items()]
    if figures["rewardbench"] is not None:
        lines.append(f"RewardBench, mean of the sections: {figures['rewardbench']:.3f}")
    if figures["ties"]:
        lines.append(f"{figures['ties']} pairs have equal scores, which is no win")
    if figures["cut"]:
        lines.append(f"{figures['cut']} of {figures['conversations']} conversations were cut")
    return "\n".join(lines)
