"""What each stage reads, as its own dataclass: a recipe's paths made real, and their hashes.

A path is looked up in the run folder first, then beside the recipe; one that is absent means an
earlier stage's output.  A model may also be a hub id.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from starling.base.errors import DataError
from starling.base.files import neighbours
from starling.base.hashing import hash_file, hash_json, hash_tree
from starling.bench.config import BenchInputs, BenchSection
from starling.data.fastchat import find_files
from starling.data.rows import HUB_DATA, fetch
from starling.feedback.config import Candidate, FeedbackInputs, FeedbackSection
from starling.judging.config import JudgeSection
from starling.manifest import MANIFEST
from starling.ppo.config import PpoInputs, PpoSection, RewardSource
from starling.recipe import STAGES, Recipe
from starling.reward.config import RewardInputs, RewardSection
from starling.sft.config import SftInputs, SftSection

Asked = TypeVar("Asked", JudgeSection, Candidate)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Paths:
    """Where a recipe's paths are looked up; both folders are absolute."""

    run: Path
    recipe: Path
    pending: Collection[str] = ()
    """Stages that will run first: their outputs may be missing as yet."""
    sft_models: Collection[str] = ("model",)
    """The models that the sft stage will make."""

    def file(self, key: str, value: str) -> Path:
        """The file that the recipe's `key` names. Raises DataError when there is none."""
        found = self._find(key, value, Path.is_file)
        if found is None:
            raise self._missing(key, value, "file")
        return found

    def rows(self, key: str, value: str) -> Path:
        """The file that `key` names, or that of a data set on the hub, fetched."""
        return fetch(value) if value.startswith(HUB_DATA) else self.file(key, value)

    def model(self, key: str, value: str) -> str:
        """The model folder that `key` names, or `value` itself where it is a hub id."""
        found = self._find(key, value, Path.is_dir)
        if found is not None:
            return str(found)
        if not HUB_ID.fullmatch(value) or value.partition("/")[0] in STAGES:
            raise self._missing(key, value, "model folder")
        return value

    def _find(self, key: str, value: str, is_there: Callable[[Path], bool]) -> Path | None:
        stage = value.partition("/")[0]
        if stage in self.pending:
            name = value.partition("/")[2]
            if stage == "sft" and name not in self.sft_models:
                raise DataError(
                    f"{key}: the sft stage will not make {value!r}; it makes "
                    f"{', '.join(f'sft/{model}' for model in self.sft_models)} (sft.keep)"
                )
            return self.run / value
        if is_there(self.run / value):
            if stage in STAGES and not (self.run / stage / MANIFEST).exists():
                raise DataError(
                    f"{key}: {self.run / value} is half made. "
                    f"Finish it first: starling {stage} RECIPE"
                )
            return self.run / value
        return self.recipe / value if is_there(self.recipe / value) else None

    def _missing(self, key: str, value: str, what: str) -> DataError:
        text = f"{key}: there is no {what} {value!r}."
        stage = value.partition("/")[0]
        if stage in STAGES:
            return DataError(f"{text} Make it first: starling {stage} RECIPE")
        places = (neighbours(folder / value) for folder in (self.run, self.recipe))
        return DataError(" ".join(dict.fromkeys((text, *places))))


def resolve_sft(section: SftSection, _recipe: Recipe, paths: Paths) -> SftInputs:
    return SftInputs(
        conversations=paths.file("sft.conversations", section.conversations),
        base=paths.model("sft.base", section.base) if section.base is not None else None,
    )


def resolve_feedback(section: FeedbackSection, recipe: Recipe, paths: Paths) -> FeedbackInputs:
    named = section.prompts if isinstance(section.prompts, tuple) else (section.prompts,)
    key, benchmarks = "feedback.prepare.decontaminate", section.prepare.decontaminate
    if benchmarks is None:
        key = "bench.questions"
        benchmarks = () if recipe.bench is None else (recipe.bench.questions,)
    return FeedbackInputs(
        prompts=tuple(paths.rows("feedback.prompts", name) for name in named),
        benchmarks=tuple(paths.rows(key, name) for name in benchmarks),
        candidates=tuple(
            _resolved(candidate, f"feedback.candidates.{number}", paths)
            for number, candidate in enumerate(section.candidates)
        ),
        judge=_needed_judge(recipe, paths),
    )


def resolve_reward(section: RewardSection, recipe: Recipe, paths: Paths) -> RewardInputs:
    return RewardInputs(
        rankings=paths.rows("reward.rankings", section.rankings or "feedback/rankings.jsonl"),
        base=paths.model("reward.base", section.base or _starting_policy(recipe)),
        policy=_reward_policy(section, recipe, paths),
        policy_format=recipe.ppo.chat_format if recipe.ppo is not None else None,
    )


def resolve_ppo(section: PpoSection, recipe: Recipe, paths: Paths) -> PpoInputs:
    prompts = section.prompts or "feedback/prompts.jsonl"
    validation, instructions = section.validation, section.instructions
    return PpoInputs(
        policy=paths.model("ppo.policy", section.policy or _starting_policy(recipe)),
        prompts=paths.rows("ppo.prompts", prompts),
        reward_models=_reward_models(section, paths),
        validation=paths.file("ppo.validation", validation) if validation is not None else None,
        judge=_judge(recipe, paths),
        instructions=paths.file("ppo.instructions", instructions) if instructions else None,
        questions=paths.file("bench.questions", recipe.bench.questions) if recipe.bench else None,
    )


def resolve_bench(section: BenchSection, recipe: Recipe, paths: Paths) -> BenchInputs:
    ppo = recipe.ppo
    baseline = section.baseline or (ppo.policy if ppo is not None else None)
    questions = paths.file("bench.questions", section.questions)
    prompts = references = None
    if section.protocol == "mt-bench":
        _, prompts, references = find_files(questions.parent)
    return BenchInputs(
        questions=questions,
        prompts=prompts,
        references=references,
        checks=paths.rows("bench.checks", section.checks) if section.checks else None,
        baseline=paths.model("bench.baseline", baseline or _starting_policy(recipe)),
        policy=paths.model("bench.policy", section.policy or "ppo/model"),
        reward_model=_reward_models(ppo, paths)[0].model if section.best_of else None,
        judge=_needed_judge(recipe, paths),
    )


def _reward_models(section: PpoSection | None, paths: Paths) -> tuple[RewardSource, ...]:
    """What PPO learns from, with the folders found; without its word, the reward stage's model."""
    if section is None or not section.reward_models:
        named = (section.reward_model if section is not None else None) or "reward/model"
        return (RewardSource(model=paths.model("ppo.reward_model", named)),)
    return tuple(
        source.model_copy(
            update={"model": paths.model(f"ppo.reward_models.{number}.model", source.model)}
        )
        for number, source in enumerate(section.reward_models)
    )


def _reward_policy(section: RewardSection, recipe: Recipe, paths: Paths) -> str | None:
    """Whose samples the scores are normalised on: PPO's start, if the recipe says what that is."""
    named = recipe.ppo.policy if recipe.ppo is not None else None
    has_start = named or recipe.sft or recipe.policy
    if not has_start or not section.policy_samples:
        return None
    return paths.model("ppo.policy", named or _starting_policy(recipe))


def _starting_policy(recipe: Recipe) -> str:
    if recipe.sft is not None:
        return "sft/model"
    assert recipe.policy is not None, "the recipe's validation lets no stage go without its start"
    return recipe.policy


def _needed_judge(recipe: Recipe, paths: Paths) -> JudgeSection:
    judge = _judge(recipe, paths)
    assert judge is not None, "the recipe's validation asks for one"
    return judge


def _judge(recipe: Recipe, paths: Paths) -> JudgeSection | None:
    return None if recipe.judge is None else _resolved(recipe.judge, "judge", paths)


def _resolved(asked: Asked, key: str, paths: Paths) -> Asked:
    """Who is asked, with the folders found: of a model in this process, of a server's tokenizer."""
    found = {}
    if asked.url is None and asked.model is not None:
        found["model"] = paths.model(f"{key}.model", asked.model)
    if asked.tokenizer is not None and asked.tokenizer != "openchat":
        found["tokenizer"] = paths.model(f"{key}.tokenizer", asked.tokenizer)
    return asked.model_copy(update=found)


def hash_inputs(inputs: Any) -> dict[str, dict[str, Any]]:
    """Every input by its name: where it is, and the hash of what it holds."""
    named = ((field.name, getattr(inputs, field.name)) for field in fields(inputs))
    return {name: entry for field, value in named for name, entry in _entries(field, value)}


def _entries(name: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    match value:
        case tuple():
            for number, item in enumerate(value):
                yield from _entries(f"{name}.{number}", item)
        case JudgeSection() | Candidate() | RewardSource():
            settings = value.model_dump(mode="json")
            for field in ("model", "tokenizer"):
                if (path := settings.get(field)) is not None and Path(path).is_absolute():
                    yield from _entries(f"{name}.{field}", settings.pop(field))
            yield name, {"path": None, "sha256": hash_json(settings)}
        case Path():
            yield name, {"path": str(value), "sha256": hash_file(value)}
        # Folders were resolved to absolute paths; what is none names a model elsewhere.
        case str() if Path(value).is_absolute() and Path(value).is_dir():
            yield name, {"path": value, "sha256": hash_tree(Path(value))}
        case _:
            yield name, {"path": value, "sha256": hash_json(value)}
