"""FastChat's files for MT-Bench: questions, judge prompts, answers, references and judgments.

Its layout of a folder, which `starling mt-bench` reads and writes, so that files go both ways:

    question.jsonl  judge_prompts.jsonl (or one level up)  reference_answer/JUDGE.jsonl
    model_answer/MODEL.jsonl  model_judgment/JUDGE_single.jsonl, JUDGE_pair.jsonl

Columns that are not named here are ignored.  Source: github.com/lm-sys/FastChat, llm_judge.
"""

import re
from collections.abc import Hashable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import Field, model_validator

from starling.base.errors import DataError, some
from starling.base.files import neighbours
from starling.base.hashing import hash_json
from starling.base.jsonl import iter_json, read_records, write_records
from starling.data.records import Record

FAILED = -1
"""The score of a judgment without one, in judgment files alone: what FastChat writes and reads."""

Pair = Annotated[tuple[str, str], Field(strict=False)]


class MtQuestion(Record):
    """A question of one or two turns."""

    question_id: int
    category: str
    turns: tuple[str, ...] = Field(strict=False, min_length=1, max_length=2)

    @model_validator(mode="after")
    def _check(self) -> "MtQuestion":
        if any(not turn.strip() for turn in self.turns):
            raise ValueError("a turn is empty")
        return self


class Choice(Record):
    """One answer to each turn; `tokens` is ours, the length of each."""

    index: int = 0
    turns: tuple[str, ...] = Field(strict=False, min_length=1)
    tokens: tuple[int, ...] | None = Field(default=None, strict=False)


class ModelAnswer(Record):
    """A model's answers to a question; the first choice is the one that is judged."""

    question_id: int
    answer_id: str = ""
    model_id: str
    choices: tuple[Choice, ...] = Field(strict=False, min_length=1)
    tstamp: float | None = None

    @property
    def turns(self) -> tuple[str, ...]:
        """The answers, a turn each."""
        return self.choices[0].turns


class JudgePrompt(Record):
    """What a judge is told; `prompt_template` has fields such as {question} and {answer}."""

    name: str
    type: Literal["single", "pairwise"]
    system_prompt: str
    prompt_template: str
    output_format: str


class SingleJudgment(Record):
    """One call about one turn's answer; the judge is a model and the name of a prompt."""

    question_id: int
    model: str
    judge: Pair
    user_prompt: str = ""
    judgment: str = ""
    score: float
    turn: int = Field(ge=1, le=2)
    tstamp: float | None = None
    reason: str | None = None
    """Ours: why there is no score."""
    repeat: int | None = None
    """Ours: the round, above 0, where the same is asked several times."""
    retried: int | None = None
    """Ours: replies before this one that could not be read."""
    served_by: str | None = None
    """Ours: the judge in its server's words, where these are others."""


Winner = Literal["model_1", "model_2", "tie", "error"]


class PairJudgment(Record):
    """Two calls about one turn of two models: the first shows model_1 first, the second last."""

    question_id: int
    model_1: str
    model_2: str
    g1_winner: Winner
    g2_winner: Winner
    judge: Pair
    g1_user_prompt: str = ""
    g1_judgment: str = ""
    g2_user_prompt: str = ""
    g2_judgment: str = ""
    turn: int = Field(ge=1, le=2)
    tstamp: float | None = None
    reason: str | None = None
    """Ours: why a call has no verdict."""
    served_by: str | None = None

    @property
    def winner(self) -> str | None:
        """The model's name, "tie" where the calls disagree; None where one has no verdict."""
        if "error" in (self.g1_winner, self.g2_winner):
            return None
        if self.g1_winner != self.g2_winner or self.g1_winner == "tie":
            return "tie"
        return self.model_1 if self.g1_winner == "model_1" else self.model_2


R = TypeVar("R", MtQuestion, ModelAnswer, SingleJudgment, PairJudgment)
Rule = Literal["refuse", "first", "last"]
"""What becomes of rows that speak of the same thing."""


class Bench(NamedTuple):
    """The questions in their file's order, the judge's prompts by name, and the references."""

    questions: tuple[MtQuestion, ...]
    prompts: dict[str, JudgePrompt]
    references: dict[int, tuple[str, ...]]


LAYOUT = ("question.jsonl", "judge_prompts.jsonl", "reference_answer/*.jsonl")
HUB_FOLDER = re.compile(r"hf://(dataset|space)s/([^/@]+/[^/@]+)(?:@([^/]+))?(/.+)?")


def find_folder(reference: str) -> Path:
    """The folder itself, or a copy of one on the hub: hf://spaces/OWNER/NAME[@REVISION][/FOLDER].

    Raises DataError when it cannot be had.
    """
    if not reference.startswith("hf://"):
        folder = Path(reference)
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}. {neighbours(folder)}")
        return folder
    found = HUB_FOLDER.fullmatch(reference)
    if found is None:
        raise DataError(
            f"{reference!r} names no folder on the hub; write hf://datasets/OWNER/NAME/FOLDER or "
            "hf://spaces/OWNER/NAME/FOLDER"
        )
    kind, repository, revision, inner = found.groups()
    inner = (inner or "").strip("/")
    patterns = [f"{inner}/{name}".strip("/") for name in LAYOUT]
    patterns.append(f"{inner.rpartition('/')[0]}/judge_prompts.jsonl".strip("/"))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        copy = snapshot_download(
            repository, repo_type=kind, revision=revision, allow_patterns=patterns
        )
    except (OSError, HFValidationError) as error:
        raise DataError(
            f"{reference} cannot be had: {str(error).strip().splitlines()[0]}\n"
            "Check the name and the network (HF_HUB_OFFLINE), or give a folder."
        ) from error
    return Path(copy) / inner


class BenchFiles(NamedTuple):
    """Where a benchmark lies; a set whose judge needs no references may have none."""

    questions: Path
    prompts: Path
    references: Path | None


def find_files(folder: Path, references: Path | None = None) -> BenchFiles:
    """The files of a folder; `references` in place of its own.

    Raises DataError for a prompts file that is missing, and where references are to be chosen.
    """
    prompts = folder / "judge_prompts.jsonl"
    if not prompts.is_file():
        prompts = folder.absolute().parent / prompts.name  # where FastChat's repository keeps it
    if not prompts.is_file():
        raise DataError(
            f"there is no judge_prompts.jsonl in {folder} or beside it. Of FastChat's repository, "
            "copy fastchat/llm_judge/data/judge_prompts.jsonl there."
        )
    return BenchFiles(
        folder / "question.jsonl", prompts, references or _official_references(folder)
    )


def read_bench(files: BenchFiles, quarantine: Path) -> Bench:
    """All that judging needs; DataError for a file that cannot be read, and for a repeated id."""
    questions = read_records(files.questions, MtQuestion, quarantine=quarantine)
    ids = [each.question_id for each in questions]
    resolve(files.questions, questions, ids, "refuse", "question")
    prompts = read_records(files.prompts, JudgePrompt, quarantine=quarantine)
    given = files.references
    rows = read_records(given, ModelAnswer, quarantine=quarantine) if given else []
    return Bench(
        tuple(questions),
        {prompt.name: prompt for prompt in prompts},
        {row.question_id: row.turns for row in rows},
    )


def _official_references(folder: Path) -> Path | None:
    """GPT-4's own answers, or the only file there is; None without one, as for sets without."""
    found = sorted((folder / "reference_answer").glob("*.jsonl"))
    official = folder / "reference_answer" / "gpt-4.jsonl"
    if len(found) > 1 and official not in found:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{official.parent} holds {names}; name the one to use with --references")
    return official if official in found else found[0] if found else None


def read_answers(
    path: Path, model: str | None, questions: Sequence[MtQuestion], rule: Rule, quarantine: Path
) -> tuple[list[ModelAnswer], int]:
    """One model's answers, in the questions' order, and how many rows were duplicates.

    Answers of other models, and to other questions, are left out.  Raises DataError where a
    question has no answer, a turn is missing or to spare, or `model` is needed to tell which.
    """
    rows = read_records(path, ModelAnswer, quarantine=quarantine)
    names = sorted({row.model_id for row in rows})
    if model is None and len(names) > 1:
        raise DataError(f"{path} holds answers of {some(names, 8)}; choose one with --model NAME")
    name = model or names[0]
    own = [row for row in rows if row.model_id == name]
    if not own:
        raise DataError(f"{path} holds no answers of {name!r}, but of {some(names, 8)}")
    keys = [row.question_id for row in own]
    chosen, num_duplicates = resolve(path, own, keys, rule, f"answer of {name} to question")
    by_id = {row.question_id: row for row in chosen}
    missing = [str(each.question_id) for each in questions if each.question_id not in by_id]
    if missing:
        raise DataError(
            f"{path}: {name} has no answer to {len(missing)} of {len(questions)} questions: "
            f"{some(missing, 8)}. A score over the others would be another benchmark's; answer "
            "these too, or take them out of question.jsonl."
        )
    for question in questions:
        found = len(by_id[question.question_id].turns)
        if found != len(question.turns):
            raise DataError(
                f"{path}: question {question.question_id} has {len(question.turns)} turns, and "
                f"{name}'s answer to it {found}. Answer every turn on top of the one before."
            )
    return [by_id[question.question_id] for question in questions], num_duplicates


def dated(rows: Sequence[R], path: Path) -> list[R]:
    """The rows with their time: of what stood in the file already that of then, of the rest now."""
    if not rows:
        return []
    earlier = iter_json(path) if path.is_file() else ()
    known = {hash_json({**row, "tstamp": None}): row.get("tstamp") for row in earlier}
    now = datetime.now(UTC).timestamp()
    return [
        row.model_copy(
            update={"tstamp": known.get(hash_json({**_as_row(row), "tstamp": None})) or now}
        )
        for row in rows
    ]


def write_rows(path: Path, rows: Sequence[R]) -> None:
    """Write them in FastChat's columns."""
    write_records(path, (_as_row(row) for row in rows))


def _as_row(row: R) -> dict[str, Any]:
    """The row's columns; whole scores are whole numbers, as FastChat's are."""
    fields = row.model_dump(mode="json", exclude_none=True)
    if isinstance(row, SingleJudgment) and row.score.is_integer():
        fields["score"] = int(row.score)
    return fields


def resolve(
    path: Path, rows: Sequence[R], keys: Sequence[Hashable], rule: Rule, what: str
) -> tuple[list[R], int]:
    """One row per key, by the rule, in the order of keys, and how many rows were left out.

    Raises DataError by the rule "refuse".
    """
    by_key: dict[Hashable, R] = {}
    for key, row in zip(keys, rows, strict=True):
        if key in by_key and rule == "refuse":
            raise DataError(
                f"{path} holds more than one {what} {key}. Remove all but one, or choose with "
                "--duplicates first or --duplicates last."
            )
        if key not in by_key or rule == "last":
            by_key[key] = row
    return list(by_key.values()), len(rows) - len(by_key)
