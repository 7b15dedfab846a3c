"""The recipe: every stage's section in one strict, frozen tree, read from YAML.

A stage owns its section (`<stage>/config.py`); here stands what concerns more than one of them.
All problems of a recipe are told at once, each with its full path.  Paths inside a recipe are
resolved by `pipeline`.
"""

import difflib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError, model_validator

from starling.base.errors import RecipeError
from starling.base.explain import explain
from starling.base.section import Section
from starling.base.spending import Price
from starling.base.strict_yaml import dump_yaml, parse_yaml
from starling.bench.config import BenchSection
from starling.feedback.config import FeedbackSection
from starling.judging.config import JudgeSection
from starling.ppo.config import PpoSection
from starling.reward.config import RewardSection
from starling.sft.config import SftSection

NO_READERS = ("rubric", "logits")
"""Kinds of judges that cannot answer prompts that are not ours."""

STAGES = ("sft", "feedback", "reward", "ppo", "bench")
"""The stages in the order in which they run."""


PACKAGED = resources.files("starling") / "recipes"

ALSO_CALLED = {"starling-beta": "starling-7b-beta"}


class RunSection(Section):
    """What cannot change a result: not hashed, and not kept in the run folder's recipe."""

    device: str | None = None
    """cpu, cuda or cuda:<number>; absent: a GPU when there is one."""
    out: str | None = None
    """Run folder; absent: runs/<the recipe's file name>."""
    prices: dict[str, Price] = {}
    """By a model's name at its endpoint: US dollars per million tokens."""
    max_usd: float | None = Field(default=None, ge=0)
    """Stop before the calls in this run folder have cost more; needs every endpoint's price."""
    max_calls: int | None = Field(default=None, ge=0)
    """Stop before more calls were sent, attempts that failed included."""
    max_tokens: int | None = Field(default=None, ge=0)
    """Stop before more tokens were read and written by endpoints."""


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
        problems = [*_missing_sources(self)]
        if self.run.max_usd is not None:
            problems += _missing_prices(self)
        if not any(getattr(self, name) for name in STAGES):
            problems.append(f"{', '.join(STAGES)}: a recipe needs at least one of these stages")
        if self.sft is not None and self.policy is not None:
            problems.append(
                "policy: the sft stage makes the starting policy; name its own start in sft.base"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class LoadedRecipe(NamedTuple):
    """A recipe, its name, and the folder beside which its files are looked for."""

    recipe: Recipe
    name: str
    folder: Path


def load_recipe(reference: str) -> LoadedRecipe:
    """Load a recipe by its path, or a packaged one, whose files lie in the working folder."""
    reference = ALSO_CALLED.get(reference, reference)
    if reference in packaged_recipes():
        return LoadedRecipe(_parse(packaged_text(reference), reference), reference, Path.cwd())
    path = Path(reference)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        files = [str(file) for file in sorted(path.parent.glob("*.y*ml"))] if path.name else []
        hint = _nearest(reference, packaged_recipes() + files)
        raise RecipeError(f"there is no recipe {path}. {hint}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 at byte {error.start + 1}.") from error
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror or error}.") from error
    return LoadedRecipe(_parse(text, reference), path.stem, path.resolve().parent)


def packaged_recipes() -> list[str]:
    """The names of the recipes that come with Starling."""
    names = (entry.name for entry in PACKAGED.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def packaged_text(name: str) -> str:
    """A packaged recipe's file as it is. Raises RecipeError for a name that is none."""
    names = packaged_recipes()
    name = ALSO_CALLED.get(name, name)
    if name not in names:
        raise RecipeError(f"no recipe {name!r} is packaged. {_nearest(name, names)}")
    return (PACKAGED / f"{name}.yaml").read_text(encoding="utf-8")


def validate_recipe(tree: Any, source: str) -> Recipe:
    """Make a recipe of a plain tree, strictly; RecipeError lists all that is wrong with it."""
    try:
        # As JSON, where a list may fill a tuple although types are strict.
        return Recipe.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise RecipeError(_refusal(source, explain(error, Recipe))) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved tree as YAML: every key of every present section, defaults included."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _parse(text: str, source: str) -> Recipe:
    try:
        tree = parse_yaml(text.removeprefix("\ufeff"))
    except ValueError as error:
        raise RecipeError(_refusal(source, [f"it cannot be read: {error}"])) from error
    return validate_recipe(tree, source)


def _refusal(source: str, problems: list[str]) -> str:
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"recipe {source} has {count}:" + "".join(f"\n  {line}" for line in problems)


def _nearest(name: str, others: list[str]) -> str:
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"{hint}Packaged are {', '.join(packaged_recipes())}."


def _missing_sources(recipe: Recipe) -> Iterator[str]:
    """What a stage needs from a stage that is not there, nor named instead."""
    has_start = recipe.sft is not None or recipe.policy is not None
    has_baseline = has_start or (recipe.ppo is not None and recipe.ppo.policy is not None)
    named = recipe.ppo is not None and (recipe.ppo.reward_model or recipe.ppo.reward_models)
    has_rewards = recipe.reward or named
    start = "without an sft stage or the recipe's `policy`, name the starting policy here"
    needs = (
        ("reward.rankings", recipe.feedback, "without a feedback stage, name the rankings here"),
        ("reward.base", has_start, start),
        ("ppo.policy", has_start, start),
        ("ppo.prompts", recipe.feedback, "without a feedback stage, name the prompts here"),
        ("ppo.reward_model", has_rewards, "without a reward stage, name the reward model here"),
        ("bench.policy", recipe.ppo, "without a ppo stage, name the policy under test here"),
        ("bench.baseline", has_baseline, start),
    )
    for path, other_source, text in needs:
        stage, field = path.split(".")
        section = getattr(recipe, stage)
        if section is not None and getattr(section, field) is None and not other_source:
            yield f"{path}: is missing; {text}"
    if recipe.bench is not None and recipe.bench.best_of and not has_rewards:
        yield "bench.best_of: needs a reward stage, or ppo.reward_model(s); 0 leaves it out"
    kind = None if recipe.judge is None else recipe.judge.kind
    if recipe.bench is not None and recipe.bench.protocol == "mt-bench" and kind in NO_READERS:
        yield f"bench.protocol: mt-bench needs a judge that writes text; judge.kind is {kind}"
    stages = [name for name in ("feedback", "bench") if getattr(recipe, name) is not None]
    if recipe.judge is None and stages:
        yield f"judge: is missing, and {' and '.join(stages)} need one"


def _missing_prices(recipe: Recipe) -> Iterator[str]:
    """Endpoints whose calls a cap on money could not count."""
    asked = (*(recipe.feedback.candidates if recipe.feedback else ()), recipe.judge)
    models = {each.model for each in asked if each is not None and each.url is not None}
    for model in sorted(map(str, models - set(recipe.run.prices))):
        yield (
            f"run.prices: has none for {model!r}, and run.max_usd needs each endpoint's; write "
            f"prices: {{{model}: {{input: 0, output: 0}}}} for a server of your own"
        )
