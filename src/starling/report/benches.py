"""What a bench's folder says about its models, in one shape whichever command wrote it.

Two kinds are read: a run's folder, whose bench answers with two policies, and a folder of
`starling mt-bench`, which has FastChat's layout.  What a folder does not hold is None or empty.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from starling.base.errors import DataError
from starling.base.estimate import Estimate
from starling.base.files import neighbours, quarantine_elsewhere
from starling.base.hashing import hash_json
from starling.base.jsonl import iter_json, read_json, read_records
from starling.data.fastchat import ModelAnswer, MtQuestion, PairJudgment, SingleJudgment
from starling.manifest import read_manifest
from starling.report.read import AFTER, BEFORE, as_estimate, read_recipe

LOWEST, HIGHEST = 1, 10
"""The scale of a judge's scores."""

STAMP = ("bench", "mode", "judge", "judge's settings", "prompts", "questions", "references", "rule")
"""What two scores must have in common before they are compared."""


class Question(NamedTuple):
    """What was asked; two of one id but other words are two."""

    id: str
    category: str
    turns: tuple[str, ...]


class Judgment(NamedTuple):
    """One verdict on an answer: its score if it has one, what it says in short, and its words."""

    score: float | None
    label: str
    text: str


class Turn(NamedTuple):
    """One answer with all that was judged of it; gold is in 0..1."""

    answer: str | None
    gold: float | None
    judgments: tuple[Judgment, ...]

    @property
    def score(self) -> float | None:
        """The mean of its scores; None without one."""
        scores = [each.score for each in self.judgments if each.score is not None]
        return fmean(scores) if scores else None


Turns = Mapping[Question, tuple[Turn, ...]]


class Model(NamedTuple):
    """One model's results; `stamp` is what its scores depend on beside the model."""

    name: str
    scores: Mapping[str, Estimate | None]
    """"average", "turn 1", "turn 2"."""
    categories: Mapping[str, Estimate]
    lengths: Mapping[str, Estimate]
    """By unit: tokens, words, characters an answer."""
    gold: Estimate | None
    win_rate: Estimate | None
    against: str | None
    duplicates: int
    judge_noise: float | None
    """Standard deviation of the average from round to round, where it was judged repeatedly."""
    stamp: Mapping[str, Any]
    judged: str | None
    turns: Turns

    @property
    def counted(self) -> Estimate | None:
        """The estimate whose n and failures speak for the model."""
        return self.scores["average"] or self.win_rate


def read_models(folder: Path) -> list[Model]:
    """The folder's models; DataError for a folder without results of a bench, or damaged."""
    bench = folder / "bench"
    is_run = (bench / "scores.json").is_file()
    if not is_run and not (folder / "scores.json").is_file():
        raise DataError(
            f"{folder} holds no results of a bench. Give a run's folder, which has "
            "bench/scores.json, or what `starling mt-bench --out` wrote, which has scores.json. "
            + neighbours(folder / "scores.json" if folder.is_dir() else folder)
        )
    return list(_of_run(folder) if is_run else _of_mt_bench(folder))


def read_run_turns(run: Path) -> Mapping[str, Turns]:
    """By policy, the sampled answers of a run's bench with their ratings; {} without any."""
    path = run / "bench" / "answers.jsonl"
    rows = [row for row in iter_json(path) if row["decoding"] == "sampled"] if path.exists() else []
    judgments: dict[Any, Judgment] = {}
    if (ratings := path.with_name("judgments.jsonl")).is_file():
        for row in iter_json(ratings):
            key = row["policy"], row["id"], row["turn"]
            judgments[key] = Judgment(row["score"], f"{row['score']:g}", row.get("text") or "")
    unread = Judgment(None, "no score: no verdict that could be read", "")
    turns: dict[str, dict[Question, tuple[Turn, ...]]] = {}
    for policy in (BEFORE, AFTER):
        by_id: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["policy"] == policy:
                by_id.setdefault(row["id"], []).append(row)
        for id, own in by_id.items():
            own.sort(key=lambda row: row["turn"])
            asked = tuple(row["messages"][-1]["content"] for row in own)
            turns.setdefault(policy, {})[Question(id, own[0]["category"], asked)] = tuple(
                Turn(
                    row["answer"],
                    row["gold"]["total"] if row.get("gold") else None,
                    (judgments.get((policy, id, row["turn"]), unread),),
                )
                for row in own
            )
    return turns


def _of_run(folder: Path) -> Iterator[Model]:
    found, turns = read_json(folder / "bench" / "scores.json"), read_run_turns(folder)
    judge = read_recipe(folder / "recipe.yaml").get("judge") or {}
    inputs = (read_manifest(folder / "bench") or {}).get("inputs", {})
    asked = [list(question) for own in turns.values() for question in own]
    stamp = {
        "bench": ("a run's own", "mt-bench, in a run")[(folder / "bench" / "mt_bench").is_dir()],
        "mode": "single",
        "judge": judge["model"] if judge.get("kind") == "endpoint" else judge.get("kind"),
        "questions": hash_json(sorted(asked)) if asked else None,
        "rule": "strict",
    }
    stamp["judge's settings"] = inputs.get("judge", {}).get("sha256")
    for name in ("prompts", "references"):  # FastChat's, by MT-Bench's protocol
        stamp[name] = inputs[name]["sha256"] if inputs.get(name, {}).get("path") else "none"

    def of(figures: Mapping[str, Any], name: str, policy: str) -> Estimate | None:
        return as_estimate(figures.get(name, {}).get(policy))

    scores = {"average": "score", "turn 1": "score_turn_1", "turn 2": "score_turn_2"}
    for policy in (BEFORE, AFTER):
        parts = {name: of(part, "score", policy) for name, part in found["by_category"].items()}
        tokens = of(found, "tokens_per_answer", policy)
        yield Model(
            name=policy,
            scores={label: of(found, name, policy) for label, name in scores.items()},
            categories={name: part for name, part in parts.items() if part},
            lengths={"tokens": tokens} if tokens else {},
            gold=of(found, "gold", policy),
            win_rate=as_estimate(found.get("win_rate")) if policy == AFTER else None,
            against=BEFORE if policy == AFTER else None,
            duplicates=0,  # the bench refuses two questions of one id
            judge_noise=None,
            stamp=stamp,
            judged=None,
            turns=turns.get(policy, {}),
        )


def _of_mt_bench(folder: Path) -> Iterator[Model]:
    found = read_json(folder / "scores.json")
    given = found["stamp"]
    keys = {"prompts": "prompts_sha256", "questions": "questions_sha256", "judge's settings": ""}
    stamp = {name: given.get(keys.get(name, name)) for name in STAMP}
    with quarantine_elsewhere() as quarantine:
        files = _Files(folder, given, quarantine)
        for name in found["models"] if given["mode"] == "pairwise" else [given["model"]]:
            record = found["models"][name] if given["mode"] == "pairwise" else {}
            estimates = found.get("estimates", {})
            parts = {
                part: as_estimate(each) for part, each in estimates.get("categories", {}).items()
            }
            keys = {"average": "average", "turn 1": "turn1", "turn 2": "turn2"}
            lengths = found.get("length") or {}
            yield Model(
                name=name,
                scores={label: as_estimate(estimates.get(key)) for label, key in keys.items()},
                categories={part: each for part, each in parts.items() if each},
                lengths={unit: Estimate(**each) for unit, each in lengths.items()},
                gold=None,
                win_rate=as_estimate(record.get("win_rate_adjusted")),
                against="the others" if record else None,
                duplicates=found["duplicates"],
                judge_noise=(found.get("repeats") or {}).get("average_sd"),
                stamp=stamp,
                judged=given.get("judged"),
                turns=files.turns(name),
            )


class _Files:
    """The answers and judgments of an mt-bench folder, by the judge of its scores."""

    def __init__(self, folder: Path, stamp: Mapping[str, Any], quarantine: Path) -> None:
        def rows(pattern: str, record: type[Any]) -> Iterator[Any]:
            for path in sorted(folder.glob(pattern)):
                yield from read_records(path, record, quarantine=quarantine)

        self.questions: list[MtQuestion] = list(rows("question.jsonl", MtQuestion))
        self.answers: dict[tuple[str, int], tuple[str, ...]] = {
            (row.model_id, row.question_id): row.turns
            for row in rows("model_answer/*.jsonl", ModelAnswer)
        }
        self.judgments: dict[tuple[str, int, int], list[Judgment]] = {}
        strict = stamp.get("rule") == "strict"
        if stamp["mode"] == "pairwise":
            judged = rows("model_judgment/*_pair.jsonl", PairJudgment)
            said = (each for row in judged if row.judge[0] == stamp["judge"] for each in _pair(row))
        else:
            judged = rows("model_judgment/*_single.jsonl", SingleJudgment)
            own = (row for row in judged if row.judge[0] == stamp["judge"])
            said = ((row.model, row, _single(row, strict=strict)) for row in own)
        for name, row, judgment in said:
            self.judgments.setdefault((name, row.question_id, row.turn), []).append(judgment)

    def turns(self, name: str) -> Turns:
        """The model's turns of every question."""
        turns: dict[Question, tuple[Turn, ...]] = {}
        for each in self.questions:
            given = self.answers.get((name, each.question_id), ())
            turns[Question(str(each.question_id), each.category, each.turns)] = tuple(
                Turn(
                    given[number] if number < len(given) else None,
                    None,
                    tuple(self.judgments.get((name, each.question_id, number + 1), ())),
                )
                for number in range(len(each.turns))
            )
        return turns


def _single(row: SingleJudgment, *, strict: bool) -> Judgment:
    if row.score < 0:
        return Judgment(
            None, f"no score: {row.reason or 'the reply could not be read'}", row.judgment
        )
    if strict and not LOWEST <= row.score <= HIGHEST:
        return Judgment(None, f"no score: {row.score:g} is off the scale", row.judgment)
    return Judgment(row.score, f"{row.score:g}", row.judgment)


def _pair(row: PairJudgment) -> Iterator[tuple[str, PairJudgment, Judgment]]:
    """The two calls as each of the two models sees them."""
    calls = ((row.g1_winner, row.g1_judgment, "first"), (row.g2_winner, row.g2_judgment, "second"))
    other_seat = {"first": "second", "second": "first"}
    for winner, text, seat in calls:
        for name, other, key, own_seat in (
            (row.model_1, row.model_2, "model_1", seat),
            (row.model_2, row.model_1, "model_2", other_seat[seat]),
        ):
            said = {key: "won", "tie": "tied", "error": "no verdict"}.get(winner, "lost")
            yield name, row, Judgment(None, f"against {other}, shown {own_seat}: {said}", text)
