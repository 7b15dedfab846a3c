"""The recipe: strict, told in full, and every field documented and used."""

import ast
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import starling
from starling.base.errors import RecipeError
from starling.base.explain import all_keys
from starling.base.section import Section
from starling.base.strict_yaml import dump_yaml, parse_yaml
from starling.recipe import (
    Recipe,
    dump_recipe,
    load_recipe,
    packaged_recipes,
    packaged_text,
    validate_recipe,
)

SOURCE = Path(starling.__file__).parent

SMALL = """
policy: models/start
judge: {kind: rubric}
feedback:
  prompts: prompts.jsonl
  candidates:
    - {name: a, model: models/a}
    - {name: b, model: models/b}
reward: {}
ppo: {}
bench: {questions: questions.jsonl}
"""


def refusal(tmp_path: Path, text: str) -> list[str]:
    """The lines of the error that this recipe is refused with, paths of files left out."""
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    return [line.strip() for line in str(caught.value).splitlines()]


def with_change(*path: str | int, value: object) -> str:
    """SMALL with one value set, at a path of keys."""
    tree = yaml.safe_load(SMALL)
    node = tree
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return yaml.safe_dump(tree)


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_is_valid(name):
    recipe = load_recipe(name).recipe
    assert (recipe.reward if name.startswith("starling-rm") else recipe.ppo) is not None


@pytest.mark.parametrize("name", packaged_recipes())
def test_the_resolved_tree_loads_as_the_same_recipe(name, tmp_path):
    recipe = load_recipe(name).recipe
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(path)).recipe == recipe


@pytest.mark.parametrize("name", ["starling-beta", "starling-alpha", "ziegler-2019"])
def test_every_number_of_a_published_recipe_has_a_source_or_is_not_published(name):
    lines = packaged_text(name).splitlines()
    numbers = [line for line in lines if line.partition(":")[2].strip()[:1] in tuple("-0123456789")]
    bare = [line for line in numbers if "  # " not in line]
    assert len(numbers) > 25
    assert bare == []


def test_a_recipe_by_path_looks_for_its_files_beside_itself(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL, encoding="utf-8")
    loaded = load_recipe(str(path))
    assert (loaded.name, loaded.folder) == ("mine", tmp_path)


def test_a_packaged_recipe_looks_for_its_files_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("laptop").folder == tmp_path


def test_a_misspelt_key_is_refused_with_its_path_what_stood_there_and_the_nearest(tmp_path):
    lines = refusal(tmp_path, with_change("ppo", "kl_coeff", value=0.02))
    assert lines[1:] == [
        "ppo.kl_coeff: there is no such key (found 0.02); did you mean ppo.kl_coef?"
    ]


def test_a_misspelt_key_in_a_list_is_refused_with_its_number(tmp_path):
    lines = refusal(tmp_path, with_change("feedback", "candidates", 1, "temprature", value=1.5))
    assert lines[1:] == [
        "feedback.candidates.1.temprature: there is no such key (found 1.5); "
        "did you mean feedback.candidates.1.temperature?"
    ]


def test_a_key_of_another_section_is_refused_with_where_it_belongs(tmp_path):
    lines = refusal(tmp_path, with_change("reward", "kl_target", value=6))
    assert lines[1:] == [
        "reward.kl_target: there is no such key (found 6); did you mean ppo.kl_target?"
    ]


def test_a_misspelt_section_is_refused_with_the_nearest(tmp_path):
    lines = refusal(tmp_path, SMALL + "pppo: {steps: 3}")
    assert lines[1:] == ["pppo: there is no such key (found a section); did you mean ppo?"]


def test_a_key_near_to_nothing_is_refused_with_what_is_allowed_there(tmp_path):
    lines = refusal(tmp_path, with_change("run", value={"xyzzy": None}))
    assert lines[1:] == [
        "run.xyzzy: there is no such key (found null); allowed here: "
        "device, out, prices, max_usd, max_calls, max_tokens"
    ]


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("seed",), "3", 'seed: found "3"; Input should be a valid integer'),
        (("seed",), True, "seed: found true; Input should be a valid integer"),
        (("threads",), 0, "threads: found 0; Input should be greater than or equal to 1"),
        (("policy",), 7, "policy: found 7; Input should be a valid string"),
        (("ppo", "steps"), 1.5, "ppo.steps: found 1.5; Input should be a valid integer"),
        (
            ("ppo", "kl_coef"),
            -1,
            "ppo.kl_coef: found -1; Input should be greater than or equal to 0",
        ),
        (("ppo", "gamma"), 2, "ppo.gamma: found 2; Input should be less than or equal to 1"),
        (
            ("ppo", "critic"),
            "sharde",
            "ppo.critic: found \"sharde\"; Input should be 'shared', 'separate' or 'reward-model'",
        ),
        (("ppo",), 3, "ppo: found 3; Input should be an object"),
    ],
)
def test_a_wrong_value_is_refused_with_path_found_and_allowed(tmp_path, path, value, line):
    assert refusal(tmp_path, with_change(*path, value=value))[1:] == [line]


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan"])
def test_a_number_that_is_not_finite_is_refused(tmp_path, text):
    lines = refusal(tmp_path, SMALL.replace("ppo: {}", f"ppo: {{missing_end_penalty: {text}}}"))
    assert lines[1].startswith("ppo.missing_end_penalty: found ")
    assert lines[1].endswith("finite number")


def test_a_missing_key_is_named_with_what_it_needs(tmp_path):
    assert refusal(tmp_path, "bench: {}")[1:] == ["bench.questions: is missing"]


def test_all_problems_are_told_at_once(tmp_path):
    text = "seed: -1\nthread: 2\nppo: {steps: 0, lr: fast}\nreward: 3\n"
    assert len(refusal(tmp_path, text)) == 1 + 5


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path):
    lines = refusal(tmp_path, "ppo:\n  steps: 3\n  lr: 1\n  steps: 4\n")
    assert lines[1] == "it cannot be read: ppo.steps stands twice, on lines 2 and 4"


@pytest.mark.parametrize(
    "text", ["", "- a", "3", "a: [1", "a:\n\tb: 1", "\x01", "a: &x 1\nb: *x", "? [1]\n: 2"]
)
def test_what_is_no_recipe_is_refused_without_a_traceback(tmp_path, text):
    assert refusal(tmp_path, text)[0].endswith(("a problem:", "2 problems:"))


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"policy: \xff")
    with pytest.raises(RecipeError, match="not UTF-8 at byte 9"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_a_missing_recipe_names_the_nearest_packaged_one():
    with pytest.raises(RecipeError, match=r"no recipe labtop\. Did you mean laptop\?"):
        load_recipe("labtop")


def test_a_missing_recipe_names_the_nearest_file_beside_it(tmp_path):
    (tmp_path / "mine.yaml").write_text(SMALL, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"Did you mean .*mine\.yaml\?"):
        load_recipe(str(tmp_path / "mien.yaml"))


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="Is a directory"):
        load_recipe(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "seed: 1",
            "sft, feedback, reward, ppo, bench: a recipe needs at least one of these stages",
        ),
        ("reward: {base: m}", "reward.rankings: is missing; without a feedback stage"),
        ("reward: {rankings: r}", "reward.base: is missing; without an sft stage"),
        ("ppo: {prompts: p, reward_model: r}", "ppo.policy: is missing; without an sft stage"),
        ("ppo: {policy: m, reward_model: r}", "ppo.prompts: is missing; without a feedback stage"),
        ("ppo: {policy: m, prompts: p}", "ppo.reward_model: is missing; without a reward stage"),
        ("bench: {questions: q, baseline: b, policy: p}", "judge: is missing, and bench need one"),
        (
            "judge: {kind: rubric}\nbench: {questions: q, baseline: b}",
            "bench.policy: is missing; without a ppo stage",
        ),
        (
            "judge: {kind: rubric}\nbench: {questions: q, policy: p}",
            "bench.baseline: is missing; without an sft stage",
        ),
        (
            "judge: {kind: rubric}\nbench: {questions: q, policy: p, baseline: b, best_of: 4}",
            "bench.best_of: needs a reward stage",
        ),
        ("policy: m\nsft: {conversations: c, base: b}", "policy: the sft stage makes"),
        ("sft: {conversations: c}", "sft.base: found neither of base and architecture"),
        (
            "sft: {conversations: c, base: b, architecture: {}}",
            "sft.base: found both of base and architecture",
        ),
        ("sft: {conversations: c, base: b, steps: 9, keep: [10]}", "sft.keep: found 10"),
    ],
)
def test_a_stage_without_what_it_needs_is_refused_with_what_to_name(tmp_path, text, line):
    lines = refusal(tmp_path, text)
    assert len(lines) == 2
    assert lines[1].startswith(line.removesuffix(" need one"))


@pytest.mark.parametrize(
    "named", [{"reward_model": "r"}, {"reward_models": [{"model": "r"}, {"model": "s"}]}]
)
def test_reward_models_that_are_named_need_no_reward_stage(named):
    bench = {"questions": "q", "best_of": 4}
    tree = {"policy": "m", "judge": {"kind": "rubric"}, "bench": bench}
    recipe = validate_recipe(tree | {"ppo": {"prompts": "p", **named}}, "mine")
    assert recipe.reward is None


def test_a_number_of_answers_that_cannot_be_ranked_is_refused(tmp_path):
    candidate = {"name": "a", "model": "m", "answers": 27}
    lines = refusal(tmp_path, with_change("feedback", "candidates", value=[candidate]))
    assert lines[1:] == ["feedback.candidates: 27 answers per prompt; at most 26"]


def test_a_cap_on_money_wants_the_price_of_every_endpoint(tmp_path):
    tree = yaml.safe_load(with_change("judge", value={"url": "http://h/v1", "model": "gpt"}))
    tree["run"] = {"max_usd": 1.0, "prices": {"other": {"input": 1, "output": 2}}}
    [_, line] = refusal(tmp_path, yaml.safe_dump(tree))
    assert line.startswith("run.prices: has none for 'gpt'")
    tree["run"]["prices"]["gpt"] = {"input": 0, "output": 0}
    assert validate_recipe(tree, "mine").run.max_usd == 1.0


def test_two_candidates_of_one_name_are_refused(tmp_path):
    lines = refusal(tmp_path, with_change("feedback", "candidates", 1, "name", value="a"))
    assert lines[1:] == ["feedback.candidates: the name 'a' stands twice; each needs its own"]


def test_what_only_the_rubric_has_is_refused_of_another_judge(tmp_path):
    judge = {"kind": "local", "model": "m", "position_bias": 0.1}
    lines = refusal(tmp_path, with_change("judge", value=judge))
    assert lines[1:] == ["judge.position_bias: only kind rubric has it; here kind is local"]


def test_a_key_in_a_candidates_url_is_refused_and_not_repeated(tmp_path):
    url = "http://h/v1?api_key=sk-secret123"
    lines = refusal(tmp_path, with_change("feedback", "candidates", 0, "url", value=url))
    assert len(lines) == 2
    assert lines[1].startswith("feedback.candidates.0.url: it holds a literal key (api_key=...)")
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize("key", ["api_key_env", "api_key"])
def test_a_literal_key_is_refused_and_not_repeated(tmp_path, key):
    judge = {"kind": "endpoint", "url": "http://x/v1", "model": "m", key: "sk-secret123"}
    lines = refusal(tmp_path, with_change("judge", value=judge))
    assert len(lines) == 2
    assert lines[1].startswith(f"judge.{key}: ")
    assert "secret" not in "".join(lines)


def test_words_and_numbers_are_read_as_people_mean_them():
    text = "a: 1e-5\nb: 2E3\nc: 1_000\nd: on\ne: no\nf: 010\ng: 1:30\nh: 2024-01-01\ni: ~\nj: <<\n"
    assert parse_yaml(text) == {
        "a": 0.00001,
        "b": 2000.0,
        "c": 1000,
        "d": "on",
        "e": "no",
        "f": "010",
        "g": "1:30",
        "h": "2024-01-01",
        "i": None,
        "j": "<<",
    }


def test_a_tag_is_refused_and_nothing_is_run():
    for tag in ("python/object/apply:os.getcwd []", "set {a}", "binary aGk="):
        with pytest.raises(ValueError, match=f"line 1: the tag .*{tag.partition(' ')[0]}"):
            parse_yaml(f"a: !!{tag}")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(min_size=1), PLAIN))
def test_what_is_written_is_read_again_by_us_and_by_others(value):
    text = dump_yaml(value)
    assert parse_yaml(text) == value
    assert yaml.safe_load(text) == value


def test_a_plain_tree_is_validated_like_a_file():
    recipe = validate_recipe(yaml.safe_load(SMALL), "mine")
    assert recipe.ppo is not None
    with pytest.raises(RecipeError, match=r"mine has a problem:\n  ppo.steps: found 0"):
        validate_recipe(yaml.safe_load(with_change("ppo", "steps", value=0)), "mine")


def test_every_field_is_documented():
    undocumented = []

    def visit(section: type[Section], prefix: str) -> None:
        for name, field in section.model_fields.items():
            if not (field.description or "").strip():
                undocumented.append(prefix + name)

    for section in [Recipe, *all_sections()]:
        visit(section, f"{section.__name__}.")
    assert undocumented == []


def all_sections() -> list[type[Section]]:
    """Every section class of the package, since the tree is made of nothing else."""
    found, queue = [], [Section]
    while queue:
        inner = queue.pop().__subclasses__()
        found += inner
        queue += inner
    return [section for section in found if section.__module__.startswith("starling.")]


READERS = {
    "seed": ("pipeline.py",),
    "threads": ("pipeline.py",),
    "policy": ("inputs.py",),
    "judge": ("judging", "inputs.py", "models/endpoint.py"),
    "sft": ("sft", "models", "inputs.py"),
    "feedback": ("feedback", "inputs.py", "models/endpoint.py"),
    "reward": ("reward", "models/training.py", "models/adapters.py", "inputs.py"),
    "ppo": ("ppo", "models/training.py", "models/adapters.py", "inputs.py"),
    "bench": ("bench", "inputs.py"),
    "run": ("pipeline.py", "cli.py", "base/spending.py"),
}
"""Where the fields of each section may be read, configuration itself left out."""


@pytest.mark.parametrize("section", READERS)
def test_every_field_is_read_somewhere(section):
    read = set()
    for place in READERS[section]:
        path = SOURCE / place
        for file in [path] if path.is_file() else sorted(path.glob("*.py")):
            if file.name != "config.py":
                read |= names_read(ast.parse(file.read_text(encoding="utf-8")))
    paths = [path for _, path in all_keys(Recipe) if path.partition(".")[0] == section]
    leaves = [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]
    assert leaves
    assert [path for path in leaves if path.rpartition(".")[2] not in read] == []


def names_read(tree: ast.AST) -> set[str]:
    """What is read as an attribute, by its name in square brackets, or by a guard of that name."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    for call in calls:
        if isinstance(call.func, ast.Name) and call.func.id == "Guard":
            names |= {each.value for each in call.args[:1] if isinstance(each, ast.Constant)}
    keys = (node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript))
    return names | {
        key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


def test_every_section_has_its_readers_named():
    assert set(Recipe.model_fields) == set(READERS)
