"""Draw the README's figure from a finished run of `starling demo`.

python tools/readme_figure.py runs/demo docs/demo.png
"""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling.base.errors import DataError
from starling.base.files import write_atomically
from starling.report.figures import BLUE, GREY, draw_against_kl, error_bars, new_figure
from starling.report.read import AFTER, BEFORE, as_estimate, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_figure(run_folder: Path, path: Path) -> Path:
    """Write the README's figure as PNG: gold by category, and gold against sequence KL.

    Raises DataError when the run has no gold by category or none on validation prompts.
    """
    run = read_run(run_folder)
    categories = run.figures("bench").get("by_category", {})
    golds = {name: figures["gold"] for name, figures in categories.items() if "gold" in figures}
    if not golds or not run.validations or run.validations[0].gold is None:
        raise DataError(
            f"{run_folder} has no gold by category, or none on validation prompts: the figure "
            "needs a finished run whose prompts carry checks, such as that of `starling demo`."
        )
    with new_figure(9.0, 3.6) as figure:
        before_after, against_kl = figure.subplots(1, 2)
        _draw_categories(before_after, golds)
        draw_against_kl(against_kl, run, "gold", "gold on validation prompts", BLUE)
        against_kl.set_xlabel("sequence KL to the start, nats (numbers: PPO steps)")
        against_kl.set_title("What KL buys, and costs", loc="left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    write_atomically(path, [buffer.getvalue()])
    return path


def _draw_categories(axes: "Axes", golds: dict[str, Any]) -> None:
    names = list(reversed(golds))
    sides = ((BEFORE, GREY, "o", "before"), (AFTER, BLUE, "s", "after PPO"))
    for policy, color, marker, label in sides:
        found = (as_estimate(golds[name][policy]) for name in names)
        estimates = [estimate for estimate in found if estimate is not None]
        means = [estimate.mean for estimate in estimates]
        bars = {"xerr": error_bars(estimates), "capsize": 3, "linestyle": "none"}
        axes.errorbar(means, names, color=color, marker=marker, label=label, **bars)
    axes.set_xlim(0, 1)
    axes.set_xlabel("gold (0 to 1), sampled, 95 % intervals")
    axes.set_title("Held-out questions", loc="left")
    axes.legend(loc="lower left")


if __name__ == "__main__":
    try:
        print(save_figure(Path(sys.argv[1]), Path(sys.argv[2])))
    except DataError as error:
        sys.exit(f"error: {error}")
