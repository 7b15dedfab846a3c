"""From ranking rows to ids: the split by prompt, the cuts, and the format of the answers."""

import dataclasses
import logging

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from starling.base.errors import DataError
from starling.base.jsonl import read_records
from starling.data.records import RankingRow
from starling.models.reward_model import RewardModel
from starling.reward.dataset import encode_rankings
from tiny import tiny_policy_folder, tiny_reward_folder

VARIANTS = (str, str.upper, str.lower, "  {}\n".format, "[INST] {} [/INST]".format, "**{}**".format)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    return tiny_reward_folder(folder / "reward", tiny_policy_folder(folder / "policy"))


@pytest.fixture(scope="module")
def reward_model(reward_folder):
    return RewardModel.load(str(reward_folder))


def ranking(prompt, *answers, id="", **fields):
    """A row whose answers, best first, are texts or (text, finish_reason)."""
    pairs = [answer if isinstance(answer, tuple) else (answer, "stop") for answer in answers]
    return RankingRow.model_validate(
        {
            "id": id,
            "messages": [{"role": "user", "content": prompt}],
            "answers": [
                {"answer": text, "model": "m", "rank": float(rank), "finish_reason": reason}
                for rank, (text, reason) in enumerate(pairs, start=1)
            ],
        }
        | fields
    )


def test_answers_are_written_as_the_chat_template_writes_them(reward_model, reward_folder):
    answers = {"say it": ("yes", "no"), "again": ("no way", "a cat")}
    rankings = [ranking(prompt, *texts, id=prompt) for prompt, texts in answers.items()]
    rows = encode_rankings(rankings, reward_model, held_out=0.5, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    for row in rows.train + rows.held_out:
        expected = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row.id}, {"role": "assistant", "content": answer}],
                tokenize=False,
            )
            for answer in answers[row.id]
        ]
        assert [tokenizer.decode(ids) for ids in row.sequences] == expected


def test_no_prompt_is_on_both_sides_and_every_row_is_on_one(reward_model):
    rankings = [ranking(f"prompt {n}", "a", "b", id=str(n)) for n in range(20)]
    rows = encode_rankings(rankings, reward_model, held_out=0.25, seed=3)
    train, held_out = ({row.id for row in side} for side in (rows.train, rows.held_out))
    assert len(held_out) == 5
    assert train | held_out == {str(n) for n in range(20)}
    assert not train & held_out
    assert (rows.num_answers, rows.num_cut) == (40, 0)


def test_rows_of_the_same_prompt_go_to_the_same_side_whatever_case_and_spacing(reward_model):
    copies = ("Name a {}.", "name  a {}. ", "NAME A {}.")
    rankings = [
        ranking(text.format(animal), "x", "y", id=f"{animal}/{number}")
        for number, text in enumerate(copies)
        for animal in ("cat", "dog", "hen", "fox", "owl")
    ]
    for seed in range(5):
        rows = encode_rankings(rankings, reward_model, held_out=0.4, seed=seed)
        sides = [{row.id.split("/")[0] for row in side} for side in (rows.train, rows.held_out)]
        assert not sides[0] & sides[1]
        assert (len(rows.train), len(rows.held_out)) == (9, 6)


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from(VARIANTS)), min_size=2, max_size=40),
    st.sampled_from([0.1, 0.3, 0.6]),
    st.integers(0, 3),
)
def test_whatever_rows_repeat_a_prompt_no_prompt_is_on_both_sides(reward_model, drawn, share, seed):
    assume(len({number for number, _ in drawn}) > 1)
    rankings = [
        ranking(vary(f"Tell me of number {number}."), "x", "y", id=f"{number}/{place}")
        for place, (number, vary) in enumerate(drawn)
    ]
    rows = encode_rankings(rankings, reward_model, held_out=share, seed=seed)
    sides = [{row.id.split("/")[0] for row in side} for side in (rows.train, rows.held_out)]
    assert all(sides)
    assert not sides[0] & sides[1]
    ids = sorted(row.id for row in rows.train + rows.held_out)
    assert ids == sorted(row.id for row in rankings)


def test_held_out_prompts_are_not_a_stretch_of_a_sorted_file(reward_model):
    rankings = [ranking(f"prompt {n:03}", "a", "b", id=f"{n:03}") for n in range(100)]
    for seed in range(3):
        rows = encode_rankings(rankings, reward_model, held_out=0.2, seed=seed)
        places = sorted(int(row.id) for row in rows.held_out)
        assert len(places) == 20
        # 20 places drawn from 100 leave a quarter empty once in 500 draws; a head or a tail leaves
        # three of them empty.
        quarters = [sum(place // 25 == quarter for place in places) for quarter in range(4)]
        assert all(quarters), f"seed {seed}: {places}"


@pytest.mark.real_data
def test_real_nectar_rows_are_split_by_prompt(reward_model, test_data, tmp_path):
    path = test_data / "nectar" / "rankings.jsonl"
    rankings = read_records(path, RankingRow, quarantine=tmp_path / "quarantine.jsonl")
    rankings = [row for row in rankings if len(row.messages) == 1]
    shouted = [
        ranking(row.messages[0].content.upper() + " !", "a", "b", id=row.id) for row in rankings
    ]
    assert len(shouted) > 30
    rows = encode_rankings(rankings + shouted, reward_model, held_out=0.1, seed=0)
    train, held_out = ([row.id for row in side] for side in (rows.train, rows.held_out))
    assert not set(train) & set(held_out)
    assert all(side.count(name) == 2 for side in (train, held_out) for name in side)


def test_the_split_depends_on_the_seed_and_on_nothing_else(reward_model):
    rankings = [ranking(f"prompt {n}", "a", "b", id=str(n)) for n in range(12)]
    splits = [
        tuple(row.id for row in encode_rankings(rankings, reward_model, held_out=0.5, seed=s).train)
        for s in (0, 0, 1, 2)
    ]
    assert splits[0] == splits[1]
    assert len(set(splits)) > 1


def test_ranks_follow_their_answers_and_null_stays_unranked(reward_model):
    answers = [
        {"answer": "third", "model": "m", "rank": 4.0},
        {"answer": "first", "model": "m", "rank": 1.0},
        {"answer": "not", "model": "m"},
        {"answer": "first too", "model": "m", "rank": 1.0},
        {"answer": "second", "model": "m", "rank": 3.0},
    ]
    rankings = [ranking("p", "a", "b", id="it", answers=answers), ranking("q", "a", "b")]
    rows = encode_rankings(rankings, reward_model, held_out=0.5, seed=0)
    row = next(row for row in rows.train + rows.held_out if row.id == "it")
    assert row.ranks == (3, 1, None, 1, 2)
    assert row.answer_chars == (5, 5, 3, 9, 6)


def test_long_answers_cut_from_the_right_are_counted_and_have_no_end(reward_model, caplog):
    short = dataclasses.replace(reward_model, max_length=40, truncate="right")
    rankings = [ranking("p", "ok", "x" * 80, "fine"), ranking("q", "y" * 90, "ok")]
    with caplog.at_level(logging.WARNING):
        rows = encode_rankings(rankings, short, held_out=0.5, seed=0)
    assert (rows.num_cut, rows.num_answers) == (2, 5)
    assert "2 of 5 answers were cut to 40 tokens" in caplog.text
    end = reward_model.codec.end_id
    for row in rows.train + rows.held_out:
        for ids, chars in zip(row.sequences, row.answer_chars, strict=True):
            was_cut = chars >= 80
            assert (len(ids) == 40) == was_cut
            assert (ids[-1] == end) == (not was_cut)


def test_long_answers_cut_from_the_left_keep_their_own_end(reward_model):
    short = dataclasses.replace(reward_model, max_length=30, truncate="left")
    rankings = [ranking("p " * 40, "ok", "no"), ranking("q", "ok", "no")]
    rows = encode_rankings(rankings, short, held_out=0.5, seed=0)
    assert rows.num_cut == 2
    (cut,) = [row for row in rows.train + rows.held_out if len(row.sequences[0]) == 30]
    text = reward_model.codec.tokenizer.decode(cut.sequences[0])
    assert text.endswith("ok")
    assert cut.sequences[0][-1] == reward_model.codec.end_id


def test_an_answer_that_its_model_did_not_finish_has_no_end(reward_model):
    rankings = [
        ranking("p", "done", ("cut of", "length"), id="it"),
        ranking("q", "a", "b"),
    ]
    rows = encode_rankings(rankings, reward_model, held_out=0.5, seed=0)
    row = next(row for row in rows.train + rows.held_out if row.id == "it")
    end = reward_model.codec.end_id
    assert [ids[-1] == end for ids in row.sequences] == [True, False]


def test_rankings_of_a_single_prompt_cannot_be_split(reward_model):
    rankings = [ranking("same", "a", "b"), ranking("Same ", "c", "d")]
    with pytest.raises(DataError, match=r"1 different prompt\(s\).*leaves none to train on"):
        encode_rankings(rankings, reward_model, held_out=0.1, seed=0)
