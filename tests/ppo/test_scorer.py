"""Scores of one reward model or several, here or served, and how they become one number."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    PreTrainedTokenizerFast,
)

from reward_server import Server, classified
from starling.base.errors import InputError
from starling.data.records import Message
from starling.models.reward_model import RewardModel, Scored
from starling.ppo.config import PpoSection, RewardSource
from starling.ppo.scorer import Scorer
from tiny import sharpen, tiny_policy


def scored(question, answer, **options):
    messages = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Scored(messages, **options)


ITEMS = [scored("Hi", "No."), scored("What is 2 + 2?", "4"), scored("Hi", "It is", finished=False)]


def source(folder, **options):
    return RewardSource(model=str(folder), **options)


def load(*sources, **section):
    return Scorer.load(sources, PpoSection(reward_models=sources, **section), device="cpu")


def serving(folder):
    """What a server of the folder answers, by transformers' classifier."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    @torch.no_grad()
    def answer(body, n):
        return classified([float(model(torch.tensor([ids])).logits) for ids in body["input"]])

    return answer


@pytest.fixture(scope="module")
def folders(policy_folder, tmp_path_factory):
    """Three reward models of one policy, each with its own head and normalisation."""
    made = []
    for seed, (mean, std) in enumerate(((0.5, 2.0), (-1.0, 0.25), (3.0, 1.0))):
        model = RewardModel.from_language_model(str(policy_folder), seed=seed)
        made.append(tmp_path_factory.mktemp("rewards") / f"model-{seed}")
        dataclasses.replace(model, mean=mean, std=std).save(made[-1])
    return made


@pytest.fixture(scope="module")
def apart(folders):
    """The normalised score of each item by each model, from the models alone."""
    return [RewardModel.load(str(folder)).score(ITEMS).tolist() for folder in folders]


@pytest.mark.parametrize("combine", ["mean", "minimum", "pessimistic"])
def test_one_models_scores_are_its_own_to_the_bit(folders, combine):
    scores = load(source(folders[1], weight=0.3), combine=combine).score(ITEMS)
    assert torch.equal(scores.combined, scores.each[0])
    assert torch.equal(scores.each, RewardModel.load(str(folders[1])).score(ITEMS)[None])


def test_three_models_combine_as_the_recipe_says(folders, apart):
    sources = [source(folder) for folder in folders]
    columns = list(zip(*apart, strict=True))
    for combine, expected in (
        ("mean", [sum(column) / 3 for column in columns]),
        ("minimum", [min(column) for column in columns]),
        ("pessimistic", [sum(c) / 3 - 1.5 * deviation(c) for c in columns]),
    ):
        scores = load(*sources, combine=combine, pessimism=1.5).score(ITEMS)
        torch.testing.assert_close(scores.each, torch.tensor(apart))
        torch.testing.assert_close(scores.combined, torch.tensor(expected))


def deviation(column):
    mean = sum(column) / len(column)
    return math.sqrt(sum((value - mean) ** 2 for value in column) / len(column))


def test_weights_are_shares_of_the_mean(folders, apart):
    sources = [source(f, weight=w) for f, w in zip(folders, (1.0, 2.0, 5.0), strict=True)]
    expected = [(a + 2 * b + 5 * c) / 8 for a, b, c in zip(*apart, strict=True)]
    torch.testing.assert_close(load(*sources).score(ITEMS).combined, torch.tensor(expected))


def test_numbers_of_three_servers_combine_as_by_hand(reward_folder, tmp_path):
    """Raw 6, 2, 1 with mean 2 and std 2 are 2, 0, -0.5; their mean 0.5, weighted 1:1:2 0.25."""
    folder = tmp_path / "model"
    dataclasses.replace(RewardModel.load(str(reward_folder)), mean=2.0, std=2.0).save(folder)
    with say(6.0) as six, say(2.0) as two, say(1.0) as one:
        weights = zip((six, two, one), (1.0, 1.0, 2.0), strict=True)
        sources = [source(folder, url=server.url, weight=weight) for server, weight in weights]
        found = {
            combine: load(*sources, combine=combine, pessimism=2.0).score(ITEMS[:1])
            for combine in ("mean", "minimum", "pessimistic")
        }
    assert found["mean"].each.tolist() == [[2.0], [0.0], [-0.5]]
    assert found["mean"].combined.item() == pytest.approx(0.25)
    assert found["minimum"].combined.item() == -0.5
    # Squares about 0.5: 2.25, 0.25, 1; their mean 3.5 / 3.
    assert found["pessimistic"].combined.item() == pytest.approx(0.5 - 2 * math.sqrt(3.5 / 3))


def say(number):
    return Server(lambda body, n: classified([number] * len(body["input"])))


def test_a_served_model_and_one_here_score_as_two_here(folders):
    here = load(source(folders[0]), source(folders[1]), combine="minimum").score(ITEMS)
    with Server(serving(folders[1])) as server:
        sources = source(folders[0]), source(folders[1], url=server.url, served_model="m")
        found = load(*sources, combine="minimum").score(ITEMS)
    torch.testing.assert_close(found.each, here.each)
    torch.testing.assert_close(found.combined, here.combined)
    assert {body["model"] for body in server.bodies} == {"m"}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A reward model of another vocabulary, whose tokens are bytes and which speaks ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("stranger") / "model"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        sliding_window=None,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=258,
    )
    model = MistralForSequenceClassification(config)
    sharpen(model)
    model.save_pretrained(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | {
        "starling_chat_format": "chatml",
        "starling_reward_mean": 0.25,
        "starling_reward_std": 4.0,
    }
    path.write_text(json.dumps(settings))
    return folder


def chatml(item):
    text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in item.messages)
    return text.removesuffix("\n" if item.finished else "<|im_end|>\n")


@torch.no_grad()
def test_a_reward_model_of_another_tokenizer_and_template_reads_the_text_anew(stranger):
    model = AutoModelForSequenceClassification.from_pretrained(stranger).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(stranger)
    ids = [tokenizer(chatml(item))["input_ids"] for item in ITEMS]
    policy = tiny_policy().codec
    for item, theirs in zip(ITEMS, ids, strict=True):
        assert policy.encode(item.messages, finished=item.finished).ids != theirs
    raw = [float(model(torch.tensor([row])).logits) for row in ids]
    expected = torch.tensor([(value - 0.25) / 4.0 for value in raw])
    scorer = load(source(stranger))
    torch.testing.assert_close(scorer.score(ITEMS).combined, expected)
    torch.testing.assert_close(scorer.models[0].score(ITEMS), expected)
    with Server(serving(stranger)) as server:
        served = load(source(stranger, url=server.url)).score(ITEMS).combined
    assert sorted(server.bodies[-1]["input"]) == sorted(ids)
    torch.testing.assert_close(served, expected)


def test_models_of_two_tokenizers_score_together(stranger, folders, apart):
    other = RewardModel.load(str(stranger)).score(ITEMS)
    found = load(source(folders[2]), source(stranger)).score(ITEMS)
    torch.testing.assert_close(found.each, torch.stack([torch.tensor(apart[2]), other]))
    torch.testing.assert_close(found.combined, found.each.mean(dim=0))


def test_the_key_of_a_served_model_is_its_own(folders, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "sesame")
    with Server(serving(folders[0])) as server:
        load(source(folders[0], url=server.url, api_key_env="REWARD_KEY")).score(ITEMS)
    assert set(server.keys) == {"Bearer sesame"}


def test_a_server_that_recovers_costs_nothing(folders):
    right = serving(folders[0])
    busy = 500, '{"error": {"message": "loading"}}', {"retry-after-ms": "1"}
    with Server(right) as server:
        scorer = load(source(folders[0], url=server.url))
        num_before = len(server.bodies)
        server.answer = lambda body, n: busy if n < num_before + 2 else right(body, n)
        found = scorer.score(ITEMS).combined
    assert len(server.bodies) == num_before + 3
    torch.testing.assert_close(found, RewardModel.load(str(folders[0])).score(ITEMS))


def test_a_server_that_died_is_an_input_error_and_scores_again_once_it_is_back(folders):
    busy = 503, '{"error": {"message": "going down"}}', {"retry-after-ms": "1"}
    with Server(serving(folders[0])) as server:
        scorer = load(source(folders[1]), source(folders[0], url=server.url))
        before = scorer.score(ITEMS)
        server.answer = lambda body, n: busy
        with pytest.raises(InputError, match=r"answered 503: .*going down.*then run this again"):
            scorer.score(ITEMS)
        server.answer = serving(folders[0])
        again = scorer.score(ITEMS)
    assert torch.equal(again.combined, before.combined)
    with pytest.raises(InputError, match=r"no server answers at http://127\.0\.0\.1"):
        load(source(folders[0], url=server.url))


def test_scores_are_given_for_none(folders):
    scores = load(source(folders[0]), source(folders[1])).score([])
    assert scores.combined.shape == (0,)
    assert scores.each.shape == (2, 0)
