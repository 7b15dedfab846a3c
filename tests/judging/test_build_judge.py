"""From the recipe's section to a judge."""

import pytest
from pydantic import ValidationError

from starling.base.context import Context
from starling.base.errors import InputError
from starling.data.records import Message
from starling.judging.build import build_judge
from starling.judging.config import JudgeSection
from starling.judging.judge import Comparison, Unparsed
from starling.judging.kwise import present
from starling.judging.recorded import Recorded
from starling.judging.rubric_responder import RubricResponder
from starling.models.causal_lm import load_language_model
from starling.models.endpoint import Endpoint

CONTEXT = Context(rank=0, world_size=1, device="cpu", threads=1)


def build(ledger=None, **fields):
    return build_judge(JudgeSection(**fields), seed=3, ledger=ledger, context=CONTEXT)


def test_an_endpoint_is_recorded_where_there_is_a_ledger(tmp_path):
    with build(tmp_path / "calls.sqlite", url="http://h/v1", model="m") as judge:
        assert isinstance(judge.responder, Recorded)
        assert judge.responder.identity == "http://h/v1 m"
    assert isinstance(build(url="http://h/v1", model="m").responder, Endpoint)


def test_a_rubric_is_never_recorded_because_checks_are_no_part_of_a_call(tmp_path):
    judge = build(tmp_path / "calls.sqlite", kind="rubric", noise=0.1, position_bias=0.2)
    assert isinstance(judge.responder, RubricResponder)
    assert judge.responder.identity == "rubric seed=3 noise=0.1 position_bias=0.2"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"url": "http://h/v1"}, "model: is missing"),
        ({"model": "m"}, "url: is missing"),
        ({"kind": "local"}, "model: is missing"),
    ],
)
def test_a_judge_without_what_it_needs_is_refused_by_the_key_that_is_missing(fields, missing):
    with pytest.raises(ValidationError, match=missing):
        JudgeSection(**fields)


def test_a_key_that_is_not_set_is_found_before_any_call(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(InputError, match="JUDGE_KEY"):
        build(url="http://h/v1", model="m", api_key_env="JUDGE_KEY")


@pytest.mark.parametrize(
    "url",
    ["http://me:sk-1@h/v1", "http://h/v1?api_key=sk-1", "http://h/v1#access_token=sk-1", "h:8", ""],
)
def test_a_section_with_a_key_in_its_url_is_refused_where_the_recipe_is_read(url):
    with pytest.raises(ValidationError) as caught:
        JudgeSection(url=url, model="m")
    assert "sk-1" not in str(caught.value.errors()[0]["msg"])


def test_a_served_model_whose_tokenizer_is_known_has_its_questions_counted(policy_folder):
    judge = build(
        url="http://127.0.0.1:9/v1", model="m", tokenizer=str(policy_folder), context_length=64
    )
    asked = Comparison("a", (Message(role="user", content="Name a fruit."),), ("plum", "pear"))
    [verdict] = judge.rank([asked])
    codec = load_language_model(str(policy_folder)).codec
    shown = present(asked, 3)
    length = len(codec.encode(shown.messages, generation_prompt=True).ids)
    assert isinstance(verdict, Unparsed)
    assert f"{length} tokens" in verdict.reason
    assert "about" not in verdict.reason
