"""The stages in order: skips what is fresh, redoes what is stale, resumes what was interrupted.

Nothing else hashes or skips.  Stages meet on disk: each reads what `inputs` resolved for it, and
writes to its own folder of the run.

Under torchrun every process comes here.  Rank 0 does all that is said above; the others join it in
the stages that are shared, and wait while it does the rest alone.
"""

import contextlib
import dataclasses
import importlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starling.base.context import Context, context_from_environment, joined_processes
from starling.base.errors import DataError, InputError
from starling.base.files import locked, write_atomically
from starling.base.hashing import hash_json
from starling.base.jsonl import write_json
from starling.base.spending import Spending
from starling.inputs import (
    Paths,
    hash_inputs,
    resolve_bench,
    resolve_feedback,
    resolve_ppo,
    resolve_reward,
    resolve_sft,
)
from starling.manifest import State, begin, finish, read_manifest, restore, state_of, tidy
from starling.recipe import Recipe, RunSection, dump_recipe

logger = logging.getLogger(__name__)

HEADER = "# The resolved recipe of this run, written by starling. Change the one it was run from.\n"


@dataclass(frozen=True)
class Stage:
    """A row of the pipeline: the module whose `run` does the work, imported only then."""

    name: str
    format_version: int
    module: str
    resolve: Callable[[Any, Recipe, Paths], Any]
    is_shared: bool = False
    """Every process runs it, each on a part of the work."""


PIPELINE = (
    Stage("sft", 2, "starling.sft.train", resolve_sft, is_shared=True),
    Stage("feedback", 2, "starling.feedback.run", resolve_feedback),
    Stage("reward", 2, "starling.reward.train", resolve_reward, is_shared=True),
    Stage("ppo", 2, "starling.ppo.train", resolve_ppo, is_shared=True),
    Stage("bench", 1, "starling.bench.run", resolve_bench),
)


@dataclass(frozen=True)
class Job:
    """A stage of this run, resolved: what it reads, where it writes, and its key."""

    stage: Stage
    section: Any
    inputs: Any
    hashes: dict[str, Any]
    out: Path
    key: str


def run_pipeline(
    recipe: Recipe,
    recipe_folder: Path,
    *,
    out: Path,
    only: str | None = None,
    prepare: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run the recipe's stages, or `only` one of them, and return what summary.json then holds.

    `prepare` may write input files: it is called when the run folder is known to be ours alone.
    Raises InputError before anything is trained when an input is missing that no stage will make.
    Processes other than the first leave here, when all is done.
    """
    with joined_processes() as (rank, size):
        if rank == 0:
            return _lead(recipe, recipe_folder, out, only, prepare, is_alone=size == 1)
        _help(recipe, recipe_folder, out, only)
    raise SystemExit(0)


def _help(recipe: Recipe, recipe_folder: Path, out: Path, only: str | None) -> None:
    """Take part in the shared stages that rank 0 finds must run."""
    context = _context(recipe, Spending())
    for stage in _chosen_stages(recipe, only):
        if stage.is_shared and context.most(0):
            section = getattr(recipe, stage.name)
            inputs = stage.resolve(section, recipe, Paths(out.resolve(), recipe_folder.resolve()))
            with context.stop:
                module = importlib.import_module(stage.module)
                module.run(section, inputs, out / stage.name, context)
    # Until rank 0 has ended well, or says why not.
    context.most(0)


def _lead(
    recipe: Recipe,
    recipe_folder: Path,
    out: Path,
    only: str | None,
    prepare: Callable[[], None] | None,
    *,
    is_alone: bool,
) -> dict[str, Any]:
    stages = _chosen_stages(recipe, only)
    with locked(out):
        _keep_recipe(recipe, out)
        if prepare is not None:
            prepare()
        names = list(pending_inputs(recipe, recipe_folder, out, only))
        paths = Paths(out.resolve(), recipe_folder.resolve())
        caps = recipe.run
        spending = Spending(
            caps.prices,
            max_usd=caps.max_usd,
            max_calls=caps.max_calls,
            max_tokens=caps.max_tokens,
        )
        for stage in PIPELINE:
            if stage not in stages:
                _charge(spending, out / stage.name)
        # torch is imported only when there is something to do.
        context = None if is_alone else _context(recipe, spending)
        for stage in stages:
            job = _job(stage, recipe, paths, out)
            state = state_of(job.out, job.key)
            if state is State.FRESH:
                logger.info("%s: nothing changed since %s was made", stage.name, job.out)
                tidy(job.out)
                _charge(spending, job.out)
                if stage.is_shared and context is not None:
                    context.most(0)
                continue
            context = context or _context(recipe, spending)
            _run(job, state, context)
        summary = _summarise(recipe, paths, out, done=names)
        write_json(out / "summary.json", summary)
        if context is not None:
            context.most(0)
    return summary


def _context(recipe: Recipe, spending: Spending) -> Context:
    return context_from_environment(
        recipe.threads, recipe.run.device, seed=recipe.seed, spending=spending
    )


def pending_inputs(
    recipe: Recipe, folder: Path, out: Path, only: str | None = None
) -> dict[str, Any]:
    """What each stage will read, by its name, before the stages have made their own files.

    Raises InputError for an input that no stage will make.
    """
    stages = _chosen_stages(recipe, only)
    kept = () if recipe.sft is None else recipe.sft.keep
    models = ("model", *(f"model-{step}" for step in kept))
    names = [stage.name for stage in stages]
    paths = Paths(out.resolve(), folder.resolve(), pending=names, sft_models=models)
    return {s.name: s.resolve(getattr(recipe, s.name), recipe, paths) for s in stages}


def _charge(spending: Spending, folder: Path) -> None:
    """Count what a stage cost that is not run again; one that is counts its own ledger."""
    manifest = read_manifest(folder) or {}
    for model, spent in manifest.get("spending", {}).items():
        spending.charge(
            model, **{key: spent[key] for key in ("calls", "prompt_tokens", "response_tokens")}
        )


def _chosen_stages(recipe: Recipe, only: str | None) -> list[Stage]:
    present = [stage for stage in PIPELINE if getattr(recipe, stage.name) is not None]
    if only is None:
        return present
    chosen = [stage for stage in present if stage.name == only]
    if not chosen:
        found = ", ".join(stage.name for stage in present)
        raise InputError(f"the recipe has no section {only!r}; it has {found}. Add one to run it.")
    return chosen


def _job(stage: Stage, recipe: Recipe, paths: Paths, out: Path) -> Job:
    section = getattr(recipe, stage.name)
    inputs = stage.resolve(section, recipe, paths)
    hashes = hash_inputs(inputs)
    key = hash_json(
        {
            "stage": stage.name,
            "format_version": stage.format_version,
            "section": section.model_dump(mode="json"),
            "inputs": {name: entry["sha256"] for name, entry in hashes.items()},
            "seed": recipe.seed,
            "threads": recipe.threads,
        }
    )
    return Job(stage, section, inputs, hashes, out / stage.name, key)


def _run(job: Job, state: State, context: Context) -> None:
    name = job.stage.name
    started = datetime.now(UTC)
    if state is State.DAMAGED:
        logger.warning("%s: files in %s changed since; it is made again", name, job.out)
    elif state is not State.ABSENT:
        logger.info("%s: %s", name, state.value)
    if state is not State.INTERRUPTED:
        begin(job.out, job.key)
    if job.stage.is_shared:
        context.most(1)
    else:
        context = dataclasses.replace(context, world_size=1)
    before = context.spending.totals()
    with context.stop:
        module = importlib.import_module(job.stage.module)
        try:
            summary = module.run(job.section, job.inputs, job.out, context)
        except InputError:
            restore(job.out)
            raise
        origin = {"stage": name, "format_version": job.stage.format_version, "key": job.key}
        spent = context.spending.since(before)
        finish(job.out, origin | {"inputs": job.hashes, "spending": spent}, summary, started)
        logger.info("%s: %s", name, summary.sentence)
        context.stop.check()


def _summarise(recipe: Recipe, paths: Paths, out: Path, *, done: list[str]) -> dict[str, Any]:
    """The figures of every finished stage, those left out that earlier stages have outrun."""
    summary = {}
    for stage in PIPELINE:
        manifest = read_manifest(out / stage.name)
        if manifest is None or getattr(recipe, stage.name) is None:
            continue
        fresh = stage.name in done
        with contextlib.suppress(DataError):  # an input of it is gone or half made
            job = _job(stage, recipe, paths, out)
            fresh = fresh or state_of(job.out, job.key) is State.FRESH
        if fresh:
            summary[stage.name] = manifest["summary"]["figures"]
        else:
            logger.warning(
                f"{stage.name}: made from something else, so its figures are left out of "
                f"summary.json; make it again with: starling {stage.name} RECIPE"
            )
    return summary


def _keep_recipe(recipe: Recipe, out: Path) -> None:
    """Write recipe.yaml; one of another seed, or one that is not ours, is never overwritten."""
    path = out / "recipe.yaml"
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        if not text.startswith(HEADER):
            raise InputError(
                f"{path} was not written by a run, and would be overwritten. "
                "Choose another run folder with --out."
            )
        seed = re.search(r"^seed: (\d+)$", text, re.MULTILINE)
        if seed is not None and int(seed[1]) != recipe.seed:
            raise InputError(
                f"{out} is a run of seed {seed[1]}, and this one has seed {recipe.seed}. "
                "Choose another folder with --out, or delete that one."
            )
    settled = recipe.model_copy(update={"run": RunSection()})
    write_atomically(path, [HEADER.encode(), dump_recipe(settled).encode()])
