"""The recipe: every stage's section in one strict, frozen tree, read from YAML.

A stage owns its section (`<stage>/config.py`); here stands what concerns more than one of them.
All problems of a recipe are told at once, each with its full path.  Paths inside a recipe are
resolved by `pipeline`.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError, model_validator

from starling.base.errors import RecipeError
from starling.base.explain import explain
from starling.base.section import Section
from starling.base.strict_yaml import dump_yaml, parse_yaml
from starling.bench.config import BenchSection
from starling.feedback.config import FeedbackSection
from starling.judging.config import JudgeSection
from starling.ppo.config import PpoSection
from starling.reward.config import RewardSection
from starling.sft.config import SftSection

STAGES = ("sft", "feedback", "reward", "ppo", "bench")
"""The stages in the order in which they run."""

Problem = tuple[str, str]
"""A path in the recipe, and what is wrong there."""


class RunSection(Section):
    """What cannot change a result: not hashed, and not kept in the run folder's recipe."""

    device: str | None = None
    """cpu, cuda or cuda:<number>; absent: a GPU when there is one."""
    out: str | None = None
    """Run folder; absent: runs/<the recipe's file name>."""


class Recipe(Section):
    """The whole program: which stages run, on what, and with which numbers."""

    seed: int = Field(0, ge=0)
    """Every random draw of every stage derives from it."""
    threads: int = Field(1, ge=1)
    """CPU threads; fixed by the recipe, since another number may change the last bits of a sum."""
    policy: str | None = None
    """Starting policy, a model folder or hub id, of a recipe without an sft stage."""
    judge: JudgeSection | None = None
    """Who ranks candidates, selects checkpoints and grades the benchmark."""
    sft: SftSection | None = None
    """Stage 0 (optional): conversations -> starting policy."""
    feedback: FeedbackSection | None = None
    """Stage 1: prompts -> candidates -> rankings."""
    reward: RewardSection | None = None
    """Stage 2: rankings -> reward model."""
    ppo: PpoSection | None = None
    """Stage 3: policy against reward model."""
    bench: BenchSection | None = None
    """Stage 4: benchmark of the policy against the one it started from."""
    run: RunSection = RunSection()
    """Where and on what to run."""

    @model_validator(mode="after")
    def _validate(self) -> "Recipe":
        checks: tuple[Callable[[Recipe], Iterator[Problem]], ...] = (
            _shape_problems,
            _missing_sources,
            _judge_problems,
            _candidate_problems,
            _key_problems,
            _sft_problems,
        )
        problems = [f"{path}: {text}" for check in checks for path, text in check(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self


class LoadedRecipe(NamedTuple):
    """A recipe, its name, and the folder beside which its files are looked for."""

    recipe: Recipe
    name: str
    folder: Path


def load_recipe(reference: str) -> LoadedRecipe:
    """Load a packaged recipe by its name, or any by its path.

    A packaged one looks for files in the working folder. Raises RecipeError that lists everything
    that is wrong with it.
    """
    if reference in packaged_recipes():
        return LoadedRecipe(_parse(packaged_text(reference), reference), reference, Path.cwd())
    path = Path(reference)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(_no_such_recipe(path)) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 at byte {error.start + 1}.") from error
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror or error}.") from error
    return LoadedRecipe(_parse(text, reference), path.stem, path.resolve().parent)


def packaged_recipes() -> list[str]:
    """The names of the recipes that come with Starling."""
    names = (entry.name for entry in _packaged_folder().iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def packaged_text(name: str) -> str:
    """A packaged recipe's file as it is. Raises RecipeError for a name that is none."""
    names = packaged_recipes()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(f"no recipe {name!r} is packaged; there are {', '.join(names)}.{hint}")
    return (_packaged_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def validate_recipe(tree: Any, source: str, problems: list[str] | None = None) -> Recipe:
    """Make a recipe of a plain tree, strictly: "3" is no number and 1 is not true.

    Raises RecipeError that lists the `problems` known before and all that are found here.
    """
    problems = list(problems or [])
    if not isinstance(tree, dict):
        problems.append("a recipe is a section of keys and values, such as `seed: 0`")
        raise RecipeError(_refusal(source, problems))
    try:
        # As JSON, where a list may fill a tuple although types are strict.
        recipe = Recipe.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems += explain(error, Recipe)
        raise RecipeError(_refusal(source, problems)) from error
    if problems:
        raise RecipeError(_refusal(source, problems))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved tree as YAML: every key of every present section, defaults included."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _parse(text: str, source: str) -> Recipe:
    try:
        tree, problems = parse_yaml(text.removeprefix("\ufeff"))
    except ValueError as error:
        raise RecipeError(_refusal(source, [f"it is not YAML: {error}"])) from error
    return validate_recipe(tree, source, problems)


def _refusal(source: str, problems: list[str]) -> str:
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"recipe {source} has {count}:" + "".join(f"\n  {line}" for line in problems)


def _no_such_recipe(path: Path) -> str:
    """Which recipes there are instead: the packaged ones, and files beside the missing one."""
    files = [str(file) for file in sorted(path.parent.glob("*.y*ml"))] if path.name else []
    names = packaged_recipes() + files
    near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.5)
    hint = (
        f" Did you mean {near[0]}?" if near else f" Packaged are {', '.join(packaged_recipes())}."
    )
    return f"there is no recipe {path}.{hint}"


def _packaged_folder() -> Traversable:
    return resources.files("starling") / "recipes"


def _missing_sources(recipe: Recipe) -> Iterator[Problem]:
    """What a stage needs from a stage that is not there, nor named instead."""
    has_start = recipe.sft is not None or recipe.policy is not None
    has_baseline = has_start or (recipe.ppo is not None and recipe.ppo.policy is not None)
    start = "without an sft stage or the recipe's `policy`, name the starting policy here"
    needs = (
        ("reward.rankings", recipe.feedback, "without a feedback stage, name the rankings here"),
        ("reward.base", has_start, start),
        ("ppo.policy", has_start, start),
        ("ppo.prompts", recipe.feedback, "without a feedback stage, name the prompts here"),
        ("ppo.reward_model", recipe.reward, "without a reward stage, name the reward model here"),
        ("bench.policy", recipe.ppo, "without a ppo stage, name the policy under test here"),
        ("bench.baseline", has_baseline, start),
    )
    for path, other_source, text in needs:
        stage, field = path.split(".")
        section = getattr(recipe, stage)
        if section is not None and getattr(section, field) is None and not other_source:
            yield path, f"is missing; {text}"
    if recipe.bench is not None and recipe.bench.best_of:
        has_reward_model = recipe.reward or (recipe.ppo is not None and recipe.ppo.reward_model)
        if not has_reward_model:
            yield "bench.best_of", "needs a reward stage, or ppo.reward_model; 0 leaves it out"


def _shape_problems(recipe: Recipe) -> Iterator[Problem]:
    if not any(getattr(recipe, name) for name in STAGES):
        yield ", ".join(STAGES), "a recipe needs at least one of these stages"
    if recipe.sft is not None and recipe.policy is not None:
        yield "policy", "the sft stage makes the starting policy; name its own start in sft.base"


def _judge_problems(recipe: Recipe) -> Iterator[Problem]:
    judge = recipe.judge
    if judge is None:
        stages = [name for name in ("feedback", "bench") if getattr(recipe, name) is not None]
        if stages:
            yield "judge", f"is missing, and {' and '.join(stages)} need one"
        return
    if judge.kind != "rubric":
        for name in ("noise", "position_bias"):
            if getattr(judge, name):
                yield f"judge.{name}", f"only kind rubric has it; here kind is {judge.kind}"


def _candidate_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.feedback is None:
        return
    candidates = recipe.feedback.candidates
    names = [candidate.name for candidate in candidates]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield "feedback.candidates", f"the name {name!r} stands twice; each needs its own"
    if sum(candidate.answers for candidate in candidates) < 2:
        yield "feedback.candidates", "1 answer per prompt; a ranking needs at least 2"


def _key_problems(recipe: Recipe) -> Iterator[Problem]:
    """API keys are named, never written down; what looks like one is not repeated."""
    candidates = recipe.feedback.candidates if recipe.feedback is not None else ()
    holders = {f"feedback.candidates.{n}": candidate for n, candidate in enumerate(candidates)}
    for path, holder in {"judge": recipe.judge, **holders}.items():
        name = holder.api_key_env if holder is not None else None
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            yield (
                f"{path}.api_key_env",
                "what stands there is no name of an environment variable, such as OPENAI_API_KEY; "
                "the key itself must not stand in a recipe",
            )


def _sft_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.sft is None:
        return
    if (recipe.sft.base is None) == (recipe.sft.architecture is None):
        found = "neither" if recipe.sft.base is None else "both"
        yield "sft.base", f"found {found} of base and architecture; exactly one is needed"
    for step in recipe.sft.keep:
        if not 1 <= step <= recipe.sft.steps:
            yield "sft.keep", f"found {step}; allowed: 1 to sft.steps, {recipe.sft.steps}"
