"""Any number of processes goes on where another number stopped; rank 0 alone keeps the books."""

import json
import os
import signal

import pytest

# What a run imports by name, imported before the fork.
import starling.ppo.train
import starling.sft.train
from ranks import as_torchrun_would, on_ranks
from starling.base.checkpoint import load_newest
from starling.base.errors import DataError, Stopped
from starling.base.jsonl import write_records
from starling.base.metrics import MetricsLog
from starling.cli import main
from starling.models.training import Journal
from starling.ppo.rollout import Collector
from starling.ppo.select import Validator
from starling.sft.config import SftInputs, SftSection
from tiny import tiny_policy_folder, tiny_reward_folder

SETTINGS = {
    "conversations": "here",
    "steps": 5,
    "batch": 5,
    "lr": 3e-3,
    "warmup_steps": 2,
    "checkpoint_every": 100,
    "keep": [2],
}
RECIPE = """\
run: {device: cpu}
sft:
  conversations: conversations.jsonl
  architecture: {vocab_size: 300, hidden_size: 16, heads: 2, layers: 1}
  steps: 4
  batch: 5
  checkpoint_every: 3
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Conversations, a base model and a recipe."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_policy_folder(folder / "base")
    turns = [("user", "What is the sum of it?"), ("assistant", "The answer is no.")]
    rows = [
        {"messages": [{"role": role, "content": text * (1 + n % 4)} for role, text in turns]}
        for n in range(17)
    ]
    write_records(folder / "conversations.jsonl", rows)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def tune(context, inputs, out, settings, stop_at=None):
    """Run sft; a signal reaches the last process alone, in the step after which it shall stop."""
    section = SftSection.model_validate(SETTINGS | settings | {"base": str(inputs / "base")})
    if stop_at is not None and context.rank == context.world_size - 1:
        original = starling.sft.train.Journal.log

        def log(journal, step, values, note):
            if step == stop_at:
                context.stop.signal_number = signal.SIGTERM
            original(journal, step, values, note)

        starling.sft.train.Journal.log = log
    try:
        starling.sft.train.run(
            section, SftInputs(inputs / "conversations.jsonl", section.base), out, context
        )
    except Stopped as stopped:
        return stopped.signal_number
    return None


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_one_number_of_processes_goes_on_where_another_was_stopped(
    inputs, tmp_path, train, before, after
):
    settings = {"train": train, "lora_rank": 2}
    assert on_ranks(1, tune, tmp_path, inputs, tmp_path / "whole", settings) == [None]
    stopped = on_ranks(before, tune, tmp_path, inputs, tmp_path / "parts", settings, 3)
    assert stopped == [signal.SIGTERM] * before
    assert len(metrics(tmp_path / "parts")) == 3
    snapshot = load_newest(tmp_path / "parts" / "checkpoints")
    assert snapshot.step == 3
    is_adapter = ["lora_" in name for name in snapshot.tensors if name.startswith("module/")]
    assert all(is_adapter) if train == "lora" else not any(is_adapter)
    ended = on_ranks(after, tune, tmp_path, inputs, tmp_path / "parts", settings)
    assert ended == [None] * after
    expected, found = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    for row, other in zip(found, expected, strict=True):
        assert row["sft/loss"] == pytest.approx(other["sft/loss"], rel=1e-5)
        assert row["sft/grad_norm"] == pytest.approx(other["sft/grad_norm"], rel=1e-5)
    folders = [sorted(path.name for path in (tmp_path / name).iterdir() if path.is_dir())
               for name in ("whole", "parts")]  # fmt: skip
    assert folders == [["model", "model-2"], ["checkpoints", "model", "model-2"]]


def starling_on(size, recipe, out, prepare=lambda rank: None):
    """`starling sft` in several processes; `prepare` is called in each with its rank."""

    def command(rank):
        prepare(rank)
        return main(["sft", str(recipe), "--out", str(out)])

    return as_torchrun_would(size, command)


def test_a_run_of_two_processes_is_kept_by_the_first_and_is_fresh_for_one(inputs, tmp_path, capfd):
    ended = starling_on(2, inputs / "recipe.yaml", tmp_path / "run")
    assert [status for status, _ in ended] == [0, 0]
    assert "sft: Tuned a" in ended[0][1]
    assert ended[1][1] == ""
    assert capfd.readouterr().out.count("Figures:") == 1
    stage = tmp_path / "run" / "sft"
    assert {path.name for path in stage.iterdir()} == {
        "manifest.json",
        "metrics.jsonl",
        "model",
        "timing.jsonl",
    }
    ended = starling_on(2, inputs / "recipe.yaml", tmp_path / "run")
    assert [status for status, _ in ended] == [0, 0]
    assert "nothing changed" in ended[0][1]
    assert main(["sft", str(inputs / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 0
    assert "nothing changed" in capfd.readouterr().err


def fail_in_step(own_rank, error):
    """The second step's forward ends in this error, in one process."""

    def prepare(rank):
        original = starling.sft.train.accumulate
        calls = []

        def accumulate(*arguments):
            calls.append(1)
            if rank == own_rank and len(calls) == 2:
                raise error
            return original(*arguments)

        starling.sft.train.accumulate = accumulate

    return prepare


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (DataError("this row is bad"), 2, "error: this row is bad\n"),
        (Stopped(signal.SIGTERM), 143, "Stopped. The same command goes on from here.\n"),
    ],
)
def test_an_error_in_one_process_ends_all_with_its_status_and_is_said_once(
    inputs, tmp_path, rank, error, status, said
):
    ended = starling_on(2, inputs / "recipe.yaml", tmp_path, fail_in_step(rank, error))
    assert [code for code, _ in ended] == [status, status]
    assert ended[rank][1].endswith(said)
    assert "Traceback" not in ended[1 - rank][1]
    assert said not in ended[1 - rank][1]


def test_an_error_that_every_process_meets_is_said_once(inputs, tmp_path):
    text = RECIPE.replace("steps: 4", "steps: 4\n  max_length: 16")
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "conversations.jsonl").write_bytes((inputs / "conversations.jsonl").read_bytes())
    ended = starling_on(2, tmp_path / "recipe.yaml", tmp_path / "run")
    assert [status for status, _ in ended] == [2, 2]
    assert sum("error: every conversation is longer" in text for _, text in ended) == 1


def test_a_run_folder_that_another_process_holds_ends_all_processes(inputs, tmp_path):
    from starling.base.files import locked

    with locked(tmp_path):
        ended = starling_on(2, inputs / "recipe.yaml", tmp_path)
    assert [status for status, _ in ended] == [2, 2]
    assert "another starling process" in ended[0][1]
    assert ended[1][1] == ""


def test_a_process_that_is_killed_ends_the_other(inputs, tmp_path):
    def prepare(rank):
        if rank == 1:
            original = MetricsLog.__init__

            def init(self, path):
                os.kill(os.getpid(), signal.SIGKILL)
                original(self, path)

            MetricsLog.__init__ = init

    ended = starling_on(2, inputs / "recipe.yaml", tmp_path, prepare)
    assert ended[1][0] == -signal.SIGKILL
    assert ended[0][0] not in (0, 99, -signal.SIGKILL) or "onnection" in ended[0][1]


PPO = {
    "prompts": "prompts.jsonl",
    "reward_model": "scorer",
    "validation_prompts": 4,
    "steps": 4,
    "rollout_batch": 6,
    "samples_per_prompt": 2,
    "ppo_epochs": 2,
    "minibatches": 2,
    "max_response_tokens": 4,
    "missing_end_penalty": None,
    "lr": 3e-3,
    "kl_target": 1.0,
    "kl_horizon": 100,
    "select_every": 1,
    "checkpoint_every": 100,
    "reward_scale": "running",
    "guards": {"min_end_rate": None},
}
POLICIES = {
    "full": {"critic_gate": 0.5},
    "lora": {"train": "lora", "lora_rank": 2, "critic": "separate"},
    "top": {"train": "top", "top_layers": 1},
    "group": {"advantages": "rloo"},
}
COUNTED = ("ppo/response_tokens", "ppo/end_rate", "ppo/validation_tokens", "ppo/score_std")
"""The same to the bit where the same tokens were sampled, but for the last, a rounding away."""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A policy, a reward model, prompts, and a recipe for each way to train."""
    folder = tmp_path_factory.mktemp("asked")
    tiny_reward_folder(folder / "scorer", tiny_policy_folder(folder / "policy"), seed=1)
    write_records(
        folder / "prompts.jsonl",
        [
            {
                "id": f"p{n}",
                "messages": [{"role": "user", "content": f"Question {n}?"}],
                "checks": {"excludes": ["a", "e"]},
            }
            for n in range(17)
        ],
    )
    for name, settings in POLICIES.items():
        recipe = {"run": {"device": "cpu"}, "policy": "policy", "judge": {"kind": "rubric"}}
        (folder / f"{name}.yaml").write_text(json.dumps(recipe | {"ppo": PPO | settings}))
    return folder


def ppo_on(size, asked, name, out, prepare=lambda rank: None):
    """`starling ppo` in so many processes; the exit status of each, and what was said."""

    def command(rank):
        prepare(rank)
        return main(["ppo", str(asked / f"{name}.yaml"), "--out", str(out)])

    ended = as_torchrun_would(size, command)
    return [status for status, _ in ended], "".join(text for _, text in ended)


def ppo_metrics(out):
    return metrics(out / "ppo")


@pytest.fixture(scope="module")
def alone(asked, tmp_path_factory):
    """What one process makes of each recipe, run once."""
    finished = {}

    def folder_of(name):
        if name not in finished:
            finished[name] = tmp_path_factory.mktemp(f"alone-{name}")
            statuses, said = ppo_on(1, asked, name, finished[name])
            assert statuses == [0], said
        return finished[name]

    return folder_of


def assert_same_metrics(found, expected):
    """As far as the same tokens were sampled, to 1e-5; what is a difference of two, to 1e-6."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for key, value in other.items():
            assert row[key] == pytest.approx(value, rel=1e-5, abs=2e-6), (key, row["step"])


def files(out):
    return {path.relative_to(out) for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", POLICIES)
def test_two_processes_make_the_metrics_and_the_files_of_one(asked, alone, tmp_path, name):
    """The judge rates in the first alone, and a checkpoint is selected and saved all the same."""
    statuses, said = ppo_on(2, asked, name, tmp_path / "two")
    assert statuses == [0, 0], said
    assert_same_metrics(ppo_metrics(tmp_path / "two"), ppo_metrics(alone(name)))
    assert files(tmp_path / "two") == files(alone(name))
    summaries = [
        json.loads((out / "summary.json").read_text())["ppo"]
        for out in (tmp_path / "two", alone(name))
    ]
    assert summaries[0]["selected_step"] == summaries[1]["selected_step"]
    assert summaries[0]["flags"] == summaries[1]["flags"]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("name", ["full", "top"])
def test_ppo_goes_on_in_another_number_of_processes(asked, alone, tmp_path, name, before, after):
    def stop(rank):
        # A signal reaches the last process alone, in the second step.
        original = Journal.log

        def log(journal, step, values, note):
            if step == 2 and rank == before - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            original(journal, step, values, note)

        Journal.log = log

    statuses, said = ppo_on(before, asked, name, tmp_path, stop)
    assert statuses == [143] * before, said
    [checkpoint] = (tmp_path / "ppo" / "checkpoints").iterdir()
    assert checkpoint.name == "step-000002"
    statuses, said = ppo_on(after, asked, name, tmp_path)
    assert statuses == [0] * after, said
    assert_same_metrics(ppo_metrics(tmp_path), ppo_metrics(alone(name)))
    assert files(tmp_path) == files(alone(name))


def test_each_process_answers_its_own_prompts_and_together_they_answer_all(asked, tmp_path):
    def note(rank):
        original = Collector._score

        def score(collector, prompts, sampled):
            with (tmp_path / f"rank-{rank}.jsonl").open("a") as file:
                rows = [
                    [prompt.id, list(each.sample.ids)]
                    for prompt, each in zip(prompts, sampled, strict=True)
                ]
                file.write(json.dumps(rows) + "\n")
            return original(collector, prompts, sampled)

        Collector._score = score

    statuses, said = ppo_on(2, asked, "full", tmp_path / "two", note)
    assert statuses == [0, 0], said
    shares = [
        [json.loads(line) for line in (tmp_path / f"rank-{rank}.jsonl").open()] for rank in (0, 1)
    ]
    assert len(shares[0]) == len(shares[1]) == 1 + 4 + 4
    drawn = []
    for first, second in zip(*shares, strict=True):
        asked_first, asked_second = ({name for name, _ in share} for share in (first, second))
        assert not asked_first & asked_second
        assert len(first) == len(second) == 2 * len(asked_first) or len(first) == len(second) == 2
        drawn.append({tuple(ids) for _, ids in first} & {tuple(ids) for _, ids in second})
    # Different seeds: answers of four tokens hardly ever meet.
    assert sum(map(len, drawn)) < 3


def test_every_process_decides_by_the_judges_ratings_which_the_first_asked_for(asked, tmp_path):
    """A process without them would keep another checkpoint, and the others would wait for it."""

    def note(rank):
        original = Validator.measure

        def measure(validator, step):
            validation = original(validator, step)
            with (tmp_path / f"rank-{rank}.jsonl").open("a") as file:
                file.write(json.dumps([step, validation.rating]) + "\n")
            return validation

        Validator.measure = measure

    statuses, said = ppo_on(2, asked, "full", tmp_path / "two", note)
    assert statuses == [0, 0], said
    first, second = (
        [json.loads(line) for line in (tmp_path / f"rank-{rank}.jsonl").open()] for rank in (0, 1)
    )
    assert first == second
    assert [step for step, _ in first] == [0, 1, 2, 3, 4]
    assert all(1 <= rating <= 10 for _, rating in first)
