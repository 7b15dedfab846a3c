"""The reward stage on a toy that can be learned: answers with a certain word win."""

import json
import random

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from starling.base.context import single_process_context
from starling.base.errors import DataError
from starling.data.records import Message, RankingRow
from starling.models.causal_lm import load_language_model, save_model
from starling.models.reward_model import RewardModel, Scored
from starling.reward.config import RewardInputs, RewardSection
from starling.reward.dataset import RankedRow, encode_rankings
from starling.reward.train import ranking_loss, run
from tiny import tiny_policy_folder, tiny_reward_folder

SECTION = RewardSection(lr=1e-2, batch=8, epochs=3, held_out=0.2, checkpoint_every=1000)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_policy_folder(tmp_path_factory.mktemp("base") / "policy")


def toy_rows(count):
    """Three answers each: with "yes", with neither, with "no", in any order of presentation."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        words = rng.sample(["cat", "small", "to the", "say", "or"], 3)
        answers = [
            {"answer": f"{words[0]} {extra}".strip(), "model": "m", "rank": float(rank)}
            for rank, extra in enumerate(("yes", "", "no"), start=1)
        ]
        rng.shuffle(answers)
        question = {"role": "user", "content": f"{words[1]} {number} {words[2]}"}
        rows.append({"id": f"row-{number}", "messages": [question], "answers": answers})
    return rows


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(policy, tmp_path_factory):
    """Folder of a finished reward stage, its summary and the file of its rankings."""
    out = tmp_path_factory.mktemp("reward")
    rankings = written(out.parent / "rankings.jsonl", toy_rows(80))
    context = single_process_context(1, seed=0)
    return out, run(SECTION, RewardInputs(rankings, str(policy)), out, context), rankings


def test_the_loss_falls_from_uniform_and_held_out_pairs_come_out_in_order(trained):
    out, summary, _ = trained
    losses = [json.loads(line)["reward/loss"] for line in (out / "metrics.jsonl").open()]
    # Three answers, equal scores: ln(3!) / 2.
    assert losses[0] == pytest.approx(0.896, abs=0.2)
    assert sum(losses[-5:]) / 5 < 0.3
    assert summary.figures["pair_accuracy"]["mean"] > 0.9
    assert summary.figures["pair_accuracy"]["n"] == 3 * 16
    assert summary.figures["rankings"] == {"train": 64, "held_out": 16}


def test_every_training_row_is_seen_once_an_epoch(trained):
    # 64 rows in batches of 8, three times.
    out, _, _ = trained
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 24


def test_the_word_wins_and_loses_outside_the_data_too(trained):
    out, _, _ = trained
    question = Message(role="user", content="quite another question")
    scores = RewardModel.load(str(out / "model")).score(
        Scored((question, Message(role="assistant", content=text)))
        for text in ("the cat yes", "the cat", "the cat no")
    )
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)


def test_stored_normalisation_makes_held_out_scores_mean_zero_and_deviation_one(trained):
    out, _, rankings = trained
    reward_model = RewardModel.load(str(out / "model"))
    rows = encode_rankings(
        [RankingRow.model_validate_json(line) for line in rankings.open()],
        reward_model,
        held_out=SECTION.held_out,
        seed=0,
    )
    plain = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    with torch.no_grad():
        raw = torch.cat(
            [plain(torch.tensor([ids])).logits[0] for row in rows.held_out for ids in row.sequences]
        )
    stored = json.loads((out / "model" / "config.json").read_text())
    scores = (raw - stored["starling_reward_mean"]) / stored["starling_reward_std"]
    assert len(scores) == 48
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_loss_and_gradient_are_those_of_scoring_each_answer_by_itself(policy, tmp_path):
    folder = tiny_reward_folder(tmp_path / "reward", policy)
    rng = random.Random(0)
    rows = [
        RankedRow(
            id=str(row),
            # Of very different lengths, so that a batch does not fit one forward.
            sequences=tuple(
                tuple(rng.randrange(5, 300) for _ in range(length)) for length in lengths
            ),
            ranks=ranks,
            answer_chars=(1, 1),
        )
        for row, (lengths, ranks) in enumerate(
            [((240, 3), (1, 2)), ((17, 230), (2, 1)), ((250, 245), (1, 2)), ((4, 9), (2, 1))] * 2
        )
    ]
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    losses = []
    for row in rows:
        first, second = (plain(torch.tensor([list(ids)])).logits[0, 0] for ids in row.sequences)
        margin = first - second if row.ranks == (1, 2) else second - first
        losses.append(-torch.nn.functional.logsigmoid(margin))
    torch.stack(losses).mean().backward()
    reward_model = RewardModel.load(str(folder))
    loss = ranking_loss(reward_model, rows)
    loss.mean().backward()
    assert_close(loss, torch.stack(losses), rtol=1e-5, atol=1e-5)
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    got = {name: parameter.grad for name, parameter in reward_model.model.named_parameters()}
    # Gradients of sharpened weights, summed in another order.
    assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_no_number_names_the_rankings_it_came_from(policy, tmp_path):
    loaded = load_language_model(str(policy))
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight.fill_(float("nan"))
    save_model(tmp_path / "broken", loaded.model, loaded.codec)
    rankings = written(tmp_path / "rankings.jsonl", toy_rows(5))
    section = RewardSection(batch=4, held_out=0.2)
    inputs = RewardInputs(rankings, str(tmp_path / "broken"))
    with pytest.raises(DataError, match=r"the loss is nan at step 1.*(row-\d, ){3}row-\d;"):
        run(section, inputs, tmp_path / "out", single_process_context(1, seed=0))


def test_one_score_for_everything_is_refused(policy, tmp_path):
    # Two rows, equal answers: no score can tell them apart.
    rows = toy_rows(2)
    for row in rows:
        for answer in row["answers"]:
            answer["answer"] = "same"
        row["messages"][0]["content"] = "same"
    rows[1]["messages"][0]["content"] = "other"
    rankings = written(tmp_path / "rankings.jsonl", rows)
    section = RewardSection(batch=1, held_out=0.5)
    with pytest.raises(DataError, match="the same score"):
        run(section, RewardInputs(rankings, str(policy)), tmp_path / "out",
            single_process_context(1, seed=0))  # fmt: skip
