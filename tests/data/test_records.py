"""What a row of a data file may hold, and how its ranks are read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from starling.data.records import (
    Conversation,
    Message,
    Prompt,
    Question,
    RankingRow,
    dense_ranks,
    split_nectar_prompt,
)


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


USER = ("user", "hi")
ASSISTANT = ("assistant", "hello")
SYSTEM = ("system", "be brief")


def ranking(answers, **columns):
    return RankingRow.model_validate({"messages": turns(USER), "answers": answers} | columns)


def answers(*ranks):
    return [{"answer": f"a{n}", "model": f"m{n}", "rank": rank} for n, rank in enumerate(ranks)]


@pytest.mark.parametrize(
    ("given_ranks", "expected"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([3, 1, 2], [3, 1, 2]),
        ([2, 1, 2, 3], [2, 1, 2, 3]),
        ([2, 1, 2, 4], [2, 1, 2, 3]),
        ([1, 1, 3], [1, 1, 2]),
        ([1, 1, 2], [1, 1, 2]),
        ([1, 1, 1, 4, 4, 6], [1, 1, 1, 2, 2, 3]),
        ([1, 1], [1, 1]),
        ([None, 2, 1], [None, 2, 1]),
        ([1, None, 1, 3], [1, None, 1, 2]),
        ([1.0, 2.0], [1, 2]),
    ],
)
def test_dense_and_competition_numbering_become_dense(given_ranks, expected):
    assert ranking(answers(*given_ranks)).ranks == expected


@pytest.mark.parametrize(
    "impossible",
    [[0, 1], [2, 3], [1, 3], [1, 1, 4], [1, 2, 2, 5], [1, 1.5], [-1, 1], [1, 2, 4, 4], [2], []],
)
def test_ranks_that_no_ranking_has_are_refused(impossible):
    with pytest.raises(ValueError, match="neither densely|no answer is ranked"):
        dense_ranks(impossible)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.randoms())
def test_any_ordering_read_from_either_numbering_keeps_who_beats_whom(levels, random):
    dense = [1 + len({other for other in levels if other < level}) for level in levels]
    competition = [1 + sum(other < level for other in levels) for level in levels]
    assert dense_ranks([float(rank) for rank in competition]) == dense
    assert dense_ranks([float(rank) for rank in dense]) == dense


@pytest.mark.parametrize("rank", [float("nan"), float("inf"), "1", True])
def test_a_rank_that_is_no_number_is_refused(rank):
    with pytest.raises(ValidationError, match="rank"):
        ranking([{"answer": "a", "model": "m", "rank": rank}, *answers(1)])


def test_a_ranking_of_one_answer_is_refused():
    with pytest.raises(ValidationError, match=r"1 answer\(s\)"):
        ranking(answers(1))


@pytest.mark.parametrize("empty", ["", " \n\t"])
def test_an_empty_answer_is_refused(empty):
    with pytest.raises(ValidationError, match="an answer is empty"):
        ranking([*answers(1), {"answer": empty, "model": "m", "rank": 2}])


def test_a_ranking_where_nothing_is_ranked_is_refused():
    with pytest.raises(ValidationError, match="no answer is ranked"):
        ranking(answers(None, None))


def test_columns_of_other_people_are_ignored_and_a_missing_rank_is_null():
    row = ranking([*answers(1), {"answer": "b", "model": "m"}], their_column=3)
    assert row.ranks == [1, None]
    assert not hasattr(row, "their_column")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("\n\nHuman: hi\n\nAssistant: ", [USER]),
        ("\n\nHuman: hi\n\nAssistant:", [USER]),
        (
            "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and\nnow? \n\nAssistant: ",
            [USER, ASSISTANT, ("user", "and\nnow?")],
        ),
        ("\n\nHuman: say Human: twice\n\nAssistant: ", [("user", "say Human: twice")]),
    ],
)
def test_a_nectar_prompt_is_split_into_its_turns(prompt, expected):
    found = [(message.role, message.content) for message in split_nectar_prompt(prompt)]
    assert found == expected


@pytest.mark.parametrize(
    "prompt",
    ["hi", "Human: hi\n\nAssistant: ", "\n\nHuman: hi", "\n\nHuman: hi\n\nAssistant: hello", ""],
)
def test_a_string_that_is_no_waiting_nectar_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="a Nectar prompt"):
        split_nectar_prompt(prompt)


def test_messages_count_over_the_prompt_string():
    row = ranking(answers(1, 2), prompt="\n\nHuman: other\n\nAssistant: ")
    assert row.messages == (Message(role="user", content="hi"),)


def test_a_ranking_without_messages_and_prompt_is_refused():
    with pytest.raises(ValidationError, match="messages is empty or missing"):
        RankingRow.model_validate({"answers": answers(1, 2)})


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages is empty"),
        ([SYSTEM], "last message is the system's"),
        ([USER, ASSISTANT], "must be the user's"),
        ([USER, USER], "turns alternate"),
        ([ASSISTANT, USER], "turns alternate"),
        ([USER, SYSTEM, USER], "turns alternate"),
        ([("user", " \n")], "a user message is empty"),
        ([("tool", "x"), USER], "role"),
    ],
)
def test_a_prompt_that_does_not_wait_for_an_answer_is_refused(messages, problem):
    with pytest.raises(ValidationError, match=problem):
        Prompt.model_validate({"messages": turns(*messages)})


def test_a_conversation_ends_with_the_assistant():
    assert Conversation.model_validate({"messages": turns(SYSTEM, USER, ASSISTANT)})
    with pytest.raises(ValidationError, match="must be the assistant's"):
        Conversation.model_validate({"messages": turns(USER)})


def test_an_id_follows_roles_and_texts_and_a_given_one_stays():
    ids = {
        Prompt.model_validate({"messages": turns(*messages)}).id
        for messages in ([USER], [("user", "hi ")], [SYSTEM, USER], [("system", "be"), USER])
    }
    assert len(ids) == 4
    assert Prompt.model_validate({"messages": turns(USER)}).id in ids
    assert Prompt.model_validate({"messages": turns(USER), "id": "7"}).id == "7"


def test_a_question_has_a_rubric_for_every_turn_or_none():
    fields = {"id": "q", "category": "c", "turns": ["one", "two"]}
    assert Question.model_validate(fields | {"checks": [{}, {}]}).turns == ("one", "two")
    with pytest.raises(ValidationError, match="2 turns but 1 checks"):
        Question.model_validate(fields | {"checks": [{}]})
    with pytest.raises(ValidationError, match="a turn is empty"):
        Question.model_validate(fields | {"turns": ["one", " "]})


def test_a_record_is_frozen():
    with pytest.raises(ValidationError):
        Message(role="user", content="hi").content = "other"


NECTAR = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant: "


def test_a_nectar_row_is_a_prompt_with_its_answers_and_without_their_ranks():
    prompt = Prompt.model_validate(
        {"prompt": NECTAR, "answers": answers(2.0, 1.0), "source": ["a", "b"], "turns": 2}
    )
    assert [message.content for message in prompt.messages] == ["hi", "hello", "bye"]
    assert [(each.answer, each.model) for each in prompt.answers] == [("a0", "m0"), ("a1", "m1")]
    assert not any(hasattr(each, "rank") for each in prompt.answers)
    assert (prompt.prompt, prompt.source) == (NECTAR, ["a", "b"])


@pytest.mark.parametrize("row", [Prompt, RankingRow])
def test_messages_that_are_null_leave_the_prompt_string_to_speak(row):
    found = row.model_validate({"messages": None, "prompt": NECTAR, "answers": answers(1, 2)})
    assert len(found.messages) == 3


@pytest.mark.parametrize("row", [Prompt, RankingRow])
def test_a_source_may_be_one_name_or_a_list(row):
    fields = {"prompt": NECTAR, "answers": answers(1, 2)}
    assert row.model_validate({**fields, "source": "a"}).source == ["a"]
    assert row.model_validate({**fields, "source": ["a", "b"]}).source == ["a", "b"]
    with pytest.raises(ValidationError, match="source"):
        row.model_validate({**fields, "source": 3})


def test_an_empty_answer_beside_a_prompt_is_no_error_and_one_without_a_model_is():
    fields = {"messages": turns(USER)}
    assert Prompt.model_validate({**fields, "answers": [{"answer": "", "model": "m"}]}).answers
    with pytest.raises(ValidationError, match=r"answers.0.model"):
        Prompt.model_validate({**fields, "answers": [{"answer": "a"}]})


def test_a_conversation_needs_its_messages_whatever_prompt_column_it_has():
    assert Conversation.model_validate({"messages": turns(USER, ASSISTANT), "prompt": 3})
    with pytest.raises(ValidationError, match="messages is empty or missing"):
        Conversation.model_validate({"prompt": NECTAR})


@pytest.mark.parametrize("record", [Prompt, RankingRow, Conversation, Question])
def test_a_whole_number_is_an_id_and_becomes_text(record):
    fields = {"answers": answers(1, 2), "category": "c", "turns": ["one"]}
    fields["messages"] = turns(USER, ASSISTANT) if record is Conversation else turns(USER)
    if record is not Question:
        fields.pop("turns")
    for id, kept in ((81, "81"), (0, "0"), ("81", "81")):
        row = json.dumps({**fields, "id": id})
        assert record.model_validate_json(row).id == kept
    for id in (1.5, True, ["x"]):
        with pytest.raises(ValidationError, match="id"):
            record.model_validate_json(json.dumps({**fields, "id": id}))
