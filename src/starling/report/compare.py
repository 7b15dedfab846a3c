"""`starling compare`: one self-contained page about several benches, side by side.

The same files give the same bytes.  Where two scores do not rest on the same judge, prompts,
questions, references and rule, the page says so before it shows them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from starling.base.errors import DataError
from starling.base.files import write_atomically
from starling.report import figures
from starling.report.benches import Model, read_models
from starling.report.html import as_written, browser_data, image, render

HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
"""One in hex, and what of it is shown."""


class Difference(NamedTuple):
    """Something that scores depend on and that is not the same for all, with who has which."""

    what: str
    values: tuple[tuple[str, tuple[str, ...]], ...]


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write the page about the models of all folders to the file `out`.

    Raises DataError for a folder given twice, without results, or damaged.
    """
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise DataError(f"{folder} is given twice; give each folder once")
    if not folders:
        raise DataError("no folder is given; name a run's folder, or one of `starling mt-bench`")
    found: list[tuple[Path, Model]] = []
    for folder, place in zip(folders, places, strict=True):
        with as_written(folder):
            found += [(place, model) for model in read_models(folder)]
    models = _with_names_of_their_own(found)
    with as_written(*folders):
        page = _render(models)
    write_atomically(out, [page.encode()])
    return out


def _render(models: Sequence[Model]) -> str:
    return render(
        "compare.html.j2",
        models=models,
        differences=list(differences(models)),
        categories=list(dict.fromkeys(name for each in models for name in each.categories)),
        chart=image(figures.draw_categories(models)),
        num_colors=len(figures.COLORS),
        browser=browser_data([each.name for each in models], [each.turns for each in models]),
    )


def differences(models: Sequence[Model]) -> Iterator[Difference]:
    """What the models' scores do not have in common."""
    for what in models[0].stamp:
        named: dict[str, list[str]] = {}
        for model in models:
            value = HASH.sub(r"\1", str(model.stamp[what] or "unknown"))
            named.setdefault(value, []).append(model.name)
        judges = {model.stamp["judge"] for model in models}
        if len(named) > 1 and (what != "judge's settings" or len(judges) == 1):
            yield Difference(what, tuple((value, tuple(who)) for value, who in named.items()))


def _with_names_of_their_own(found: Sequence[tuple[Path, Model]]) -> list[Model]:
    """The models; those whose name another has too are called by their folder as well."""
    count = Counter(model.name for _, model in found)
    folders = dict.fromkeys(place for place, _ in found)
    depth = 1
    while len({place.parts[-depth:] for place in folders}) < len(folders):
        depth += 1
    return [
        model
        if count[model.name] == 1
        else model._replace(name=f"{model.name} ({'/'.join(place.parts[-depth:])})")
        for place, model in found
    ]
