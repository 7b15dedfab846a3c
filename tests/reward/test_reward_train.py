"""The reward stage on a toy that can be learned: answers with a certain word win."""

import dataclasses
import json
import random
import shutil
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from ranks import Settings, on_ranks
from starling.base.context import single_process_context
from starling.base.errors import DataError, ModelError
from starling.data.records import Message, RankingRow
from starling.models.adapters import choose_parameters
from starling.models.causal_lm import load_language_model, save_model
from starling.models.interfaces import Request, Sampling
from starling.models.local import load_local
from starling.models.parallel import parallel
from starling.models.reward_model import RewardModel, Score, Scored
from starling.models.training import adamw, constant
from starling.reward.config import RewardInputs, RewardSection
from starling.reward.dataset import RankedRow, encode_rankings
from starling.reward.normalise import normalised
from starling.reward.train import accumulate, ranking_loss, run, weighted_loss
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


def test_scores_of_the_policys_own_answers_have_mean_zero_and_deviation_one(
    policy, trained, tmp_path
):
    _, summary, rankings = trained
    section = SECTION.model_copy(update={"policy_samples": 64, "policy_tokens": 8})
    context = single_process_context(1, seed=0)
    inputs = RewardInputs(rankings, str(policy), str(policy))
    other = run(section, inputs, tmp_path, context)
    # Other answers to normalise on change no order.
    assert other.figures["pair_accuracy"] == summary.figures["pair_accuracy"]
    reward_model = RewardModel.load(str(tmp_path / "model"))
    # Fresh samples of the same policy: other seeds, the same prompts.
    prompts = [RankingRow.model_validate_json(line) for line in rankings.open()]
    local = load_local(str(policy))
    requests = [
        Request(str(n), prompts[n % 80].messages, Sampling(8, 1.0, 1000 + n)) for n in range(400)
    ]
    scores = reward_model.score(
        Scored(
            (
                *requests[int(reply.request_id)].messages,
                Message(role="assistant", content=reply.text),
            ),
            finished=reply.finish_reason == "stop",
        )
        for reply in local.respond(requests)
    )
    # 64 samples fix the mean to 1/8, the deviation to 1/11.
    assert scores.mean().item() == pytest.approx(0, abs=0.4)
    assert scores.std().item() == pytest.approx(1, abs=0.35)


def test_a_policy_of_unknown_chat_format_is_refused_before_training_unless_it_is_named(
    policy, trained, tmp_path
):
    other = shutil.copytree(policy, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"starling_chat_format": None}))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # nothing shows the format either
        text = (other / name).read_text().replace("<|end_of_turn|>", "<|fim|>")
        (other / name).write_text(text)
    (other / "chat_template.jinja").unlink()
    context, out = single_process_context(1, seed=0), tmp_path / "out"
    out.mkdir()
    inputs = RewardInputs(trained[2], str(policy), str(other))
    section = SECTION.model_copy(update={"policy_samples": 4, "policy_tokens": 4, "epochs": 1})
    with pytest.raises(ModelError, match="chat format is not known"):
        run(section, inputs, out, context)
    assert not (out / "metrics.jsonl").exists()
    run(section, dataclasses.replace(inputs, policy_format="plain"), out, context)
    assert (out / "model").exists()


def test_without_a_policy_the_rankings_own_answers_have_mean_zero_and_deviation_one(trained):
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
            [
                plain(torch.tensor([ids])).logits[0]
                for row in rows.train + rows.held_out
                for ids in row.sequences
            ]
        )
    stored = json.loads((out / "model" / "config.json").read_text())
    scores = (raw - stored["starling_reward_mean"]) / stored["starling_reward_std"]
    assert len(scores) == 240
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
            source=None,
            weight=1.0,
            key=str(row),
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
    model = RewardModel.load(str(folder)).model
    context = single_process_context(1)
    function = partial(weighted_loss, pad_id=0, ranking_loss=ranking_loss(SECTION))
    # One big batch, and many forwards of few tokens.
    for tokens in (10_000, 300):
        model.zero_grad()
        loss = accumulate(parallel(model, function, context), rows, context, tokens)
        assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
        got = {name: parameter.grad for name, parameter in model.named_parameters()}
        # Gradients of sharpened weights, summed in another order.
        assert_close(got, expected, rtol=1e-3, atol=1e-4)


def three_steps(context, folder, settings):
    """Loss and gradient norm of steps on rows of other K and weight, in forwards of few tokens."""
    rng = random.Random(1)
    rows = []
    for number, k in enumerate([2, 5, 3, 4, 2, 3]):
        prompt = tuple(rng.randrange(5, 250) for _ in range(rng.randrange(1, 30)))
        answers = [tuple(rng.randrange(5, 250) for _ in range(1 + place)) for place in range(k)]
        ranked = RankedRow(
            id=str(number),
            sequences=tuple(prompt + answer for answer in answers),
            ranks=tuple(range(1, k + 1)),
            answer_chars=(1,) * k,
            source=None,
            weight=1.0 + number,
            key=str(number),
        )
        rows.append(ranked)
    model = choose_parameters(RewardModel.load(str(folder)).model, settings, seed=2)
    function = partial(weighted_loss, pad_id=0, ranking_loss=ranking_loss(SECTION))
    forward = parallel(
        model, function, context, gradient_checkpointing=settings.gradient_checkpointing
    )
    trainable = adamw("model", model, settings, constant)
    return [(accumulate(forward, rows, context, 60), trainable.step(step)) for step in range(3)]


@pytest.mark.parametrize("settings", [Settings(), Settings("lora", gradient_checkpointing=True)])
def test_two_processes_are_one_in_loss_and_gradient_norm(policy, tmp_path, settings):
    folder = tiny_reward_folder(tmp_path / "reward", policy)
    [alone] = on_ranks(1, three_steps, tmp_path / "ranks", folder, settings)
    both = on_ranks(2, three_steps, tmp_path / "ranks", folder, settings)
    assert both[0] == both[1]
    for step, expected in zip(both[0], alone, strict=True):
        assert step == pytest.approx(expected, rel=1e-5)
    assert alone[2][0] < alone[0][0]


def test_a_loss_that_is_no_number_names_the_rankings_it_came_from(policy, tmp_path):
    loaded = load_language_model(str(policy))
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight.fill_(float("nan"))
    save_model(tmp_path / "broken", loaded.model, loaded.codec)
    rankings = written(tmp_path / "rankings.jsonl", toy_rows(5))
    section = RewardSection(batch=4, held_out=0.2)
    inputs = RewardInputs(rankings, str(tmp_path / "broken"))
    with pytest.raises(
        DataError, match=r"scores are not finite on the rankings (row-\d, ){3}row-\d;"
    ):
        run(section, inputs, tmp_path / "out", single_process_context(1, seed=0))


def test_one_score_for_everything_is_refused(policy, tmp_path):
    loaded = load_language_model(str(policy))
    with torch.no_grad():  # which makes every text alike
        loaded.model.get_input_embeddings().weight.fill_(0)
    save_model(tmp_path / "blind", loaded.model, loaded.codec)
    rankings = written(tmp_path / "rankings.jsonl", toy_rows(4))
    section = RewardSection(batch=1, held_out=0.5, train="head")
    inputs = RewardInputs(rankings, str(tmp_path / "blind"))
    with pytest.raises(DataError, match="the same score to all 12 answers"):
        run(section, inputs, tmp_path / "out", single_process_context(1, seed=0))


def test_scores_that_differ_by_their_rounding_alone_are_one_score(policy, tmp_path, monkeypatch):
    reward_model = RewardModel.load(str(tiny_reward_folder(tmp_path / "reward", policy)))
    row = RankingRow.model_validate_json(json.dumps(toy_rows(1)[0]))
    context = single_process_context(1, seed=0)
    inputs = RewardInputs(tmp_path / "unread", str(policy))

    def normalise(*raw):
        scores = [Score(value, value, 1, False) for value in raw]
        monkeypatch.setattr(RewardModel, "score_each", lambda self, items: scores)
        return normalised(reward_model, [row], inputs, SECTION, context)

    with pytest.raises(DataError, match="the same score"):
        normalise(1000.0, 1000.0001, 1000.0)
    assert normalise(1000.0, 1001.0).std == pytest.approx(0.5)


def test_head_warmup_moves_the_head_alone(policy, tmp_path):
    rankings = written(tmp_path / "rankings.jsonl", toy_rows(40))
    before = load_language_model(str(policy)).model.state_dict()
    section = SECTION.model_copy(update={"epochs": 1, "head_warmup": 4})
    context = single_process_context(1, seed=0)
    run(section, RewardInputs(rankings, str(policy)), tmp_path / "out", context)
    after = RewardModel.load(str(tmp_path / "out" / "model")).model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after.keys() & before.keys())
    assert len(after.keys() & before.keys()) > 10
    section = section.model_copy(update={"head_warmup": 3})
    run(section, RewardInputs(rankings, str(policy)), tmp_path / "more", context)
    moved = RewardModel.load(str(tmp_path / "more" / "model")).model.state_dict()
    assert not all(torch.equal(moved[name], after[name]) for name in after.keys() & before.keys())


@pytest.mark.parametrize("loss", ["bradley-terry", "adjacent-pairs", "best-of-k"])
def test_the_other_losses_learn_the_toy_too(policy, tmp_path, loss):
    rankings = written(tmp_path / "rankings.jsonl", toy_rows(80))
    section = SECTION.model_copy(update={"loss": loss, "centring": 0.01})
    summary = run(
        section, RewardInputs(rankings, str(policy)), tmp_path, single_process_context(1, seed=0)
    )
    assert summary.figures["pair_accuracy"]["mean"] > 0.8


def test_a_rankings_weight_is_how_often_it_counts(policy, tmp_path):
    folder = tiny_reward_folder(tmp_path / "reward", policy)
    model = RewardModel.load(str(folder)).model
    context = single_process_context(1)

    def row(id, weight, *sequences):
        return RankedRow(id, sequences, (1, 2), (1, 1), None, weight, id)

    def gradient(rows):
        function = partial(weighted_loss, pad_id=0, ranking_loss=ranking_loss(SECTION))
        model.zero_grad()
        loss = accumulate(parallel(model, function, context), rows, context)
        return loss, {name: p.grad.clone() for name, p in model.named_parameters()}

    first, second = ((5, 6, 7), (5, 6, 8, 9)), ((9, 8), (9, 7, 6, 5))
    loss, got = gradient([row("a", 3.0, *first), row("b", 1.0, *second)])
    expected_loss, expected = gradient([*[row("a", 1.0, *first)] * 3, row("b", 1.0, *second)])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)
