"""Which prompts are used: one function for each rule of `PrepareSection`, in its order.

Keys, language and length follow Nectar's preparation; decontamination and near duplicates are ours.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from starling.base.errors import DataError, some
from starling.base.hashing import hash_json
from starling.base.seeding import numpy_generator, permutation
from starling.data.nectar import dedup_key, normalised_words, text_key
from starling.data.records import Message, Messages, Prompt, Record
from starling.data.rows import iter_rows
from starling.feedback.candidates import distinct_answers
from starling.feedback.config import FeedbackInputs, FeedbackSection

NUM_HASHES = 128
MOST_MISSED = 0.01
"""Share of the pairs at the threshold that MinHash may overlook; none is dropped on its word."""

SHORTEST_RUN = 8
"""Words of a short turn of a benchmark that are a run by themselves (GPT-3's least n)."""

EXAMPLES = 3

Part = str | tuple[str, ...]
"""Of a turn: its key, or a run of its words."""


def prepare_prompts(
    section: FeedbackSection, inputs: FeedbackInputs, quarantine: Path, *, seed: int
) -> tuple[list[Prompt], dict[str, Any]]:
    """The prompts of all files that the rules leave, and how many each rule removed.

    Raises DataError when none is left.
    """
    rules = section.prepare
    files = (iter_rows(path, Prompt, quarantine=quarantine) for path in inputs.prompts)
    key = dedup_key if rules.duplicates == "nectar" else text_key
    prompts, num_rows, num_answers = merge_duplicates(chain.from_iterable(files), key)
    merged = sum(len(prompt.answers) for prompt in prompts)
    removed = {"duplicates": num_rows - len(prompts)}

    def keep(kept: list[Prompt], rule: str) -> None:
        nonlocal prompts
        removed[rule] = len(prompts) - len(kept)
        prompts = kept

    if rules.language is not None:
        keep(in_language(prompts, rules.language), "language")
    keep(of_length(prompts, rules.min_chars, rules.max_chars), "length")
    benchmarks = [read_benchmark(path, quarantine, rules.ngram) for path in inputs.benchmarks]
    clean, overlaps = decontaminate(prompts, benchmarks)
    keep(clean, "contaminated")
    keep(sample_sources(prompts, rules.per_source, seed), "per_source")
    if rules.near_duplicates is not None:
        keep(drop_near_duplicates(prompts, rules.near_duplicates, seed), "near_duplicates")
    if section.limit is not None:
        drawn = permutation(len(prompts), seed, "feedback/limit", 0)[: section.limit]
        keep([prompts[index] for index in sorted(drawn)], "limit")
    if not prompts:
        raise DataError(f"no prompt is left of {num_rows}. Removed by each rule: {removed}")
    return prompts, {
        "read": num_rows,
        "removed": removed,
        "kept": len(prompts),
        "answers": {"read": num_answers, "empty_or_repeated": num_answers - merged},
        "benchmarks": [
            {"file": path.name, "removed": len(each), "examples": each[:EXAMPLES]}
            for path, each in zip(inputs.benchmarks, overlaps, strict=True)
        ],
    }


def merge_duplicates(
    prompts: Iterable[Prompt], same: Callable[[Sequence[Message]], object]
) -> tuple[list[Prompt], int, int]:
    """One prompt for all with an equal key `same`; and how many rows, and answers, came in.

    It has the sources and answers of each, without empty ones and those that say the same.  Prompts
    graded by other checks are not the same.  Raises DataError when one id names two prompts.
    """
    merged: dict[str, Prompt] = {}
    named: dict[str, str] = {}
    num_rows = num_answers = 0
    for prompt in prompts:
        num_rows += 1
        num_answers += len(prompt.answers)
        key = hash_json([same(prompt.messages), prompt.checks])
        if named.setdefault(prompt.id, key) != key:
            raise DataError(
                f"two different prompts have the id {prompt.id!r}. Give each its own id, or none: "
                "then the text names it."
            )
        both = (merged[key], prompt) if key in merged else (prompt,)
        answers = distinct_answers(answer for each in both for answer in each.answers)
        sources = list(dict.fromkeys(name for each in both for name in each.source or ()))
        fields = {"answers": answers, "source": sources or None}
        merged[key] = both[0].model_copy(update=fields)
    return list(merged.values()), num_rows, num_answers


def in_language(prompts: Sequence[Prompt], language: str) -> list[Prompt]:
    """Those for whose text the language is among the three likeliest (py3langid)."""
    try:
        from py3langid import rank
    except ImportError as error:
        raise DataError(
            "feedback.prepare.language needs py3langid, which is not installed: "
            'pip install "starling-rlaif[prompts]"'
        ) from error
    return [
        prompt
        for prompt in prompts
        if language in (code for code, _ in rank("\n".join(_texts(prompt)))[:3])
    ]


def of_length(prompts: Sequence[Prompt], least: int, most: int | None) -> list[Prompt]:
    """Those whose messages have so many characters together."""
    longest = math.inf if most is None else most
    return [each for each in prompts if least <= sum(map(len, _texts(each))) <= longest]


class BenchmarkRow(Record):
    """A question in FastChat's layout (`question_id`, `turns`), in ours, or a prompt."""

    question_id: int | str | None = None
    id: int | str | None = None
    turns: tuple[str, ...] = Field(default=(), strict=False)
    messages: Messages = ()


def read_benchmark(path: Path, quarantine: Path, ngram: int) -> dict[Part, str]:
    """What prompts may not hold, with the id of its question. Raises DataError for no questions."""
    parts: dict[Part, str] = {}
    for number, row in enumerate(iter_rows(path, BenchmarkRow, quarantine=quarantine), start=1):
        named = (name for name in (row.question_id, row.id, number) if name is not None)
        question = str(next(named))
        for turn in row.turns or _asked(row.messages):
            length = min(ngram, max(SHORTEST_RUN, len(normalised_words(turn))))
            parts |= dict.fromkeys(_parts(turn, [length]), question)
    if not parts:
        raise DataError(f"{path} holds no questions. A benchmark's rows have turns or messages.")
    return parts


def decontaminate(
    prompts: Sequence[Prompt], benchmarks: Sequence[Mapping[Part, str]]
) -> tuple[list[Prompt], list[list[dict[str, str]]]]:
    """Drop prompts with a user turn of a benchmark, or with a run of words of one.

    A prompt counts for the first benchmark that it overlaps; the overlaps come for each.
    """
    found: list[list[dict[str, str]]] = [[] for _ in benchmarks]
    lengths = [sorted({len(p) for p in parts if isinstance(p, tuple)}) for parts in benchmarks]
    kept: list[Prompt] = []
    for prompt in prompts:
        for overlaps, parts, lengths_ in zip(found, benchmarks, lengths, strict=True):
            if overlap := _overlap(prompt, parts, lengths_):
                overlaps.append(overlap)
                break
        else:
            kept.append(prompt)
    return kept, found


def _overlap(
    prompt: Prompt, parts: Mapping[Part, str], lengths: Sequence[int]
) -> dict[str, str] | None:
    for turn in _asked(prompt.messages):
        part = next((part for part in _parts(turn, lengths) if part in parts), None)
        if part is not None:
            match, words = ("exact", turn) if isinstance(part, str) else ("ngram", " ".join(part))
            named = {"prompt": prompt.id, "question": parts[part]}
            return {**named, "match": match, "words": words[:200]}
    return None


def _parts(turn: str, lengths: Iterable[int]) -> Iterator[Part]:
    # Nectar's key calls more the same than is, and here that is the safe side.
    yield dedup_key((Message(role="user", content=turn),))
    words = normalised_words(turn)
    for length in lengths:
        yield from _runs(words, length)


def _runs(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(length)), strict=False)


def _asked(messages: Sequence[Message]) -> list[str]:
    return [message.content for message in messages if message.role == "user"]


def _texts(prompt: Prompt) -> list[str]:
    return [message.content for message in prompt.messages]


def sample_sources(prompts: Sequence[Prompt], most: Mapping[str, int], seed: int) -> list[Prompt]:
    """At most so many prompts of each source named, drawn by the seed, in their order.

    A prompt of several sources counts for each, and goes when one of them is full.
    """
    present = {name for prompt in prompts for name in prompt.source or ()}
    for name in most:
        if name not in present:
            raise DataError(
                f"feedback.prepare.per_source: no prompt is from {name!r}. "
                f"There are {some(sorted(present), 10) or 'no sources'}."
            )
    taken, kept = Counter[str](), []
    for index in permutation(len(prompts), seed, "feedback/sources", 0):
        capped = [name for name in set(prompts[index].source or ()) if name in most]
        if all(taken[name] < most[name] for name in capped):
            taken.update(capped)
            kept.append(index)
    return [prompts[index] for index in sorted(kept)]


def drop_near_duplicates(prompts: Sequence[Prompt], threshold: float, seed: int) -> list[Prompt]:
    """Drop a prompt whose runs of three words overlap an earlier, kept one's by the threshold.

    Overlap is Jaccard's: shared over all.  MinHash proposes the pairs to compare and may overlook
    some; each is compared in full.  Source: Broder 1997, On the resemblance of documents.
    """
    bands, rows = choose_bands(threshold)
    random = numpy_generator(seed, "feedback/minhash")
    factors, shifts = random.integers(2**64, size=(2, bands * rows, 1), dtype=np.uint64)
    mixers = random.integers(2**64, size=(bands, rows), dtype=np.uint64)
    kept: list[Prompt] = []
    shingles: list[np.ndarray] = []
    buckets: dict[int, list[int]] = {}
    for prompt in prompts:
        own = hash_shingles(" ".join(_texts(prompt)))
        minima = (own * (factors | np.uint64(1)) + shifts).min(axis=1).reshape(bands, rows)
        keys = (minima * mixers).sum(axis=1).tolist()
        near = {index for key in keys for index in buckets.get(key, ())}
        if any(_jaccard(own, shingles[index]) >= threshold for index in near):
            continue
        for key in keys:
            buckets.setdefault(key, []).append(len(kept))
        kept.append(prompt)
        shingles.append(own)
    return kept


def choose_bands(threshold: float) -> tuple[int, int]:
    """Bands of rows of minima: the most rows that overlook few of the pairs at the threshold."""
    for rows in range(NUM_HASHES, 1, -1):
        bands = NUM_HASHES // rows
        if (1 - threshold**rows) ** bands <= MOST_MISSED:
            return bands, rows
    return NUM_HASHES, 1


def hash_shingles(text: str) -> np.ndarray:
    """64 bits for each different run of three words; for a shorter text, of all its words.

    A text without words (only emoji) is its own run.
    """
    words = normalised_words(text)
    runs = {" ".join(run) for run in _runs(words, 3)} or {" ".join(words) or text}
    digests = b"".join(hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
