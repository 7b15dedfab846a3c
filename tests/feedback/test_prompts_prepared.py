"""Which prompts a run uses: each rule by itself, all in order, and on real prompts."""

import functools
import itertools
import json
import random
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.base.errors import DataError
from starling.data.nectar import dedup_key, normalised_words, text_key
from starling.data.records import Prompt
from starling.data.rows import read_rows
from starling.feedback.config import FeedbackInputs, FeedbackSection, PrepareSection
from starling.feedback.prompts import (
    choose_bands,
    decontaminate,
    drop_near_duplicates,
    hash_shingles,
    in_language,
    merge_duplicates,
    of_length,
    prepare_prompts,
    read_benchmark,
    sample_sources,
)
from starling.judging.config import JudgeSection

WORDS = [a + b + c for a in "bdfgklmnp" for b in "aeiou" for c in "nrst"]


def prompt(*turns, **fields):
    """A conversation of the user's and the assistant's turns in alternation."""
    messages = [
        {"role": "assistant" if place % 2 else "user", "content": text}
        for place, text in enumerate(turns)
    ]
    return Prompt.model_validate({"messages": messages, **fields})


def answers(*texts):
    return [{"answer": text, "model": f"m{place}"} for place, text in enumerate(texts)]


def asked(prompts):
    return [each.messages[-1].content for each in prompts]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def prepare(folder, *files, benchmarks=(), seed=0, limit=None, **rules):
    section = FeedbackSection(prompts="p", prepare=PrepareSection(**rules), limit=limit)
    inputs = FeedbackInputs(files, tuple(benchmarks), (), JudgeSection(kind="rubric"))
    return prepare_prompts(section, inputs, folder / "quarantine.jsonl", seed=seed)


# Duplicates


def test_prompts_that_differ_in_case_and_signs_are_one_with_the_answers_and_sources_of_all():
    first = prompt("Name a cat.", id="1", source=["x"], answers=answers("Tom", " ", "Tom\n"))
    second = prompt("NAME a  cat", id="2", source=["y", "x"], answers=answers("Felix", "Tom "))
    other = prompt("Name a dog.", id="3")
    merged, num_rows, num_answers = merge_duplicates([first, other, second], dedup_key)
    assert [each.id for each in merged] == ["1", "3"]
    assert (num_rows, num_answers) == (3, 5)
    assert merged[0].messages == first.messages
    assert merged[0].source == ["x", "y"]
    assert [(a.answer, a.model) for a in merged[0].answers] == [("Tom", "m0"), ("Felix", "m0")]
    assert (merged[1].source, merged[1].answers) == (None, ())


TWINS = ["What is 2+3?", "What is 2-3?", "what IS \n 2+3? ", "Sort in C", "Sort in C++"]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({}, ["What is 2+3?", "What is 2-3?", "Sort in C", "Sort in C++"]),
        ({"duplicates": "nectar"}, ["What is 2+3?", "Sort in C"]),
    ],
)
def test_signs_make_another_prompt_unless_nectars_key_is_asked_for(tmp_path, rules, kept):
    rows = [row(text, answers=answers(f"to {text}")) for text in TWINS]
    prompts, counts = prepare(tmp_path, write(tmp_path / "p.jsonl", rows), **rules)
    assert asked(prompts) == kept
    assert counts["removed"]["duplicates"] == len(TWINS) - len(kept)
    if not rules:
        assert [a.answer for a in prompts[0].answers] == [f"to {TWINS[0]}", f"to {TWINS[2]}"]


def test_a_typed_marker_is_no_turn_of_another():
    turns, typed = prompt("a", "b", "c"), prompt("a\n\nAssistant: b\n\nHuman: c")
    assert len(merge_duplicates([turns, typed], text_key)[0]) == 2
    assert len(merge_duplicates([turns, typed], dedup_key)[0]) == 1


def test_prompts_graded_by_other_checks_are_not_one():
    plus, minus = (prompt(f"What is 2{sign}2?", checks={"sign": sign}) for sign in "+-")
    assert len(merge_duplicates([plus, minus, plus], dedup_key)[0]) == 2


@pytest.mark.parametrize("others", [("b", "c"), ("a", "b"), ("A!", "b")])
def test_two_prompts_of_one_id_are_refused(others):
    prompts = [prompt("a", id="y"), *(prompt(text, id="x") for text in others)]
    with pytest.raises(DataError, match="two different prompts have the id 'x'"):
        merge_duplicates(prompts, dedup_key)


def test_a_repeated_row_with_its_id_is_one_prompt():
    assert len(merge_duplicates([prompt("a", id="x"), prompt("a", id="x")], dedup_key)[0]) == 1


# Language and length

SENTENCES = {
    "en": "Could you please explain to me how the weather changes with the seasons?",
    "de": "Kannst du mir bitte erklaeren, wie sich das Wetter mit den Jahreszeiten aendert?",
    "zh": "\u8bf7\u95ee\u5929\u6c14\u5982\u4f55\u968f\u5b63\u8282\u53d8\u5316\uff1f",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_prompts_of_one_language_are_kept(language):
    pytest.importorskip("py3langid")
    kept = in_language([prompt(text) for text in SENTENCES.values()], language)
    assert asked(kept) == [SENTENCES[language]]


def test_the_three_likeliest_languages_count_and_the_fourth_does_not(monkeypatch):
    guesses = [("fr", -1.0), ("it", -2.0), ("en", -3.0), ("de", -4.0)]
    py3langid = pytest.importorskip("py3langid")
    monkeypatch.setattr(py3langid, "rank", lambda text: guesses)
    kept = [len(in_language([prompt("x")], code)) for code in ("fr", "en", "de")]
    assert kept == [1, 1, 0]


def test_without_the_language_model_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(DataError, match=r'pip install "starling-rlaif\[prompts\]"'):
        in_language([prompt("x")], "en")


def test_length_is_of_all_messages_and_its_bounds_are_kept():
    prompts = [prompt("x" * 3), prompt("x", "y", "z" * 2), prompt("x" * 5), prompt("x" * 6)]
    assert [len(each.messages) for each in of_length(prompts, 4, 5)] == [3, 1]
    assert len(of_length(prompts, 4, None)) == 3
    assert len(of_length(prompts, 0, None)) == 4


# Decontamination

QUESTION = "Compose an engaging travel blog post about a recent trip to Hawaii with its sights"


@pytest.fixture
def benchmark(tmp_path):
    turns = [QUESTION, "Now in one line."]
    path = write(tmp_path / "bench.jsonl", [{"question_id": 81, "turns": turns, "category": "w"}])
    return read_benchmark(path, tmp_path / "q", 13)


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        ([QUESTION.upper().replace(" ", " - ") + "!!"], "exact"),
        (["now, in ONE line"], "exact"),
        (["hi", "hello", QUESTION + "."], "exact"),
        ([QUESTION, "a blog", "thanks, and another"], "exact"),
        ([f"My teacher said: '{QUESTION.lower()}, please'; can you?"], "ngram"),
        ([" ".join(["Please", *QUESTION.split()[1:14]])], "ngram"),
        ([" ".join(["Please", *QUESTION.split()[2:14], "dear"])], None),
        (["I was told: now in one line. What is meant?"], None),
        (["hi", QUESTION, "thanks for this"], None),
    ],
)
def test_a_benchmark_is_found_in_any_turn_of_the_user_and_nowhere_else(benchmark, turns, match):
    kept, [overlaps] = decontaminate([prompt(*turns, id="7"), prompt("clean")], [benchmark])
    assert len(QUESTION.split()) == 15
    assert asked(kept) == ([] if match else [turns[-1]]) + ["clean"]
    assert [(each["match"], each["question"], each["prompt"]) for each in overlaps] == (
        [(match, "81", "7")] if match else []
    )


SHORT = "Write a poem about the tall old tree outside"


@pytest.mark.parametrize(
    ("turn", "ngram", "is_caught"),
    [
        (SHORT, 13, True),
        (" ".join(SHORT.split()[:8]), 13, True),
        (" ".join(SHORT.split()[:7]), 13, False),
        (" ".join(SHORT.split()[:7]), 8, False),
        (SHORT, 9, True),
        (SHORT, 5, True),
        (" ".join(SHORT.split()[:4]), 5, False),
    ],
)
def test_a_short_turn_of_eight_words_or_more_is_found_inside_another(
    tmp_path, turn, ngram, is_caught
):
    assert len(SHORT.split()) == 9
    path = write(tmp_path / "b.jsonl", [{"id": "q", "turns": [turn, QUESTION], "category": "c"}])
    known = read_benchmark(path, tmp_path / "q", ngram)
    near = prompt(f"Hello! {' '.join(turn.split()[1:])} Thanks.")
    for text in (turn, f"Hello! {turn.upper()}. Thanks."):
        kept, [overlaps] = decontaminate([prompt(text)], [known])
        assert (not kept) == (is_caught or text == turn)
    if ngram > 8:
        assert decontaminate([near], [known])[0] == [near]


def test_the_shared_words_are_told(benchmark):
    words = [*QUESTION.lower().split()[2:], "and", "more"]
    _, [[overlap]] = decontaminate([prompt(" ".join(words))], [benchmark])
    assert overlap["words"] == " ".join(words[:13])


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=9))
def test_a_run_is_found_exactly_where_one_is_shared(tmp_path_factory, text, turn):
    folder = tmp_path_factory.mktemp("bench")
    row = {"id": "q", "turns": [" ".join(turn), "zzz"], "category": "c"}
    known = read_benchmark(write(folder / "b.jsonl", [row]), folder / "q", 4)
    own = " ".join([*text, "end"])
    shared = any(
        f" {' '.join(turn[start : start + 4])} " in f" {own} " for start in range(len(turn) - 3)
    )
    kept, _ = decontaminate([prompt(own)], [known])
    assert (not kept) == (shared or "".join(text) + "end" == "".join(turn))


def test_a_prompt_counts_for_the_first_benchmark_and_files_of_every_layout_are_read(tmp_path):
    fastchat = write(tmp_path / "a.jsonl", [{"question_id": 1, "turns": ["one two"]}])
    ours = write(tmp_path / "b.jsonl", [{"id": "q2", "category": "c", "turns": ["three"]}])
    prompts = write(tmp_path / "c.jsonl", [row("one two"), row("four", id="q4")])
    known = [read_benchmark(path, tmp_path / "q", 13) for path in (fastchat, ours, prompts)]
    kept, overlaps = decontaminate([prompt(t) for t in ("one, two", "Three", "four", "5")], known)
    assert asked(kept) == ["5"]
    assert [[each["question"] for each in found] for found in overlaps] == [["1"], ["q2"], ["q4"]]


def test_a_benchmark_without_questions_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "x"}])
    with pytest.raises(DataError, match="a.jsonl holds no questions"):
        read_benchmark(path, tmp_path / "q", 13)


# Sources


def test_sources_are_sampled_by_the_seed_and_those_not_named_are_left_alone():
    prompts = [prompt(f"{n:03}", source=["big" if n % 2 else "small"]) for n in range(100)]
    prompts.append(prompt("none"))
    draws = [asked(sample_sources(prompts, {"big": 10}, seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(draws[0])
    sources = Counter("none" if text == "none" else int(text) % 2 for text in draws[0])
    assert sources == {1: 10, 0: 50, "none": 1}
    assert max(text for text in draws[0] if text != "none" and int(text) % 2) > "050", "no head"


def test_a_prompt_of_several_sources_counts_for_each_and_needs_room_in_all():
    prompts = [prompt(f"a{n}", source=["a", "a"]) for n in range(20)]
    prompts += [prompt(f"ab{n}", source=["a", "b"]) for n in range(20)]
    kept = sample_sources(prompts, {"a": 8, "b": 3}, seed=0)
    both = sum("b" in each.source for each in kept)
    assert len(kept) == 8
    assert both == 3
    assert sample_sources(prompts, {"a": 0}, seed=0) == []
    assert sample_sources(prompts, {}, seed=0) == prompts


def test_a_source_that_no_prompt_has_is_refused():
    with pytest.raises(DataError, match=r"no prompt is from 'shareGPT'. There are sharegpt."):
        sample_sources([prompt("x", source=["sharegpt"])], {"shareGPT": 3}, seed=0)
    with pytest.raises(DataError, match="There are no sources"):
        sample_sources([prompt("x")], {"a": 3}, seed=0)


# Near duplicates


@functools.cache
def runs_of_three(text):
    words = text.split()
    return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}


def naive_overlap(first, second):
    """Jaccard's index of the sets of three words in a row, from the definition."""
    one, other = runs_of_three(first), runs_of_three(second)
    return len(one & other) / len(one | other)


def variants(num_texts, seed):
    """Texts of 40 words, each with three that differ from it in 1 to 8 words."""
    random_ = random.Random(seed)
    texts = []
    for _ in range(num_texts):
        words = random_.choices(WORDS, k=40)
        texts.append(" ".join(words))
        for _ in range(3):
            changed = list(words)
            for place in random_.sample(range(40), random_.randint(1, 8)):
                changed[place] = random_.choice(WORDS)
            texts.append(" ".join(changed))
    return texts


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8])
def test_near_duplicates_are_those_of_the_definition(threshold):
    texts = variants(60, seed=1)
    expected = []
    for text in texts:
        if all(naive_overlap(text, earlier) < threshold for earlier in expected):
            expected.append(text)
    assert 61 < len(expected) < 235, "both sides of the threshold are there"
    kept = asked(drop_near_duplicates([prompt(text) for text in texts], threshold, seed=0))
    # Of 180 pairs few stand at the threshold, and there one in a hundred may be overlooked.
    assert len(set(kept) ^ set(expected)) <= 3
    for text in set(texts) - set(kept):
        assert any(naive_overlap(text, other) >= threshold for other in kept)
    again = asked(drop_near_duplicates([prompt(text) for text in texts], threshold, seed=0))
    assert again == kept


def test_the_first_of_near_duplicates_stays_and_short_prompts_are_compared_whole():
    texts = ["two words", "Two words!", "words two", "one", "a b c d e f g h", "a b c d e f g h i"]
    kept = asked(drop_near_duplicates([prompt(text) for text in texts], 0.8, seed=0))
    assert kept == ["two words", "words two", "one", "a b c d e f g h"]
    emoji = [prompt("\u2764"), prompt("\u2600"), prompt("?")]
    assert drop_near_duplicates(emoji, 0.8, seed=0) == emoji


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5, 0.8, 0.95])
def test_bands_overlook_at_most_one_pair_in_a_hundred_at_the_threshold(threshold):
    bands, rows = choose_bands(threshold)
    assert bands * rows <= 128
    if threshold > 0.1:
        assert (1 - threshold**rows) ** bands <= 0.01
    others = [(128 // more, more) for more in range(rows + 1, 129)]
    assert all((1 - threshold**more) ** bands > 0.01 for bands, more in others)


@given(st.lists(st.sampled_from(["a", "b", "c", "B!"]), min_size=1, max_size=12))
def test_a_text_has_one_hash_for_each_run_of_three_words(words):
    plain = [word.lower().strip("!") for word in words]
    runs = {tuple(plain[start : start + 3]) for start in range(len(plain) - 2)} or {tuple(plain)}
    assert len(set(hash_shingles(" ".join(words)).tolist())) == len(runs)


# All of it


def test_the_rules_apply_in_order_and_each_is_counted(tmp_path):
    pytest.importorskip("py3langid")
    english = "Tell me a long story about the old house on the hill, number"
    numbers = ("one", "two", "three", "four", "five", "six", "seven")
    good = [row(f"{number} {english}", source="a") for number in numbers]
    first = write(tmp_path / "1.jsonl", [*good, row(f"{english.upper()} oNe".lower(), source="b")])
    rest = [
        row(good[0]["messages"][0]["content"].upper(), source="b"),
        row(SENTENCES["zh"] * 2),
        row("How are you, my friend?"),
        row(QUESTION),
    ]
    second = write(tmp_path / "2.jsonl", rest)
    bench = write(tmp_path / "bench.jsonl", [{"question_id": 3, "turns": [QUESTION]}])
    rules = {"language": "en", "min_chars": 41, "per_source": {"a": 6}, "near_duplicates": 0.95}
    prompts, counts = prepare(tmp_path, first, second, benchmarks=[bench], limit=5, seed=1, **rules)
    assert counts["removed"] == {
        "duplicates": 1,
        "language": 1,
        "length": 1,
        "contaminated": 1,
        "per_source": 1,
        "near_duplicates": 0,
        "limit": 2,
    }
    assert (counts["read"], counts["kept"], len(prompts)) == (12, 5, 5)
    assert counts["benchmarks"] == [
        {
            "file": "bench.jsonl",
            "removed": 1,
            "examples": [
                {
                    "prompt": counts["benchmarks"][0]["examples"][0]["prompt"],
                    "question": "3",
                    "match": "exact",
                    "words": QUESTION,
                }
            ],
        }
    ]
    json.dumps(counts)


def test_rules_that_are_off_remove_nothing(tmp_path):
    path = write(tmp_path / "p.jsonl", [row("a", answers=answers("x", "", "x")), row("b")])
    prompts, counts = prepare(tmp_path, path)
    assert asked(prompts) == ["a", "b"]
    assert counts["removed"] == {"duplicates": 0, "length": 0, "contaminated": 0, "per_source": 0}
    assert counts["answers"] == {"read": 3, "empty_or_repeated": 2}


def test_a_limit_draws_by_the_seed_and_keeps_the_files_order(tmp_path):
    path = write(tmp_path / "p.jsonl", [row(f"{n:03}") for n in range(100)])
    draws = [asked(prepare(tmp_path, path, limit=10, seed=seed)[0]) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 10
    assert draws[0] == sorted(draws[0])
    assert draws[0] != [f"{n:03}" for n in range(10)]
    assert len(prepare(tmp_path, path, limit=1000)[0]) == 100


def test_when_no_prompt_is_left_it_is_said_which_rules_took_them(tmp_path):
    path = write(tmp_path / "p.jsonl", [row("a"), row("b")])
    with pytest.raises(DataError, match=r"no prompt is left of 2.*'length': 2"):
        prepare(tmp_path, path, min_chars=41)


# Real prompts


@pytest.mark.real_data
def test_of_real_nectar_only_planted_questions_of_mt_bench_go(test_data, tmp_path):
    questions = test_data / "mt_bench" / "question.jsonl"
    nectar = test_data / "nectar" / "rankings.jsonl"
    turns = [turn for line in questions.open() for turn in json.loads(line)["turns"]]
    assert len(turns) == 160
    lead = "Here is what my teacher gave me today, word for word:"
    long = [turn for turn in turns if sum(word.isalnum() for word in turn.split()) >= 14]
    planted = [
        *(row(turn.swapcase(), id=f"case {n}") for n, turn in enumerate(turns)),
        *(row(turn.replace(",", " ;") + " ?!", id=f"signs {n}") for n, turn in enumerate(turns)),
        *(row(f"{lead} {t.upper()} What now?", id=f"inside {n}") for n, t in enumerate(long)),
        *(row(" ".join(t.split()[1:]), id=f"headless {n}") for n, t in enumerate(long)),
    ]
    clean, counts = prepare(tmp_path, nectar, benchmarks=[questions])
    assert (len(clean), counts["removed"]["contaminated"]) == (100, 0)
    short = [turn for turn in turns if 8 <= len(normalised_words(turn)) <= 12]
    assert len(short) > 30
    planted += [row(f"Hello! {t} Thanks.", id=f"short {n}") for n, t in enumerate(short)]
    mixed, counts = prepare(
        tmp_path, write(tmp_path / "planted.jsonl", planted), nectar, benchmarks=[questions]
    )
    assert [each.id for each in mixed] == [each.id for each in clean]
    [report] = counts["benchmarks"]
    assert len(report["examples"]) == 3
    assert report["removed"] + counts["removed"]["duplicates"] == len(planted)


@pytest.mark.real_data
def test_a_real_nectar_row_keeps_its_seven_answers_and_loses_their_ranks(test_data, tmp_path):
    path = test_data / "nectar" / "rankings.jsonl"
    prompts, counts = prepare(tmp_path, path, near_duplicates=0.8)
    published = [json.loads(line) for line in path.open()]
    assert [each.prompt for each in prompts] == [each["prompt"] for each in published]
    for each, original in itertools.zip_longest(prompts, published):
        texts = dict.fromkeys(answer["answer"].strip() for answer in original["answers"])
        assert [answer.answer.strip() for answer in each.answers] == list(texts)
    assert counts["answers"]["read"] == 700
    assert read_rows(path, Prompt, quarantine=tmp_path / "q")[0].answers == prompts[0].answers
