"""Verifiable instructions: each kind by answers that keep to it just so, and just not."""

import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from starling.base.errors import DataError
from starling.data.records import Prompt
from starling.data.rows import read_rows
from starling.judging.instructions import (
    InstructedPrompt,
    Instruction,
    follows,
    follows_loosely,
    share_followed,
)

ADAPTER: TypeAdapter = TypeAdapter(Instruction)


def made(kind: str, **fields: object):
    return ADAPTER.validate_python({"kind": kind, **fields})


# Kind, its fields, answers that follow it, and answers that do not.
CASES = [
    ("max_words", {"value": 3}, ["one two three", "don't be well-known."], ["one two three four"]),
    ("min_words", {"value": 3}, ["One - two, three!"], ["one two", "one-two-three"]),
    (
        "contains",
        {"phrase": "red fox"},
        ["A Red\n fox.", '"red fox"'],
        ["a redfox", "a red foxglove", "red, fox"],
    ),
    ("contains", {"phrase": "so", "at_least": 2}, ["So, so."], ["so", "so also"]),
    ("contains", {"phrase": "C++"}, ["in C++, yes"], ["in C"]),
    ("excludes", {"phrase": "you know"}, ["You knowing me."], ["Well, you  know.", "YOU KNOW it"]),
    ("starts_with", {"text": "Sure!"}, ["Sure! It is.", " Sure!yes"], ["sure! no", "Oh, Sure!"]),
    ("ends_with", {"text": "."}, ["It is.", "It is. \n"], ["It is", "It. is!"]),
    ("lowercase", {}, ["all is small: 3.", "3", "\u00e4rger"], ["One is not", "\u00c4rger"]),
    ("uppercase", {}, ["ALL 3 ARE."], ["One IS NOT"]),
    ("no_comma", {}, ["none; here"], ["one, here"]),
    ("json", {}, ['{"a": [1]}', "```json\n[1]\n```", "3"], ["{a: 1}", '{"a": 1} x', '{"a": NaN}']),
    ("quoted", {}, ['"It is."', ' "so"\n'], ["It is", '"It" is', 'so"']),
    (
        "num_sentences",
        {"relation": "exactly", "value": 2},
        ["It is 3.5 km. Go on", 'He said "no." Then "yes!"', "Oh?! Well..."],
        ["One.", "One. Two. Three."],
    ),
    (
        "num_paragraphs",
        {"relation": "at least", "value": 2},
        ["a\n\nb", "a\n \nb", "a\n \n\nb\nc\n\n"],
        ["a\nb", "a\n\n"],
    ),
    (
        "num_bullets",
        {"relation": "at most", "value": 2},
        ["none", "- a\n* b", "1 - 2\n- a\n-b\n**c**\n+ d"],
        ["- a\n  * b\n+ c"],
    ),
]


@pytest.mark.parametrize(("kind", "fields", "kept", "broken"), CASES)
def test_an_instruction_is_followed_by_these_and_not_by_those(
    kind: str, fields: dict, kept: list[str], broken: list[str]
) -> None:
    instruction = made(kind, **fields)
    assert [follows(instruction, answer) for answer in kept] == [True] * len(kept)
    assert [follows(instruction, answer) for answer in broken] == [False] * len(broken)


@pytest.mark.parametrize("relation", ["exactly", "at least", "at most"])
def test_relations_are_what_they_say(relation: str) -> None:
    instruction = made("num_sentences", relation=relation, value=2)
    found = [follows(instruction, "So. " * count) for count in (1, 2, 3)]
    expected = {
        "exactly": [False, True, False],
        "at least": [False, True, True],
        "at most": [True, True, False],
    }
    assert found == expected[relation]


def test_every_kind_has_a_case() -> None:
    kinds = {case[0] for case in CASES}
    with pytest.raises(ValidationError) as caught:
        made("max_letters", value=3)
    said = caught.value.errors()[0]["msg"]
    assert said.startswith("Input tag 'max_letters' found")
    listed = said.partition("expected tags: ")[2]
    assert sorted(listed.split(", ")) == sorted(f"'{kind}'" for kind in kinds)


@pytest.mark.parametrize("answer", ["", " \n", "...", "{}", '""', "- *"])
def test_an_answer_without_a_word_follows_nothing(answer: str) -> None:
    for kind, fields, _, _ in CASES:
        assert not follows(made(kind, **fields), answer)
        assert not follows_loosely(made(kind, **fields), answer)


def test_the_loose_measure_forgives_stars_and_a_line_around_the_answer() -> None:
    answer = 'Here you are:\n**{"a": 1}**\nHope, that helps.'
    assert not follows(made("json"), answer)
    assert follows_loosely(made("json"), answer)
    assert follows_loosely(made("no_comma"), answer)
    assert follows_loosely(made("ends_with", text="}"), answer)
    assert follows_loosely(made("starts_with", text="{"), answer)
    assert not follows_loosely(made("lowercase"), "A\nB\nC")
    assert follows_loosely(made("lowercase"), "So:\nit is")
    assert follows_loosely(made("lowercase"), "it is\nSo.")
    assert follows_loosely(made("num_bullets", relation="exactly", value=2), "* a\n* b\n")


# Typed from IFEval's instructions.py, whose rules for these three kinds ours equal.
PUBLISHED = {
    "no_comma": ({}, lambda value: not re.search(r"\,", value)),
    "quoted": (
        {},
        lambda value: len(value.strip()) > 1 and value.strip()[0] == value.strip()[-1] == '"',
    ),
    "excludes": (
        {"phrase": "so"},
        lambda value: not re.search(r"\bso\b", value, flags=re.IGNORECASE),
    ),
}


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize(
    "answer",
    ["so", "So, it is", '"also"', '"so"\n', 'it "is"', "a,b", "SO-so", "sob", '"a', "is\nso."],
)
def test_kinds_that_are_ifevals_to_the_letter(kind: str, answer: str) -> None:
    fields, published = PUBLISHED[kind]
    assert follows(made(kind, **fields), answer) == published(answer)


def published_loose(check, response: str) -> bool:
    """The eight readings of evaluation_lib.py, as it makes them."""
    lines = response.split("\n")
    shorter = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    readings = [response, *shorter]
    readings += [each.replace("*", "") for each in readings]
    return any(each.strip() and check(each) for each in readings)


@pytest.mark.parametrize(
    "answer",
    [
        "it is",
        "Sure, here:\nit is",
        "it is\nWell, bye.",
        "Sure, here:\nit is\nWell, bye.",
        "it, is\nno",
        "a, b\nc\nd\ne, f\ng",
        '*"it is"*',
        '**Sure:**\n"*it is*"',
        "so\nso\nso",
    ],
)
def test_the_loose_measure_reads_an_answer_in_the_published_eight_ways(answer: str) -> None:
    for kind, (fields, check) in PUBLISHED.items():
        assert follows_loosely(made(kind, **fields), answer) == published_loose(check, answer)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "max_words"},
        {"kind": "max_words", "value": "3"},
        {"kind": "max_words", "value": 0},
        {"kind": "contains", "phrase": " "},
        {"kind": "ends_with", "text": ""},
        {"kind": "no_comma", "value": 3},
        {"kind": "num_bullets", "relation": "about", "value": 3},
        {"value": 3},
    ],
)
def test_what_is_misspelt_or_blank_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(wrong)


ROW = '{"id": "a", "prompt": "\\n\\nHuman: Say so.\\n\\nAssistant: ", "instructions": %s, "key": 1}'


def test_rows_are_read_and_bad_ones_put_aside(tmp_path: Path) -> None:
    path, quarantine = tmp_path / "instructions.jsonl", tmp_path / "quarantine.jsonl"
    good = ROW % '[{"kind": "max_words", "value": 3}, {"kind": "no_comma"}]'
    bad = [ROW % "[]", ROW % '[{"kind": "rhymes"}]', ROW.replace("instructions", "other") % "[]"]
    path.write_text("\n".join([good] * 300 + bad) + "\n", encoding="utf-8")
    rows = read_rows(path, InstructedPrompt, quarantine=quarantine)
    assert len(rows) == 300
    assert isinstance(rows[0], Prompt)
    assert rows[0].messages[0].content == "Say so."
    assert rows[0].instructions == (made("max_words", value=3), made("no_comma"))
    aside = quarantine.read_text(encoding="utf-8")
    assert aside.count("\n") == 3
    assert "'quoted'" in aside
    path.write_text("\n".join([good, *bad]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="3 of 4 rows"):
        read_rows(path, InstructedPrompt, quarantine=quarantine)


def test_shares_are_of_each_prompts_own_instructions() -> None:
    def prompt(*instructions: dict) -> InstructedPrompt:
        messages = [{"role": "user", "content": "Say so."}]
        return InstructedPrompt.model_validate({"messages": messages, "instructions": instructions})

    comma, short = {"kind": "no_comma"}, {"kind": "max_words", "value": 2}
    prompts = [prompt(comma, short), prompt(comma), prompt(comma, short, {"kind": "lowercase"})]
    assert share_followed(prompts, ["so, so", "so", "So it is"]) == [0.5, 1.0, 1 / 3]
    with pytest.raises(ValueError, match="shorter"):
        share_followed(prompts, ["so"])
