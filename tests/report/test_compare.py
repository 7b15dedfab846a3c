"""compare.html on folders made here: complete, alone, escaped, honest about what differs."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from report.folders import (
    QUESTIONS,
    STAMP,
    write_json,
    write_mt_bench,
    write_pairwise,
    write_rows,
    write_run,
)
from starling.base.errors import DataError
from starling.report.compare import write_comparison

ALPHA = [(9, 7), (4, -1), (10, 10)]
BETA = [(5, 7), (4, 6), (8.5, 10)]


class Page(HTMLParser):
    """Tags with attributes, rows of cells, the visible text, and the scripts' texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts.append(data)
        elif "style" in self._open:
            self.styles.append(data)
        else:
            self.text += data
            if {"td", "th"} & set(self._open):
                self.rows[-1][-1] += f"{'|' if 'small' in self._open else ''}{data.strip()}"

    @property
    def data(self) -> dict[str, Any]:
        """What the browser of questions shows."""
        return json.loads(self.scripts[0])


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [
        write_mt_bench(tmp_path / "one", "alpha", ALPHA),
        write_mt_bench(tmp_path / "two", "beta", BETA),
    ]


def compare(folders: list[Path]) -> Page:
    return Page(write_comparison(folders, folders[0].parent / "compare.html"))


def test_the_headline_has_every_count_beside_the_score(two: list[Path]) -> None:
    page = compare(two)
    headings, alpha, beta = page.rows[:3]
    assert headings[-5:] == ["an answer's length", "n", "failed", "duplicates", "judge"]
    # 9 + 7 + 4 + 10 + 10 over five, and one that failed.
    assert alpha[:3] == ["Aalpha", "8.00|7.50 to 8.25, 1 failed", "8.25|7.75 to 8.50"]
    assert alpha[4:8] == ["1,425 characters|227 words", "5", "1", "3"]
    assert alpha[8].startswith("gpt-4|mt-bench, single,|judged 2026-02-03")
    assert beta[0] == "Bbeta"
    assert beta[1] == "6.75|6.25 to 7.00"
    assert "win rate" not in headings
    assert "gold" not in headings
    assert "must not be compared" not in page.text


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("judge", "gpt-4-turbo", "judge"),
        ("prompts_sha256", "c" * 64, "prompts"),
        ("questions_sha256", "d" * 64, "questions"),
        ("references", "mine.jsonl sha256:1", "references"),
        ("rule", "FastChat's", "rule"),
    ],
)
def test_scores_that_rest_on_something_else_are_not_shown_without_a_warning(
    tmp_path: Path, field: str, value: str, said: str
) -> None:
    one = write_mt_bench(tmp_path / "one", "alpha", ALPHA)
    other = write_mt_bench(tmp_path / "two", "beta", BETA, **{field: value})
    page = compare([one, other])
    assert "These scores must not be compared" in page.text
    found = re.search(rf"{said}: (.*)", page.text)
    assert found is not None
    assert "(alpha)" in found[1]
    assert "(beta)" in found[1]
    assert value[:12] in found[1]
    assert page.text.count("(alpha)") == 1


def test_the_date_and_the_version_alone_are_no_difference(tmp_path: Path) -> None:
    one = write_mt_bench(tmp_path / "one", "alpha", ALPHA)
    other = write_mt_bench(tmp_path / "two", "beta", BETA, judged="2027-01-01", starling="9")
    assert "must not be compared" not in compare([one, other]).text


def test_a_stamp_that_lacks_something_is_not_taken_for_the_same(tmp_path: Path) -> None:
    one = write_mt_bench(tmp_path / "one", "alpha", ALPHA)
    other = write_mt_bench(tmp_path / "two", "beta", BETA, references=None)
    assert "references: official (alpha); unknown (beta)" in compare([one, other]).text


def test_the_browser_has_both_turns_of_all_models_with_score_and_judgment(
    two: list[Path],
) -> None:
    data = compare(two).data
    assert data["models"] == ["alpha", "beta"]
    assert [question["category"] for question in data["questions"]] == ["writing", "math", "stem"]
    second = data["questions"][1]
    assert second["turns"] == ["A question of math.", "And then?"]
    alpha, beta = second["answers"]
    assert [turn["answer"] for turn in alpha] == ["alpha on 1", "alpha on 1 again"]
    assert [turn["score"] for turn in alpha] == [4, None]
    assert [turn["score"] for turn in beta] == [4, 6]
    assert alpha[0]["judgments"] == [["4", "Judged: alpha on 1 [[4]]"]]
    assert alpha[1]["judgments"][0][0] == "no score: the reply could not be read"


def test_a_score_off_the_scale_is_none_unless_counted_as_fastchat_does(tmp_path: Path) -> None:
    strict = write_mt_bench(tmp_path / "one", "alpha", [(70, 1)], QUESTIONS[:1])
    lax = write_mt_bench(tmp_path / "two", "beta", [(70, 1)], QUESTIONS[:1], rule="FastChat's")
    alpha, beta = compare([strict, lax]).data["questions"][0]["answers"]
    assert alpha[0]["score"] is None
    assert alpha[0]["judgments"][0][0] == "no score: 70 is off the scale"
    assert beta[0]["score"] == 70
    assert alpha[1]["score"] == 1


def test_repeated_judgments_are_all_shown_and_their_mean_is_the_score(two: list[Path]) -> None:
    path = two[0] / "model_judgment" / "j_single.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    write_rows(path, [*rows, {**rows[0], "score": 4, "repeat": 1}])
    turn = compare(two).data["questions"][0]["answers"][0][0]
    assert turn["score"] == 6.5
    assert [label for label, _ in turn["judgments"]] == ["9", "4"]


def test_judgments_of_another_judge_or_model_in_the_same_folder_are_not_mixed_in(
    two: list[Path],
) -> None:
    path = two[0] / "model_judgment" / "j_single.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    others = [{**row, "judge": ["other", "p"], "score": 1} for row in rows]
    others += [{**row, "model": "gamma", "score": 1} for row in rows]
    write_rows(path, rows + others)
    first = compare(two).data["questions"][0]["answers"][0]
    assert [turn["score"] for turn in first] == [9, 7]


def test_questions_of_one_number_but_other_words_are_kept_apart(tmp_path: Path) -> None:
    one = write_mt_bench(tmp_path / "one", "alpha", ALPHA)
    others = [("writing", "Something else."), *QUESTIONS[1:]]
    other = write_mt_bench(tmp_path / "two", "beta", BETA, others)
    questions = compare([one, other]).data["questions"]
    assert [question["id"] for question in questions] == ["81", "82", "83", "81"]
    assert [len(turns) for turns in questions[0]["answers"]] == [2, 0]
    assert [len(turns) for turns in questions[3]["answers"]] == [0, 2]


def test_a_pairwise_folder_gives_win_rates_and_both_orders_of_every_call(tmp_path: Path) -> None:
    page = compare([write_pairwise(tmp_path / "pairs")])
    assert "win rate" in page.rows[0]
    at = page.rows[0].index("win rate")
    assert page.rows[1][at].startswith("0.75|0.25 to 1.00")
    assert page.rows[1][1].startswith("none")
    alpha, beta = page.data["questions"][0]["answers"]
    assert [label for label, _ in alpha[0]["judgments"]] == [
        "against beta, shown first: won",
        "against beta, shown second: won",
    ]
    assert [label for label, _ in beta[1]["judgments"]] == [
        "against alpha, shown second: won",
        "against alpha, shown first: tied",
    ]
    assert [text for _, text in beta[1]["judgments"]] == ["one 2", "two 2"]
    assert "No scores by category" in page.text


def test_a_run_gives_its_two_policies_and_only_sampled_answers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"sft": ["low", "mid"], "ppo": ["high", "top"]})
    page = compare([run])
    assert page.data["models"] == ["sft", "ppo"]
    answers = [question["answers"] for question in page.data["questions"]]
    assert [[turns[0]["answer"] for turns in both] for both in answers] == [
        ["low", "high"],
        ["mid", "top"],
    ]
    assert answers[1][0][0] | {"judgments": None} == {
        "answer": "mid",
        "score": 3.0,
        "gold": 0.5,
        "judgments": None,
    }
    sft, ppo = page.rows[1], page.rows[2]
    at = page.rows[0].index("win rate")
    assert sft[at] == "none"
    assert ppo[at] == "0.80|0.30 to 1.05|against sft"
    assert ppo[at + 1] == "0.70|0.20 to 0.95"
    assert ppo[at + 2] == "12 tokens"
    # One turn a question: there is no second to score.
    assert sft[3] == "none"


def test_a_run_beside_mt_bench_is_warned_of(tmp_path: Path, two: list[Path]) -> None:
    run = write_run(tmp_path / "run", {"sft": ["a"], "ppo": ["b"]})
    page = compare([run, two[0]])
    assert "judge: rubric (sft, ppo); gpt-4 (alpha)" in page.text
    assert "bench: a run's own (sft, ppo); mt-bench (alpha)" in page.text


def test_models_of_one_name_are_called_by_their_folders_too(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / part / "demo", {"sft": ["a"], "ppo": ["b"]}) for part in ("x", "y")
    ]
    alone = write_mt_bench(tmp_path / "one", "alpha", ALPHA)
    names = compare([*runs, alone]).data["models"]
    assert names == [
        "sft (x/demo)",
        "ppo (x/demo)",
        "sft (y/demo)",
        "ppo (y/demo)",
        "alpha",
    ]


def test_a_judgment_that_is_missing_is_said_to_be_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"sft": ["a"], "ppo": ["b"]})
    (run / "bench" / "judgments.jsonl").unlink()
    turn = compare([run]).data["questions"][0]["answers"][0][0]
    assert turn["score"] is None
    assert turn["judgments"] == [["no score: no verdict that could be read", ""]]


def test_scores_without_answers_have_a_page_that_says_so(two: list[Path]) -> None:
    for folder in two:
        shutil.rmtree(folder / "model_answer")
        shutil.rmtree(folder / "model_judgment")
    data = compare(two).data
    assert (
        data["questions"][0]["answers"][0]
        == [{"answer": None, "score": None, "gold": None, "judgments": []}] * 2
    )
    for folder in two:
        (folder / "question.jsonl").unlink()
    page = compare(two)
    assert "No answers in these folders." in page.text
    assert page.scripts == []


def test_a_length_that_is_not_known_is_said_to_be_unknown(two: list[Path]) -> None:
    path = two[0] / "scores.json"
    scores = json.loads(path.read_text(encoding="utf-8"))
    del scores["length"]
    write_json(path, scores)
    assert compare(two).rows[1][4] == "unknown"


def test_seven_runs_and_one_alone_have_a_page(tmp_path: Path) -> None:
    folders = [
        write_mt_bench(tmp_path / f"f{n}", f"model {n}", [(n + 1, n + 2)] * 3) for n in range(8)
    ]
    page = compare(folders)
    assert len(page.rows[0]) == 9
    assert [row[0] for row in page.rows[1:9]] == [f"{'ABCDEFGH'[n]}model {n}" for n in range(8)]
    assert page.tags.count(("span", {"class": "key key0"})) == 3 * 2
    assert compare(folders[:1]).data["models"] == ["model 0"]


def test_the_same_folders_give_the_same_bytes(two: list[Path], tmp_path: Path) -> None:
    first = compare(two).source
    assert compare(two).source == first
    moved = [folder.rename(tmp_path / f"moved-{folder.name}") for folder in two]
    assert compare(moved).source == first
    assert str(tmp_path) not in first


def test_the_chart_draws_the_table(two: list[Path]) -> None:
    svg = ElementTree.fromstring(chart_of(compare(two)))
    texts = ["".join(node.itertext()) for node in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert [name for name in texts if name in ("writing", "math", "stem")] == [
        "writing",
        "math",
        "stem",
    ]
    fills = re.findall(r"fill: (#\w{6})", chart_of(compare(two)))
    assert fills.count("#0072b2") == fills.count("#d55e00") == 3


def chart_of(page: Page) -> str:
    [address] = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert address is not None
    return base64.b64decode(address.partition("base64,")[2]).decode()


def test_names_of_categories_that_are_no_xml_or_formulas_can_be_drawn(tmp_path: Path) -> None:
    names = ["$\\frac{$", "\x00\x0b\ufffe", "<&>\"'", "\u202ex", "_hidden"]
    questions = [(name, "Why?") for name in names]
    page = compare([write_mt_bench(tmp_path / "one", "$\\frac{$", [(1, 2)] * 5, questions)])
    svg = ElementTree.fromstring(chart_of(page))
    texts = ["".join(node.itertext()) for node in svg.iter("{http://www.w3.org/2000/svg}text")]
    expected = ["$\\frac{$", "???", "<&>\"'", "?x", "_hidden"]
    assert [text for text in texts if text in expected] == expected


def test_a_folder_without_results_is_refused_with_what_to_give(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="holds no results of a bench. Give a run's folder"):
            write_comparison([folder], tmp_path / "compare.html")
    assert not (tmp_path / "compare.html").exists()


def test_a_folder_given_twice_and_none_at_all_are_refused(two: list[Path]) -> None:
    out = two[0].parent / "compare.html"
    again = two[0].parent / "two" / ".." / "one"
    with pytest.raises(DataError, match="is given twice"):
        write_comparison([two[0], two[1], again], out)
    with pytest.raises(DataError, match="no folder is given"):
        write_comparison([], out)


@pytest.mark.parametrize(
    "scores",
    [
        [],
        {"average": 1},
        {"stamp": STAMP | {"model": "alpha"}},
        {"stamp": STAMP | {"model": "alpha"}, "duplicates": 0, "estimates": {"average": [1]}},
        {"stamp": "x"},
    ],
)
def test_json_of_another_shape_is_refused_without_a_traceback(
    two: list[Path], scores: object
) -> None:
    write_json(two[0] / "scores.json", scores)
    with pytest.raises(DataError, match=r"one is not as a run writes it .*again"):
        compare(two)


def test_figures_that_are_no_numbers_are_refused(two: list[Path]) -> None:
    path = two[0] / "scores.json"
    scores = json.loads(path.read_text(encoding="utf-8"))
    scores["estimates"]["average"]["mean"] = "8"
    write_json(path, scores)
    with pytest.raises(DataError, match="not as a run writes it"):
        compare(two)


def test_a_damaged_file_is_named(two: list[Path]) -> None:
    (two[0] / "scores.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"scores\.json is damaged"):
        compare(two)
    write_json(two[0] / "scores.json", {})
    shutil.copy(two[1] / "scores.json", two[0] / "scores.json")
    with (two[0] / "model_judgment" / "j_single.jsonl").open("a") as file:
        file.write('{"question_id": ')
    with pytest.raises(DataError, match=r"j_single\.jsonl are bad"):
        compare(two)


def test_the_page_names_no_address_and_allows_only_its_own_style_and_script(
    two: list[Path],
) -> None:
    page = compare(two)
    assert "http:" not in page.source.replace("http-equiv", "")
    assert "https:" not in page.source
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        for name in ("src", "href", "srcset", "data", "action", "formaction", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/svg+xml;base64,")
    names = [tag for tag, _ in page.tags]
    assert not {"link", "iframe", "object", "embed", "base"} & set(names)
    assert names.count("script") == 2
    [policy] = [
        attributes["content"]
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives == {
        "default-src": "'none'",
        "style-src": hash_of("".join(page.styles)),
        "script-src": hash_of(page.scripts[1]),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # A policy counts from where it stands: before everything that it is about.
    assert names.index("style") > next(n for n, (_, a) in enumerate(page.tags) if "http-equiv" in a)


def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_script_parses_no_html() -> None:
    script = Path(__file__).parents[2] / "src" / "starling" / "report" / "browser.js"
    banned = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|DOMParser|fetch"
    assert not re.search(banned, script.read_text(encoding="utf-8"))


@pytest.mark.real_data
def test_three_models_with_gpt4s_judgments_make_a_light_page(
    test_data: Path, tmp_path: Path
) -> None:
    folder = test_data / "mt_bench"
    outs = []
    for path in sorted((folder / "model_judgment").glob("*_single.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        model = rows[0]["model"]
        out = write_mt_bench(tmp_path / model, model, [(1, 1)])
        shutil.copy(folder / "question.jsonl", out)
        shutil.copy(folder / "model_answer" / f"{model}.jsonl", out / "model_answer" / "a.jsonl")
        shutil.copy(path, out / "model_judgment" / "j_single.jsonl")
        outs.append(out)
    page = compare(outs)
    assert len(page.source.encode()) < 3_000_000
    assert len(page.data["questions"]) == 80
    for place, out in enumerate(outs):
        turns = [turn for each in page.data["questions"] for turn in each["answers"][place]]
        path = out / "model_judgment" / "j_single.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        known = [row["score"] for row in rows if row["score"] >= 0]
        assert len(turns) == 160
        assert sum(turn["score"] for turn in turns) == pytest.approx(sum(known))
