"""Pair files in the shapes that people publish them in, and rows that are none."""

import json

import pytest

from starling.base.errors import DataError
from starling.data.reward_pairs import RewardPair
from starling.data.rows import read_rows

ASKED = {"role": "user", "content": "q"}


def said(text):
    return {"role": "assistant", "content": text}


def read(tmp_path, *rows, good=0):
    """The rows of a file of these and so many good ones."""
    path = tmp_path / "pairs.jsonl"
    rows = [*rows, *[{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(good)]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(path, RewardPair, quarantine=tmp_path / "quarantine.jsonl")


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("q", "yes", "no"),
        ([ASKED], "yes", "no"),
        ("q", [said("yes")], [said("no")]),
        ([ASKED], [said("yes")], [said("no")]),
        ("q", [ASKED, said("yes")], [ASKED, said("no")]),
        ([ASKED], [ASKED, said("yes")], [ASKED, said("no")]),
        (None, [ASKED, said("yes")], [ASKED, said("no")]),
        ("q", [ASKED, said("yes")], "no"),
        ([ASKED | {"name": "x"}], [ASKED, said("yes")], "no"),
    ],
)
def test_every_shape_gives_the_same_two_conversations(tmp_path, prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "id": 7, "other": [1]}
    (found,) = read(tmp_path, row | {"subset": "s"})
    assert [turn.model_dump() for turn in found.chosen.messages] == [ASKED, said("yes")]
    assert [turn.model_dump() for turn in found.rejected.messages] == [ASKED, said("no")]
    assert (found.id, found.subset) == ("7", "s")


def test_a_prompt_may_have_several_turns_and_a_system_message(tmp_path):
    system = {"role": "system", "content": "be kind"}
    turns = [system, ASKED, said("so far"), {"role": "user", "content": "and?"}]
    (found,) = read(tmp_path, {"prompt": turns, "chosen": "yes, more", "rejected": "no"})
    assert [turn.role for turn in found.chosen.messages] == [turn["role"] for turn in turns] + [
        "assistant"
    ]
    # What came before counts on both sides.
    assert found.more_chars == len("yes, more") - len("no")
    assert found.subset is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "yes"}, "rejected: Field required"),
        ({"prompt": "q", "chosen": "yes", "rejected": " "}, "an answer is empty"),
        ({"prompt": "q", "chosen": "yes", "rejected": "yes"}, "chosen and rejected are the same"),
        ({"prompt": "", "chosen": "yes", "rejected": "no"}, "a user message is empty"),
        ({"chosen": "yes", "rejected": "no"}, "must be the user's"),
        ({"prompt": 3, "chosen": "yes", "rejected": "no"}, "must be the user's"),
        ({"prompt": [3], "chosen": "yes", "rejected": "no"}, "chosen.messages.0"),
        ({"prompt": [3], "chosen": [ASKED, said("a")], "rejected": "no"}, "row's prompt"),
        ({"prompt": "q", "chosen": [ASKED, 3], "rejected": "no"}, "chosen.messages.1"),
        ({"prompt": "q", "chosen": [ASKED], "rejected": "no"}, "the last message is the user's"),
        ({"prompt": "q", "chosen": 3, "rejected": "no"}, "chosen.messages"),
        (
            {"prompt": "other", "chosen": [ASKED, said("yes")], "rejected": "no"},
            "a whole conversation does not hold the row's prompt",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_put_aside_with_its_reason(tmp_path, row, reason):
    assert len(read(tmp_path, row, good=100)) == 100
    (aside,) = map(json.loads, (tmp_path / "quarantine.jsonl").open())
    assert reason in aside["reason"]
    assert aside["line"] == 1


def test_a_file_of_bad_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="1 of 2 rows"):
        read(tmp_path, {"prompt": "q", "chosen": "yes"}, good=1)


def test_parquet_pairs_are_read_alike(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = pyarrow.Table.from_pylist(
        [{"prompt": "q", "chosen": "yes", "rejected": "no", "subset": "s", "id": 1, "extra": 0}]
    )
    parquet.write_table(table, tmp_path / "pairs.parquet")
    (found,) = read_rows(
        tmp_path / "pairs.parquet", RewardPair, quarantine=tmp_path / "quarantine.jsonl"
    )
    assert (found.chosen.messages[-1].content, found.subset, found.id) == ("yes", "s", "1")


@pytest.mark.real_data
def test_the_published_pairs_of_llmbar_are_all_read(test_data, tmp_path):
    path = test_data / "reward_pairs" / "llmbar.jsonl"
    found = read_rows(path, RewardPair, quarantine=tmp_path / "quarantine.jsonl")
    assert len(found) == 419
    assert sum(pair.subset == "llmbar-natural" for pair in found) == 100
