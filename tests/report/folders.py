"""Folders of bench results made by hand: of `starling mt-bench`, and of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CATEGORIES = ("writing", "math", "stem")
STAMP = {
    "bench": "mt-bench",
    "mode": "single",
    "judge": "gpt-4",
    "judged": "2026-02-03",
    "rule": "strict",
    "prompts_sha256": "a" * 64,
    "questions_sha256": "b" * 64,
    "references": "official",
    "starling": "0.1.0",
}


def estimate(mean: float, n: int = 6, failed: int = 0) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.5, "high": mean + 0.25, "n": n, "num_failed": failed}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_questions(folder: Path, questions: Sequence[tuple[str, str]]) -> None:
    """Questions 81, 82 ... from (category, first turn); the second turn is "And then?"."""
    rows = [
        {"question_id": 81 + number, "category": category, "turns": [text, "And then?"]}
        for number, (category, text) in enumerate(questions)
    ]
    write_rows(folder / "question.jsonl", rows)


QUESTIONS = tuple((category, f"A question of {category}.") for category in CATEGORIES)


def write_mt_bench(
    folder: Path,
    model: str,
    scores: Sequence[tuple[float, float]],
    questions: Sequence[tuple[str, str]] = QUESTIONS,
    answers: Sequence[str] | None = None,
    **stamp: Any,
) -> Path:
    """What `starling mt-bench` leaves of one model; a score a turn, -1 for none."""
    write_questions(folder, questions)
    said = answers or [f"{model} on {number}" for number in range(len(questions))]
    write_rows(
        folder / "model_answer" / "a.jsonl",
        [
            {"question_id": 81 + number, "answer_id": "x", "model_id": model, "tstamp": 1.5}
            | {"choices": [{"index": 0, "turns": [text, f"{text} again"]}]}
            for number, text in enumerate(said)
        ],
    )
    judge = stamp.get("judge", STAMP["judge"])
    write_rows(
        folder / "model_judgment" / "j_single.jsonl",
        [
            {"question_id": 81 + number, "model": model, "judge": [judge, "single-v1"]}
            | {"user_prompt": "unseen", "score": score, "turn": turn, "tstamp": 1.5}
            | {"judgment": f"Judged: {said[number]} [[{score}]]"}
            for number, pair in enumerate(scores)
            for turn, score in enumerate(pair, start=1)
        ],
    )
    known = [score for pair in scores for score in pair if score >= 0]
    failed = 2 * len(scores) - len(known)
    mean = sum(known) / len(known)
    categories = {category: estimate(mean, 2) for category, _ in questions}
    write_json(
        folder / "scores.json",
        {
            "average": mean,
            "n": len(known),
            "failed": failed,
            "duplicates": 3,
            "estimates": {"average": estimate(mean, len(known), failed)}
            | {"turn1": estimate(mean + 0.25), "turn2": estimate(mean - 0.25)}
            | {"categories": categories},
            "length": {"characters": estimate(1425.0), "words": estimate(227.0)},
            "repeats": None,
            "canaries": None,
            "stamp": STAMP | {"model": model} | stamp,
        },
    )
    return folder


def write_pairwise(folder: Path) -> Path:
    """What `starling mt-bench --mode pairwise` leaves: alpha wins one, and one call contradicts."""
    write_questions(folder, QUESTIONS[:1])
    rows = [
        {"question_id": 81, "model_1": "alpha", "model_2": "beta", "turn": turn, "tstamp": 1.5}
        | {"judge": ["gpt-4", "pair-v2"], "g1_winner": first, "g2_winner": second}
        | {"g1_judgment": f"one {turn}", "g2_judgment": f"two {turn}"}
        for turn, first, second in ((1, "model_1", "model_1"), (2, "model_2", "tie"))
    ]
    write_rows(folder / "model_judgment" / "j_pair.jsonl", rows)
    rates = {"alpha": estimate(0.75, 2), "beta": estimate(0.25, 2)}
    write_json(
        folder / "scores.json",
        {"models": {name: {"win_rate_adjusted": rate} for name, rate in rates.items()}}
        | {"n": 2, "failed": 0, "duplicates": 0, "stamp": STAMP | {"mode": "pairwise"}},
    )
    return folder


def write_run(folder: Path, answers: Mapping[str, Sequence[str]], judge: str = "rubric") -> Path:
    """A run's bench of the policies sft and ppo, whose questions have one turn and gold 0.5."""
    (folder / "bench").mkdir(parents=True)
    section = f"{{kind: endpoint, model: {judge}}}" if judge != "rubric" else "{kind: rubric}"
    (folder / "recipe.yaml").write_text(f"seed: 3\njudge: {section}\n", encoding="utf-8")
    rows, judged = [], []
    for policy, texts in answers.items():
        for decoding in ("sampled", "greedy"):
            rows += [
                {"id": f"b{number}", "split": "bench", "category": "math", "turn": 1}
                | {"policy": policy, "decoding": decoding, "tokens": 7}
                | {"messages": [{"role": "user", "content": f"Question {number}?"}]}
                | {"answer": text if decoding == "sampled" else "greedily"}
                | {"gold": {"total": 0.5}, "finish_reason": "stop"}
                for number, text in enumerate(texts)
            ]
        judged += [
            {"policy": policy, "id": f"b{number}", "turn": 1, "score": 2.0 + number, "text": text}
            for number, text in enumerate(texts)
        ]
    write_rows(folder / "bench" / "answers.jsonl", rows)
    write_rows(folder / "bench" / "judgments.jsonl", judged)
    both = {"sft": estimate(4.0), "ppo": estimate(6.0)}
    shares = {"sft": estimate(0.6), "ppo": estimate(0.7)}
    figures = {"score": both, "score_turn_1": both, "gold": shares, "win_rate": estimate(0.8)}
    figures |= {"tokens_per_answer": {"sft": estimate(15.0), "ppo": estimate(12.0)}}
    write_json(folder / "bench" / "scores.json", figures | {"by_category": {"math": figures}})
    return folder
