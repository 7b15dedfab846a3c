"""Which stages run again, which are skipped, and what is never touched."""

import fcntl
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from starling import pipeline
from starling.base.errors import DataError, InputError, Stopped
from starling.base.stage import Summary
from starling.inputs import Paths, hash_inputs, resolve_feedback
from starling.recipe import STAGES, Recipe, RunSection, validate_recipe

TREE = {
    "sft": {"conversations": "data/sft.jsonl", "architecture": {}},
    "judge": {"kind": "rubric"},
    "feedback": {
        "prompts": "data/prompts.jsonl",
        "candidates": [
            {"name": "a", "model": "sft/model"},
            {"name": "b", "model": "org/hub-model"},
        ],
    },
    "reward": {},
    "ppo": {},
    "bench": {"questions": "data/bench.jsonl"},
}

OUTPUT = {
    "sft": "model/weights",
    "feedback": "rankings.jsonl",
    "reward": "model/weights",
    "ppo": "model/weights",
    "bench": "scores.json",
}


class World:
    """A recipe beside its data, a run folder, and stages that write one small file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "home"
        self.out = folder / "run"
        self.tree = json.loads(json.dumps(TREE))
        self.calls: list[str] = []
        self.inputs: dict[str, object] = {}
        self.fail: dict[str, BaseException] = {}
        for name in ("sft", "prompts", "bench"):
            path = self.folder / "data" / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name}\n", encoding="utf-8")

    @property
    def recipe(self) -> Recipe:
        return validate_recipe(self.tree, "mine")

    def run(self, only: str | None = None) -> list[str]:
        """Run the pipeline and return the stages that really ran."""
        self.calls.clear()
        self.summary = pipeline.run_pipeline(self.recipe, self.folder, out=self.out, only=only)
        return list(self.calls)

    def stage(self, name: str, section, inputs, out: Path, context) -> Summary:
        self.calls.append(name)
        self.inputs[name] = inputs
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        (out / "checkpoints" / "step").write_text("x", encoding="utf-8")
        (out / "timing.jsonl").write_text("x", encoding="utf-8")
        if name in self.fail:
            raise self.fail.pop(name)
        path = out / OUTPUT[name]
        path.parent.mkdir(exist_ok=True)
        hashes = {key: entry["sha256"] for key, entry in pipeline.hash_inputs(inputs).items()}
        path.write_text(f"{section}{context.seed}{hashes}", encoding="utf-8")
        if name == "feedback":
            (out / "prompts.jsonl").write_bytes(inputs.prompts[0].read_bytes())
            context.spending.charge("judge", calls=3, prompt_tokens=20, response_tokens=10)
        return Summary(f"made {name}", {"size": len(str(section))})

    def manifest(self, stage: str) -> dict:
        return json.loads((self.out / stage / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = World(tmp_path)

    def fake(stage: pipeline.Stage) -> pipeline.Stage:
        module = ModuleType(f"fake_{stage.name}")

        def run(section, inputs, out, context):
            return made.stage(stage.name, section, inputs, out, context)

        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return replace(stage, module=module.__name__)

    monkeypatch.setattr(pipeline, "PIPELINE", tuple(map(fake, pipeline.PIPELINE)))
    return made


def test_the_table_has_the_recipes_stages_in_its_order():
    assert tuple(stage.name for stage in pipeline.PIPELINE) == STAGES
    assert all(name in Recipe.model_fields for name in STAGES)


def test_all_stages_run_in_order_and_nothing_runs_twice(world):
    assert world.run() == list(STAGES)
    assert world.run() == []


def test_each_stage_reads_what_the_one_before_it_wrote(world):
    world.run()
    run = world.out
    assert world.inputs["sft"].conversations == world.folder / "data" / "sft.jsonl"
    models = [candidate.model for candidate in world.inputs["feedback"].candidates]
    assert models == [str(run / "sft" / "model"), "org/hub-model"]
    assert world.inputs["reward"].rankings == run / "feedback" / "rankings.jsonl"
    assert world.inputs["reward"].base == str(run / "sft" / "model")
    assert world.inputs["ppo"].policy == str(run / "sft" / "model")
    assert world.inputs["feedback"].prompts == (world.folder / "data" / "prompts.jsonl",)
    assert world.inputs["feedback"].benchmarks == (world.folder / "data" / "bench.jsonl",)
    assert world.inputs["ppo"].prompts == run / "feedback" / "prompts.jsonl"
    assert [each.model for each in world.inputs["ppo"].reward_models] == [
        str(run / "reward" / "model")
    ]
    assert world.inputs["bench"].baseline == str(run / "sft" / "model")
    assert world.inputs["bench"].policy == str(run / "ppo" / "model")
    assert world.inputs["bench"].reward_model is None


def test_a_path_is_looked_up_in_the_run_folder_first(world):
    inner = world.out / "data" / "prompts.jsonl"
    inner.parent.mkdir(parents=True)
    inner.write_text("nearer\n", encoding="utf-8")
    world.run()
    assert world.inputs["feedback"].prompts == (inner,)


def test_a_changed_section_runs_its_stage_and_those_whose_inputs_it_changes(world):
    world.run()
    world.tree["reward"]["epochs"] = 2
    assert world.run() == ["reward", "ppo", "bench"]
    world.tree["bench"]["max_tokens"] = 5
    assert world.run() == ["bench"]


def test_a_stage_made_again_with_the_same_bytes_leaves_later_ones_fresh(world):
    world.run()
    (world.out / "sft" / "model" / "weights").write_text("flipped", encoding="utf-8")
    assert world.run() == ["sft"]


def test_a_changed_input_file_runs_the_stages_that_read_it(world):
    world.tree["feedback"]["prepare"] = {"decontaminate": []}
    world.run()
    (world.folder / "data" / "bench.jsonl").write_text("other\n", encoding="utf-8")
    # PPO reads the questions to refuse prompts that put one.
    assert world.run() == ["ppo", "bench"]


def test_threads_and_format_versions_count_but_run_settings_do_not(world, monkeypatch):
    world.run()
    world.tree["run"] = {"device": "cpu"}
    assert world.run() == []
    world.tree["threads"] = 2
    assert world.run() == list(STAGES)
    table = pipeline.PIPELINE
    newer = (*table[:-1], replace(table[-1], format_version=99))
    monkeypatch.setattr(pipeline, "PIPELINE", newer)
    assert world.run() == ["bench"]


def test_a_moved_run_with_its_recipe_stays_fresh(world):
    world.run()
    for name in ("folder", "out"):
        old = getattr(world, name)
        setattr(world, name, old.with_name(f"{old.name}-moved"))
        old.rename(getattr(world, name))
    assert world.run() == []


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_output_is_made_again_with_a_warning(world, caplog, damage):
    world.run()
    path = world.out / "reward" / "model" / "weights"
    good = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"flipped")
    assert world.run() == ["reward"]
    assert path.read_bytes() == good
    assert "reward: files in" in caplog.text


def test_an_interrupted_stage_goes_on_from_its_own_files(world, caplog):
    caplog.set_level("INFO")
    world.fail["reward"] = Stopped(15)
    with pytest.raises(Stopped):
        world.run()
    assert (world.out / "reward" / "checkpoints" / "step").exists()
    assert world.run() == ["reward", "ppo", "bench"]
    assert "reward: going on where an interrupted run stopped" in caplog.text


def test_an_interrupted_stage_of_another_recipe_is_cleared_first(world):
    world.fail["reward"] = Stopped(15)
    with pytest.raises(Stopped):
        world.run()
    old = world.out / "reward" / "checkpoints" / "older"
    old.write_text("x", encoding="utf-8")
    world.tree["reward"]["epochs"] = 2
    assert world.run() == ["reward", "ppo", "bench"]
    assert not old.exists()


def test_a_stale_stage_is_cleared_but_paid_replies_and_other_peoples_files_stay(world, caplog):
    world.run()
    feedback = world.out / "feedback"
    for name in ("calls.sqlite", "notes.txt"):
        (feedback / name).write_text("mine", encoding="utf-8")
    world.tree["feedback"]["limit"] = 3
    world.run()
    assert (feedback / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (feedback / "calls.sqlite").read_text(encoding="utf-8") == "mine"
    assert "also holds notes.txt" in caplog.text
    assert list(world.manifest("feedback")["outputs"]) == ["prompts.jsonl", "rankings.jsonl"]


def test_a_kill_while_clearing_leaves_a_folder_that_is_cleared_again(world):
    world.run()
    reward = world.out / "reward"
    (reward / "stage.json").write_text('{"key": "new", "kept": []}', encoding="utf-8")
    (reward / "model" / "weights").unlink()
    world.tree["reward"]["epochs"] = 2
    assert world.run() == ["reward", "ppo", "bench"]


def test_a_kill_after_the_manifest_leaves_a_finished_stage(world):
    world.run()
    reward = world.out / "reward"
    (reward / "stage.json").write_text('{"key": "k", "kept": []}', encoding="utf-8")
    (reward / "checkpoints").mkdir()
    assert world.run() == []
    assert sorted(path.name for path in reward.iterdir()) == [
        "manifest.json",
        "model",
        "timing.jsonl",
    ]


def test_a_folder_that_no_stage_made_is_refused_and_left_alone(world):
    mine = world.out / "reward" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds files that no stage.*thesis\.txt"):
        world.run()
    assert mine.read_text(encoding="utf-8") == "x"


def test_a_manifest_says_what_was_made_from_what_and_where(world):
    world.run()
    manifest = world.manifest("reward")
    assert list(manifest["outputs"]) == ["model/weights"]
    assert manifest["inputs"]["rankings"]["path"] == str(world.out / "feedback/rankings.jsonl")
    assert {"stage", "format_version", "key", "summary", "started", "seconds"} <= manifest.keys()
    assert {"commit", "dirty", "starling", "packages", "python", "host"} <= manifest.keys()
    assert manifest["packages"]["torch"] is not None
    assert manifest["summary"]["sentence"] == "made reward"


def test_a_local_judge_counts_by_its_weights_and_not_by_its_path(world):
    weights = world.folder / "judge" / "weights"
    weights.parent.mkdir()
    weights.write_text("one", encoding="utf-8")
    world.tree["judge"] = {"kind": "local", "model": "judge"}
    world.run()
    assert world.inputs["feedback"].judge.model == str(world.folder / "judge")
    weights.write_text("two", encoding="utf-8")
    assert "feedback" in world.run()


@pytest.fixture
def reward_models(world):
    """Those of a recipe that names three: of another trainer, of the run itself, and served."""
    for name in ("mine", "served"):
        (world.folder / name).mkdir()
        (world.folder / name / "weights").write_text(name, encoding="utf-8")
    world.tree["ppo"]["reward_models"] = [
        {"model": "mine", "weight": 2.0},
        {"model": "reward/model"},
        {"model": "served", "url": "http://127.0.0.1:9", "api_key_env": "KEY"},
    ]
    return world.tree["ppo"]["reward_models"]


def test_several_reward_models_are_found_and_hashed_with_their_settings(world, reward_models):
    world.tree["bench"]["best_of"] = 4
    world.run()
    found = world.inputs["ppo"].reward_models
    places = [world.folder / "mine", world.out / "reward" / "model", world.folder / "served"]
    assert [each.model for each in found] == list(map(str, places))
    assert [each.weight for each in found] == [2.0, 1.0, 1.0]
    assert [each.url for each in found] == [None, None, "http://127.0.0.1:9"]
    assert world.inputs["bench"].reward_model == str(places[0])
    inputs = world.manifest("ppo")["inputs"]
    for number, place in enumerate(places):
        assert inputs[f"reward_models.{number}.model"]["path"] == str(place)
        assert inputs[f"reward_models.{number}"]["sha256"]
    assert world.run() == []


@pytest.mark.parametrize(
    ("number", "field", "value"),
    [(0, "weight", 3.0), (2, "url", "http://127.0.0.1:10"), (2, "served_model", "m")],
)
def test_a_reward_models_settings_make_ppo_stale(world, reward_models, number, field, value):
    world.run()
    before = world.manifest("ppo")["inputs"]
    reward_models[number][field] = value
    assert world.run() == ["ppo", "bench"]
    after = world.manifest("ppo")["inputs"]
    changed = {name for name in before if before[name]["sha256"] != after[name]["sha256"]}
    assert changed == {f"reward_models.{number}"}


def test_a_reward_models_content_makes_ppo_stale_and_its_place_does_not(world, reward_models):
    world.run()
    old = world.folder / "mine"
    old.rename(world.folder / "moved")
    reward_models[0]["model"] = "moved"
    before = dict(world.manifest("ppo")["inputs"])
    world.run()
    after = world.manifest("ppo")["inputs"]
    assert {name for name in before if before[name]["sha256"] != after[name]["sha256"]} == set()
    (world.folder / "moved" / "weights").write_text("more", encoding="utf-8")
    assert world.run() == ["ppo", "bench"]
    (world.folder / "served" / "weights").write_text("more", encoding="utf-8")
    assert world.run() == ["ppo", "bench"]


def test_a_reward_model_that_is_nowhere_is_named_by_its_key(world, reward_models):
    reward_models[2]["model"] = "gone/for/good"
    with pytest.raises(DataError, match=r"ppo\.reward_models\.2\.model: there is no model folder"):
        world.run()
    assert world.calls == []


def test_prompts_with_instructions_are_found_and_hashed(world):
    world.tree["ppo"]["instructions"] = "data/prompts.jsonl"
    world.run()
    assert world.inputs["ppo"].instructions == world.folder / "data" / "prompts.jsonl"
    assert world.manifest("ppo")["inputs"]["instructions"]["path"] is not None


def test_a_stage_runs_alone_on_what_is_there(world):
    assert world.run(only="sft") == ["sft"]
    assert world.run(only="feedback") == ["feedback"]
    assert world.run() == ["reward", "ppo", "bench"]


def test_a_stage_alone_without_its_input_names_the_command_that_makes_it(world):
    with pytest.raises(DataError, match=r"reward\.rankings: .*starling feedback RECIPE"):
        world.run(only="reward")
    assert world.calls == []


def test_a_stage_alone_refuses_an_input_that_is_half_made(world):
    world.fail["feedback"] = Stopped(2)
    with pytest.raises(Stopped):
        world.run()
    (world.out / "feedback" / "rankings.jsonl").write_text("half", encoding="utf-8")
    with pytest.raises(DataError, match="half made. Finish it first: starling feedback RECIPE"):
        world.run(only="reward")


def test_a_section_that_is_not_there_cannot_run_alone(world):
    del world.tree["sft"]
    world.tree["policy"] = "org/x"
    world.tree["feedback"]["candidates"][0]["model"] = "org/x"
    with pytest.raises(InputError, match=r"no section 'sft'; it has feedback, reward, ppo, bench"):
        world.run(only="sft")


def test_a_missing_input_of_a_late_stage_is_told_before_anything_runs(world):
    (world.folder / "data" / "bench.jsonl").rename(world.folder / "data" / "bensch.jsonl")
    with pytest.raises(DataError) as caught:
        world.run()
    assert world.calls == []
    message = str(caught.value)
    assert message.startswith("bench.questions: there is no file 'data/bench.jsonl'")
    assert str(world.out / "data") in message
    assert str(world.folder / "data") in message
    assert "holds bensch.jsonl, " in message


@pytest.mark.parametrize("model", ["./model", "model", "a/b/c", "/models/x", "sft/model-9"])
def test_a_model_that_is_neither_a_folder_nor_like_a_hub_id_is_refused(world, model):
    world.tree["reward"]["base"] = model
    world.run(only="sft")
    world.run(only="feedback")
    with pytest.raises(DataError, match=r"reward\.base: there is no model folder"):
        world.run(only="reward")


def test_the_summary_holds_every_finished_stage_and_no_clock(world):
    world.run()
    summary = json.loads((world.out / "summary.json").read_text(encoding="utf-8"))
    assert summary == world.summary
    assert list(summary) == list(STAGES)
    assert all(list(figures) == ["size"] for figures in summary.values())


def test_figures_of_a_stage_that_was_outrun_are_left_out_of_the_summary(world, caplog):
    world.run()
    world.tree["ppo"]["steps"] = 3
    world.run(only="ppo")
    assert list(world.summary) == ["sft", "feedback", "reward", "ppo"]
    assert "bench: made from something else" in caplog.text


def test_two_runs_of_one_recipe_leave_the_same_bytes(world, tmp_path):
    world.run()
    first = world.out
    world.out = tmp_path / "again"
    world.run()

    def contents(folder: Path) -> dict[str, bytes]:
        names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        clocks = ("timing.jsonl", "manifest.json")
        return {str(n): (folder / n).read_bytes() for n in names if n.name not in clocks}

    assert contents(first) == contents(world.out)


def test_the_run_folder_keeps_the_resolved_recipe_without_run_settings(world):
    world.tree["run"] = {"device": "cpu"}
    world.run()
    kept = yaml.safe_load((world.out / "recipe.yaml").read_text(encoding="utf-8"))
    assert kept["ppo"]["kl_coef"] == 0.05
    assert kept["run"] == RunSection().model_dump()
    assert kept["run"]["device"] is None


def test_a_folder_of_another_seed_is_refused_and_left_as_it_is(world):
    world.run()
    before = (world.out / "recipe.yaml").read_bytes()
    world.tree["seed"] = 1
    with pytest.raises(InputError, match="is a run of seed 0, and this one has seed 1"):
        world.run()
    assert world.calls == []
    assert (world.out / "recipe.yaml").read_bytes() == before


def test_a_recipe_that_someone_wrote_is_not_overwritten(world):
    world.out = world.folder
    (world.folder / "recipe.yaml").write_text("seed: 0  # precious\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"would be overwritten"):
        world.run()


def test_a_second_process_is_kept_out_of_the_run_folder(world):
    world.out.mkdir()
    with (world.out / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another starling process writes to"):
            world.run()
    assert world.run() == list(STAGES)


def test_a_run_folder_that_cannot_be_made_is_told(world):
    world.out.write_text("a file", encoding="utf-8")
    with pytest.raises(InputError, match="cannot write to the folder"):
        world.run()


def test_prepare_may_make_the_inputs(world):
    (world.folder / "data" / "sft.jsonl").unlink()

    def make() -> None:
        (world.folder / "data" / "sft.jsonl").write_text("made\n", encoding="utf-8")

    pipeline.run_pipeline(world.recipe, world.folder, out=world.out, only="sft", prepare=make)
    assert world.calls == ["sft"]


def test_a_servers_tokenizer_is_found_beside_the_recipe_and_a_changed_one_makes_anew(tmp_path):
    folder = tmp_path / "tok"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    url = {"url": "http://localhost:1/v1", "tokenizer": "tok"}
    tree = json.loads(json.dumps(TREE))
    tree["feedback"]["candidates"][0] |= url
    tree["judge"] = {"kind": "endpoint", "model": "m", **url}
    recipe = validate_recipe(tree, "mine")
    (tmp_path / "data").mkdir()
    for name in ("prompts", "bench"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n", encoding="utf-8")
    paths = Paths(tmp_path / "run", tmp_path)
    found = resolve_feedback(recipe.feedback, recipe, paths)
    assert [found.candidates[0].tokenizer, found.judge.tokenizer] == [str(folder)] * 2
    assert found.candidates[1].model == "org/hub-model"
    before = hash_inputs(found)
    (folder / "tokenizer.json").write_text("{ }", encoding="utf-8")
    after = hash_inputs(found)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"candidates.0.tokenizer", "judge.tokenizer"}


def test_a_servers_tokenizer_that_is_nowhere_is_refused_and_openchat_is_always_there(tmp_path):
    tree = json.loads(json.dumps(TREE))
    tree["judge"] = {"kind": "endpoint", "url": "http://h/v1", "model": "m", "tokenizer": "tok"}
    (tmp_path / "data").mkdir()
    for name in ("prompts", "bench"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n", encoding="utf-8")
    paths = Paths(tmp_path / "run", tmp_path, pending=("sft",))
    recipe = validate_recipe(tree, "mine")
    with pytest.raises(DataError, match=r"judge\.tokenizer: there is no model folder 'tok'"):
        resolve_feedback(recipe.feedback, recipe, paths)
    tree["judge"]["tokenizer"] = "openchat"
    recipe = validate_recipe(tree, "mine")
    assert resolve_feedback(recipe.feedback, recipe, paths).judge.tokenizer == "openchat"


def test_what_a_stage_cost_stands_in_its_manifest_and_counts_when_it_is_not_run_again(
    world, monkeypatch
):
    world.tree["run"] = {"prices": {"judge": {"input": 1.0, "output": 2.0}}}
    world.run()
    spent = {"calls": 3, "prompt_tokens": 20, "response_tokens": 10, "usd": 4e-05}
    assert world.manifest("feedback")["spending"] == {"judge": spent}
    assert world.manifest("reward")["spending"] == {}
    seen = []
    monkeypatch.setattr(World, "stage", lambda self, name, s, i, o, c: seen.append(c) or stop())

    def stop():
        raise DataError("enough")

    for path in (world.out / "bench").iterdir():
        path.unlink()
    for only in (None, "bench"):
        with pytest.raises(DataError, match="enough"):
            world.run(only=only)
        assert seen.pop().spending.totals() == {"judge": spent}
