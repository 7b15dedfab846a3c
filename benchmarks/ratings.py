"""How long a million votes take to be read and rated; beside a plain fit of the same likelihood.

    python benchmarks/ratings.py

Votes between 60 models are drawn from known strengths, a third of them ties.  The plain fit is
scipy's L-BFGS on the same counts, as the arena's own code fits a logistic regression.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from starling.base.battles import Battles, bradley_terry, count_wins, elo, resample_wins
from starling.data.votes import read_votes

NUM_VOTES, NUM_MODELS, ROUNDS = 1_000_000, 60, 100


def draw(seed: int) -> Battles:
    """Battles between models whose true log-strengths are spread evenly over 3."""
    rng = np.random.default_rng(seed)
    strengths = np.linspace(-1.5, 1.5, NUM_MODELS)
    left = rng.integers(NUM_MODELS, size=NUM_VOTES)
    right = (left + rng.integers(1, NUM_MODELS, size=NUM_VOTES)) % NUM_MODELS
    chance = 1 / (1 + np.exp(strengths[right] - strengths[left]))
    won = (rng.random(NUM_VOTES) < chance).astype(float)
    won[rng.random(NUM_VOTES) < 1 / 3] = 0.5
    return Battles(left, right, won, NUM_MODELS)


def plain_fit(wins: np.ndarray) -> np.ndarray:
    """The same maximum by L-BFGS."""

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        gaps = x[:, None] - x
        loses = 1 / (1 + np.exp(gaps))
        unexpected = wins * loses
        return float((wins * np.logaddexp(0, -gaps)).sum()), unexpected.sum(0) - unexpected.sum(1)

    found = minimize(loss, np.zeros(len(wins)), jac=True, method="L-BFGS-B").x
    return found - found.mean()


def main() -> None:
    """Print a line for each part."""
    battles = draw(0)
    words = {1.0: "model_a", 0.0: "model_b", 0.5: "tie"}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "votes.csv"
        rows = zip(battles.left.tolist(), battles.right.tolist(), battles.won.tolist(), strict=True)
        with path.open("w") as file:
            file.write("model_a,model_b,winner\n")
            file.writelines(f"m{left},m{right},{words[won]}\n" for left, right, won in rows)
        parts = {
            "read (CSV)": lambda: read_votes(path, quarantine=Path(name) / "quarantine.jsonl"),
            "count": lambda: count_wins(battles),
            "Bradley-Terry": lambda: bradley_terry(count_wins(battles)),
            "the same by L-BFGS": lambda: plain_fit(count_wins(battles)),
            "Elo": lambda: elo(battles),
            f"{ROUNDS} bootstrap rounds": lambda: [
                bradley_terry(each) for each in resample_wins(battles, ROUNDS, 0)
            ],
        }
        for label, part in parts.items():
            started = time.perf_counter()
            part()
            sys.stdout.write(f"{label:24} {time.perf_counter() - started:8.2f} s\n")
    apart = np.abs(bradley_terry(count_wins(battles)) - plain_fit(count_wins(battles))).max()
    sys.stdout.write(f"largest difference from L-BFGS: {apart:.1e}\n")


if __name__ == "__main__":
    main()
