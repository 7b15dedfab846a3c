"""report.html on a small run folder made here: complete, alone, escaped, and the same twice."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from starling.base.errors import DataError
from starling.data.reward_pairs import RewardPair
from starling.report.page import write_report
from starling.report.read import read_run
from starling.reward.dataset import RankedRow
from starling.reward.evaluate import evaluate, evaluate_pairs

CATEGORIES = ("math", "writing")
PERFECT = "Sure, nine. Thanks!"
EVIL = "<script>alert('x')</script> & \"more\""


def estimate(mean: float, n: int = 8) -> dict:
    return {"mean": mean, "low": mean - 0.11, "high": mean + 0.12, "n": n, "num_failed": 0}


def both(before: float, after: float) -> dict:
    return {"sft": estimate(before), "ppo": estimate(after)}


def bench_figures(shift: float) -> dict:
    return {
        "gold": both(0.4 + shift, 0.7 + shift),
        "gold_greedy": both(0.5 + shift, 0.8 + shift),
        "score": both(4.3 + shift, 7.4 + shift),
        "tokens_per_answer": both(15.2 + shift, 13.7 + shift),
        "win_rate": estimate(0.75 + shift),
    }


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def summary() -> dict:
    return {
        "bench": bench_figures(0.05)
        | {"by_category": {name: bench_figures(i / 50) for i, name in enumerate(CATEGORIES)}},
        "reward": {"pair_accuracy": estimate(0.83), "length_only_accuracy": estimate(0.61)},
        "ppo": {"selected_step": 10, "kl_target": 1.0, "sequence_kl": estimate(0.9)},
    }


def validation_rows(step: int) -> list[dict]:
    """Gold is 0 for an empty answer, and 1 for one that is right, kind, well formed and short."""
    answers = {0: ("", "") * 4, 10: (PERFECT, PERFECT) * 4, 20: (PERFECT, "") * 4}
    return [
        {"id": f"v{row}", "category": "math", "answer": answer, "finished": True}
        | {"checks": {"contains_all": ["nine"]}, "kl": step / 10, "score": step / 20, "rating": 5.0}
        for row, answer in enumerate(answers[step])
    ]


def answer_rows() -> list[dict]:
    return [
        {"id": f"b-{name}", "category": name, "split": "bench", "turn": turn, "policy": policy}
        | {"decoding": decoding, "finish_reason": "stop", "tokens": 7}
        | {"messages": [{"role": "user", "content": f"{name} question"}], "answer": EVIL}
        | {"gold": {"correctness": 1.0, "style": 0.5, "brevity": 1.0, "total": 0.825}}
        for policy in ("sft", "ppo", "best_of_4")
        for decoding in ("sampled", "greedy")
        for name in CATEGORIES
        for turn in (1, 2)
    ]


def audit() -> dict:
    shares = {str(n): {"winner_share": estimate(share)} for n, share in enumerate((0.5, 0.3, 0.2))}
    table = {"verdicts": 30, "places": shares}
    table |= {"chi_square": 4.2, "critical_99": 9.2, "is_biased": False}
    group = {"mean_rank": estimate(1.7), "win_share": estimate(0.4)}
    return {
        "findings": [
            {"name": "position", "is_concern": False, "sentence": "It is calm.", "advice": ""},
            {"name": "length", "is_concern": True, "sentence": "Longer wins.", "advice": EVIL},
        ],
        "positions": {"3": table},
        "models": {EVIL: group, "late": group},
        "length": {"5 of 5": group},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_json(folder / "summary.json", summary())
    (folder / "recipe.yaml").write_text("seed: 3\njudge: {kind: rubric}\n", encoding="utf-8")
    for step in (0, 10, 20):
        write_rows(folder / "ppo" / "validation" / f"step-{step:06d}.jsonl", validation_rows(step))
    write_rows(
        folder / "ppo" / "metrics.jsonl",
        [
            {"step": step, "ppo/response_tokens": 14.0 - step / 9, "ppo/end_rate": 0.95}
            for step in range(1, 21)
        ],
    )
    write_json(folder / "feedback" / "audit.json", audit())
    write_rows(folder / "bench" / "answers.jsonl", answer_rows())
    manifest(folder, "sft", f"Tuned a policy -> {folder / 'sft' / 'model'}", seconds=12.5)
    return folder


def write_evaluation(folder: Path, prompts: int = 12) -> dict:
    """What the reward stage writes: three answers a prompt, the middle one scored too high."""
    rows = [
        RankedRow(str(n), ((1,), (2,), (3,)), (1, 2, 3), (90, 50, 70), EVIL, 1.0, str(n // 2 * 2))
        for n in range(prompts)
    ]
    scores = [[0.5, 1.0, -1.0]] * prompts
    found = evaluate(rows, scores, seed=0)
    write_json(folder / "reward" / "evaluation.json", found)
    write_rows(
        folder / "reward" / "held_out.jsonl",
        [
            {"id": row.id, "rank": rank, "score": score, "chars": chars, "source": EVIL}
            for row in rows
            for rank, score, chars in zip((1, 2, 3), scores[0], row.answer_chars, strict=True)
        ],
    )
    return found


def manifest(folder: Path, stage: str, sentence: str, *, seconds: float) -> None:
    write_json(
        folder / stage / "manifest.json",
        {"stage": stage, "key": "k", "format_version": 1, "inputs": {}, "outputs": {}}
        | {"summary": {"sentence": sentence, "figures": {}}}
        | {"started": "2026-01-01T10:00:00+00:00", "seconds": seconds},
    )


class Page(HTMLParser):
    """Tags, table cells and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._cell: str | None = None
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = ""
        if tag == "small" and self._cell is not None:
            self._cell += "|"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.rows[-1].append(self._cell)
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self._cell += data


def test_the_page_loads_nothing_from_outside(run: Path) -> None:
    page = Page(write_report(run))
    addresses = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action")
    ]
    assert len(addresses) == 4
    assert all(value is not None and value.startswith("data:image/svg") for value in addresses)
    assert not {"link", "iframe"} & {tag for tag, _ in page.tags}
    assert "@import" not in page.text
    assert "url(" not in page.text


def test_the_same_run_in_another_folder_gives_the_same_bytes_but_for_the_clock(
    run: Path, tmp_path: Path
) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    elsewhere = run.rename(tmp_path / "elsewhere")
    manifest(elsewhere, "sft", f"Tuned a policy -> {elsewhere / 'sft' / 'model'}", seconds=99.0)
    second = write_report(elsewhere).read_bytes()

    def without_clock(page: bytes) -> list[bytes]:
        return [line for line in page.splitlines() if b'class="clock"' not in line]

    assert first != second
    assert without_clock(first) == without_clock(second)
    assert str(tmp_path).encode() not in second


def test_the_table_holds_the_numbers_of_summary_json(run: Path) -> None:
    page = Page(write_report(run))
    figures = summary()["bench"]
    named = {**figures["by_category"], "all": figures}
    for row in page.rows[2 : 2 + len(named)]:
        source = named.pop(row[0].partition("|")[0])
        expected = [
            (source[key][side], decimals)
            for key, decimals in (
                ("gold", 2),
                ("gold_greedy", 2),
                ("score", 2),
                ("tokens_per_answer", 1),
            )
            for side in ("sft", "ppo")
        ]
        expected.append((source["win_rate"], 2))
        for cell, (figure, places) in zip(row[1:], expected, strict=True):
            mean, interval = cell.split("|")
            assert mean == f"{figure['mean']:.{places}f}"
            assert interval == f"{figure['low']:.{places}f} to {figure['high']:.{places}f}"
    assert not named


def test_what_rules_found_and_how_cheating_fared_stand_below_the_table(run: Path) -> None:
    plain = write_report(run).read_text(encoding="utf-8")
    assert "by rule, greedy" not in plain
    assert "Cheating answers" not in plain
    figures = summary()
    kept = {"instruction_strict": estimate(0.31), "tokens": estimate(12.25)}
    figures["bench"]["checks"] = {
        "policies": {"sft": kept, "ppo": kept | {"instruction_strict": estimate(0.87)}},
        "change": {"ppo": {"instruction_strict": estimate(0.56)}},
    }
    fared = {"asked": 9, "won": 1.5, "unread": 2, "by_kind": {}}
    figures["bench"]["canaries"] = {"ratings": fared}
    write_json(run / "summary.json", figures)
    page = Page(write_report(run))
    [row] = [row for row in page.rows if row[0].startswith("instructions kept")]
    assert row == [
        "instructions kept|n 8",
        "0.31|0.20 to 0.43",
        "0.87|0.76 to 0.99",
        "0.56|0.45 to 0.68",
    ]
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "Cheating answers, ratings: 1.5 of 9 won, 2 could not be read." in text


def test_answers_are_text_whatever_they_hold(run: Path) -> None:
    manifest(run, "bench", "<img src=x onerror=alert(1)>", seconds=1.0)
    path = write_report(run)
    content = path.read_text(encoding="utf-8")
    # The questions' data and what shows them: nothing else is a script.
    assert content.count("<script") == content.count("</script") == 2
    assert "<img src=x" not in content
    assert EVIL in Page(path).text


def test_every_judged_answer_is_listed_beside_the_one_before(run: Path) -> None:
    judged = [
        {"policy": policy, "id": "b-math", "turn": turn, "score": score, "text": EVIL}
        for policy, turn, score in (("sft", 1, 4.5), ("ppo", 1, 8.0), ("ppo", 2, 9.0))
    ]
    write_rows(run / "bench" / "judgments.jsonl", judged)
    content = write_report(run).read_text(encoding="utf-8")
    [data] = re.findall(r'<script type="application/json" id="data">(.*)</script>', content)
    assert json.loads(data)["models"] == ["before (sft)", "after (ppo)"]
    math, writing = json.loads(data)["questions"]
    assert math["turns"] == ["math question"] * 2
    before, after = math["answers"]
    assert [turn["answer"] for turn in before] == [EVIL] * 2
    assert [turn["gold"] for turn in after] == [0.825] * 2
    assert [turn["score"] for turn in (*before, *after)] == [4.5, None, 8.0, 9.0]
    assert after[0]["judgments"] == [["8", EVIL]]
    assert [turn["score"] for turn in writing["answers"][1]] == [None, None]


def test_gold_is_graded_from_the_validation_answers(run: Path) -> None:
    points = read_run(run).validations
    golds = [point.gold.mean for point in points if point.gold]
    assert golds == pytest.approx([0.0, 1.0, 0.5])
    assert [point.step for point in points] == [0, 10, 20]


def test_the_judges_findings_are_told_those_of_concern_first_with_what_to_do(run: Path) -> None:
    page = Page(write_report(run))
    assert f"Longer wins. {EVIL}" in page.text
    assert page.text.index("Longer wins.") < page.text.index("It is calm.")
    expected = ["8", "1.70|1.59 to 1.82", "0.40|0.29 to 0.52"]
    tables = {row[0]: row[1:] for row in page.rows}
    assert [tables[name] for name in (EVIL, "late", "5 of 5")] == [expected] * 3


def test_the_reward_model_has_a_table_and_four_charts_of_its_own(run: Path) -> None:
    write_evaluation(run)
    page = Page(write_report(run))
    tables = {row[0]: row[1:] for row in page.rows if row}
    # Of a prompt's three pairs the first two are in order 0 and 1, the outer one 1.
    assert tables["all"][0] == "36"
    assert tables["all"][1].startswith("0.667|")
    assert tables["neighbours in the ranking"] == ["24", "0.500|0.500 to 0.500"]
    assert tables["2 places apart"] == ["12", "1.000|1.000 to 1.000"]
    assert tables["the better answer is longer"] == ["24", "0.500|0.500 to 0.500"]
    assert tables["the better answer is shorter"] == ["12", "1.000|1.000 to 1.000"]
    assert tables[f"from {EVIL}"] == tables["all"]
    assert tables["by length alone"] == ["36", "0.667|0.667 to 0.667"]
    assert sum(tag == "img" for tag, _ in page.tags) == 8
    assert "12 rankings of 6 prompts" in page.text
    assert "agree on 1.000 of the pairs" in page.text
    # By hand: the model picks the second of three, whose standing is a half.
    assert "Of 3: 0.500, where the judge's own pick has 1.000 and chance 0.5." in page.text
    assert "No evaluation" not in page.text


def test_a_run_without_an_evaluation_says_so_and_has_no_more_charts(run: Path) -> None:
    page = Page(write_report(run))
    assert "No evaluation of a reward model in this run." in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 4


def test_an_evaluation_without_its_answers_lacks_only_their_chart(run: Path) -> None:
    write_evaluation(run)
    (run / "reward" / "held_out.jsonl").unlink()
    page = Page(write_report(run))
    assert "No held-out answers in this run." in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 7


def test_figures_that_nothing_says_are_left_out(run: Path) -> None:
    row = RankedRow("a", ((1,), (2,)), (1, 2), (5, 5), None, 1.0, "a")
    found = evaluate([row], [[0.0, 0.0]], seed=0)
    write_json(run / "reward" / "evaluation.json", found)
    text = Page(write_report(run)).text
    assert "the better answer is longer" not in text
    assert "Kendall's tau none" in text
    assert "No answers were ranked twice" in text


def test_more_answers_than_a_chart_bears_leave_the_page_as_light(run: Path) -> None:
    write_evaluation(run)
    row = {"id": "a", "rank": 1, "score": 0.5, "chars": 9, "source": None}
    path = run / "reward" / "held_out.jsonl"
    write_rows(path, [row | {"id": str(n // 3), "chars": n + 1} for n in range(1500)])
    many = write_report(run).stat().st_size
    write_rows(path, [row | {"id": str(n // 3), "chars": n + 1} for n in range(15000)])
    assert 0.8 * many < write_report(run).stat().st_size < 1.2 * many


def test_an_interval_that_misses_its_mean_by_rounding_can_be_drawn(run: Path) -> None:
    found = write_evaluation(run)
    found["best_of_n"][0]["model"] |= {"mean": 0.5, "low": 0.5 + 2e-16, "high": 0.5 - 2e-16}
    write_json(run / "reward" / "evaluation.json", found)
    write_report(run)


def test_a_pair_file_has_a_row_a_subset_beside_the_blind_rules(run: Path) -> None:
    pairs = [
        RewardPair.model_validate({"prompt": q, "chosen": c, "rejected": "no", "subset": EVIL})
        for q, c in (("p", "yes"), ("q", "certainly"), ("r", "y"), ("s", "ja"))
    ]
    scores = [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 0.0)]
    write_json(run / "reward" / "pairs.json", evaluate_pairs(pairs, scores, seed=0))
    page = Page(write_report(run))
    rows = [row for row in page.rows if row[0] == EVIL and len(row) == 5]
    assert rows[0][1] == "4"
    assert rows[0][2].startswith("0.75|")
    # Longer: two of four, one equal.
    assert rows[0][3:] == ["0.62", "0.38"]
    assert [row[1:] for row in page.rows if row[0] == "all"][-1] == rows[0][1:]
    assert "each counted once: 0.750" in page.text


def test_too_few_verdicts_are_not_called_fair(run: Path) -> None:
    report = audit()
    report["positions"]["3"]["is_biased"] = None
    write_json(run / "feedback" / "audit.json", report)
    text = Page(write_report(run)).text
    assert "too few verdicts to tell" in text
    assert "no bias seen" not in text


def test_a_bias_that_is_not_seen_is_not_said_not_to_be_there(run: Path) -> None:
    assert (
        "no bias seen, but such as the bars leave room for could be missed"
        in Page(write_report(run)).text
    )


def test_a_model_whose_answers_are_all_unranked_has_no_mean_rank(run: Path) -> None:
    report = audit()
    report["models"]["late"] = {"win_share": estimate(0.0)}
    write_json(run / "feedback" / "audit.json", report)
    tables = {row[0]: row[1:] for row in Page(write_report(run)).rows}
    assert tables["late"][:2] == ["8", "none|"]


def test_ratings_have_an_audit_though_no_places(run: Path) -> None:
    write_json(run / "feedback" / "audit.json", {**audit(), "positions": {}})
    text = Page(write_report(run)).text
    assert "No verdict with places in this run." in text
    assert "No judge audit" not in text


def test_an_answer_that_was_cut_is_graded_as_cut(run: Path) -> None:
    cut = [row | {"finished": False} for row in validation_rows(10)]
    write_rows(run / "ppo" / "validation" / "step-000010.jsonl", cut)
    gold = read_run(run).validations[1].gold
    assert gold is not None
    assert 0 < gold.mean < 1


def test_overoptimisation_is_said_where_it_happens(run: Path) -> None:
    text = Page(write_report(run)).text
    assert "Step 10 of 20 was kept" in text
    assert "highest at step 10 (1.000)" in text
    assert "rises, from 0.50 to 1.00 at step 20, where gold is 0.500: over-optimisation" in text


def change_scores(run: Path, step: int, scores: list[float]) -> None:
    rows = validation_rows(step)
    changed = [row | {"score": score} for row, score in zip(rows, scores, strict=True)]
    write_rows(run / "ppo" / "validation" / f"step-{step:06d}.jsonl", changed)


def test_a_rise_of_the_score_within_the_noise_of_the_prompts_is_none(run: Path) -> None:
    said = "the reward-model score does not rise after it by more than the noise of these prompts"
    # Rises of 0.009 each; then of +1 and -0.8 in turn, 0.1 in the mean: an interval around 0.
    for scores in ([0.509] * 8, [1.5, -0.3] * 4):
        change_scores(run, 20, scores)
        text = Page(write_report(run)).text
        assert said in text
        assert ": over-optimisation" not in text
    # The same mean rise is one where every prompt has it.
    change_scores(run, 20, [0.6] * 8)
    assert (
        "rises, from 0.50 to 0.60 at step 20, where gold is 0.500: over-"
        in Page(write_report(run)).text
    )


def test_the_score_of_prompts_that_differ_is_compared_prompt_by_prompt(run: Path) -> None:
    # Apart by 20 among prompts, by 0.1 on each of them: the two intervals overlap almost whole.
    for step, rise in ((10, 0.0), (20, 0.1)):
        change_scores(run, step, [20.0 * (row % 2) + rise for row in range(8)])
    assert "rises, from 10.00 to 10.10 at step 20" in Page(write_report(run)).text


def test_a_score_that_was_higher_before_the_best_gold_is_no_rise(run: Path) -> None:
    change_scores(run, 0, [2.0] * 8)
    assert "rises, from 0.50 to 1.00 at step 20" in Page(write_report(run)).text
    change_scores(run, 20, [0.5] * 8)
    assert "does not rise after it" in Page(write_report(run)).text


def test_gold_that_is_not_told_from_its_highest_is_no_overoptimisation(run: Path) -> None:
    rows = validation_rows(20)
    # One prompt of eight is worse, and a third of the resamples miss it: (7 / 8) ** 8 = 0.34.
    kept = [row | {"answer": PERFECT if n else ""} for n, row in enumerate(rows)]
    write_rows(run / "ppo" / "validation" / "step-000020.jsonl", kept)
    text = Page(write_report(run)).text
    assert "where gold is 0.875, which these prompts do not tell from its highest: no over-" in text


def flag(step: int, guard: str, **rest: object) -> dict:
    return {"step": step, "guard": guard} | rest | {"sentence": f"{guard}. {EVIL}"}


def test_flags_have_a_row_a_guard_with_its_first_and_how_many_follow(run: Path) -> None:
    assert "No guard was raised in 20 iterations." in Page(write_report(run)).text
    rows = [
        flag(5, "max_length_correlation", found=0.987654, limit=0.9),
        flag(6, "max_length_correlation", found=0.99, limit=0.9),
        flag(6, "finite"),
        flag(9, "max_length_correlation", found=0.995, limit=0.9),
    ]
    for action, done in (("warn", "learned from"), ("skip", "left the batches out")):
        write_rows(run / "ppo" / "flags.jsonl", [row | {"action": action} for row in rows])
        page = Page(write_report(run))
        assert done in page.text
    first = ["max_length_correlation", "5|and 2 more, the last 9", "0.988", "0.9"]
    second = ["finite", "6", "not finite", "none"]
    named = [row for row in page.rows if row[0] in ("finite", "max_length_correlation")]
    assert named == [[*row, f"{row[0]}. {EVIL}"] for row in (first, second)]
    assert "4 flags in 20 iterations" in page.text
    assert "No guard was raised" not in page.text


def test_missing_files_are_said_to_be_missing(run: Path) -> None:
    said = {
        "bench/answers.jsonl": "No answers of a bench in this run.",
        "feedback/audit.json": "No judge audit in this run.",
        "ppo/metrics.jsonl": "No PPO metrics in this run.",
        "sft/manifest.json": "No finished sft in this run.",
    }
    whole = Page(write_report(run)).text
    for name in said:
        (run / name).unlink()
    rest = Page(write_report(run)).text
    assert [sentence in whole for sentence in said.values()] == [False] * 4
    assert [sentence in rest for sentence in said.values()] == [True] * 4


def test_a_run_of_nothing_but_a_recipe_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 3\n", encoding="utf-8")
    text = Page(write_report(tmp_path)).text
    for said in ("No bench", "No PPO validations", "No reward-model accuracy", "No finished ppo"):
        assert said in text


def test_figures_left_out_of_the_summary_are_marked(run: Path) -> None:
    write_json(run / "summary.json", {"reward": summary()["reward"]})
    text = Page(write_report(run)).text
    assert "The stage ppo has no figures in summary.json" in text
    assert "The bench has no figures in summary.json" in text
    assert "No bench in this run." in text


def test_a_run_without_checks_has_no_gold_and_still_a_page(run: Path) -> None:
    for path in (run / "ppo" / "validation").iterdir():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        write_rows(path, [{k: v for k, v in row.items() if k != "checks"} for row in rows])
    figures = summary()
    for part in (figures["bench"], *figures["bench"]["by_category"].values()):
        del part["gold"], part["gold_greedy"]
    write_json(run / "summary.json", figures)
    page = Page(write_report(run))
    assert "no gold to compare with" in page.text
    assert page.rows[2][1:5] == ["none|"] * 4
    assert "no gold" in draw_readme_figure(run, run / "figure.png").stderr
    assert not (run / "figure.png").exists()


def test_what_is_no_run_folder_or_damaged_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="is no run folder"):
        write_report(empty)
    with (run / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 21"):
        write_report(run)


def test_json_of_another_shape_is_refused_without_a_traceback(run: Path) -> None:
    write_rows(run / "bench" / "answers.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match="not as a run writes it"):
        write_report(run)


def draw_readme_figure(run: Path, path: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(__file__).resolve().parents[2] / "tools" / "readme_figure.py"
    command = [sys.executable, str(tool), str(run), str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_readme_figure_is_a_wide_png_and_the_same_twice(run: Path, tmp_path: Path) -> None:
    draw_readme_figure(run, tmp_path / "figure.png")
    first = (tmp_path / "figure.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert int.from_bytes(first[16:20], "big") == 1800
    draw_readme_figure(run, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == first


def test_the_charts_carry_no_date_and_no_address_to_load(run: Path) -> None:
    import base64

    content = write_report(run).read_text(encoding="utf-8")
    for encoded in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", content):
        svg = base64.b64decode(encoded).decode()
        assert "<metadata" not in svg
        assert not re.search(r'(?:href|src)="(?!#)', svg)


def test_the_caption_of_a_chart_gives_its_figures_as_people_write_them(run: Path) -> None:
    content = write_report(run).read_text(encoding="utf-8")
    assert "better answer scores higher: 0.83 [0.72, 0.95] n=8." in content
    assert "gives 0.61 [0.50, 0.73] n=8." in content
    assert "Estimate(" not in content
