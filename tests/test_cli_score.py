"""`starling score`: a file of conversations as scores, a file of pairs as accuracies."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from starling import cli
from starling.data.reward_pairs import RewardPair
from starling.models.reward_model import RewardModel, Score
from starling.reward import score
from starling.reward.score import ROWS_AT_ONCE

TEXTS = [("Hi", "No."), ("Hi", "It is four"), ("What is 2 + 2?", "x" * 300), ("Hi", "Yes?")]


def messages(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Four conversations in the working folder: plain, another mode, too long, cut."""
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": messages(*text)} for text in TEXTS]
    rows[0] |= {"id": "first"}
    rows[1] |= {"id": 2, "mode": "Code", "category": "unknown columns are ignored"}
    rows[3] |= {"finish_reason": "length"}
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "conversations.jsonl"


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@torch.no_grad()
def test_each_conversation_is_a_line_with_its_scores(reward_folder, file, capsys):
    assert cli.main(["score", str(reward_folder), "--file", file]) == 0
    rows = lines(capsys.readouterr().out)
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    written = [
        f"{mode} User: {question}<|end_of_turn|>{mode} Assistant: {answer}{end}"
        for (question, answer), mode, end in zip(
            TEXTS,
            ("GPT4 Correct", "Code", "GPT4 Correct", "GPT4 Correct"),
            ("<|end_of_turn|>", "<|end_of_turn|>", "<|end_of_turn|>", ""),
            strict=True,
        )
    ]
    for row, text in zip(rows, written, strict=True):
        ids = tokenizer(text).input_ids
        expected = float(model(torch.tensor([ids[-256:]])).logits)
        assert list(row) == ["id", "score", "raw_score", "num_tokens", "was_cut"]
        assert row["raw_score"] == pytest.approx(expected, abs=1e-5)
        assert (row["num_tokens"], row["was_cut"]) == (min(256, len(ids)), len(ids) > 256)
    assert [row["id"] for row in rows[:2]] == ["first", "2"]
    assert [row["was_cut"] for row in rows] == [False, False, True, False]


def test_scores_go_to_a_file_in_parts_of_the_same_order(reward_folder, file, capsys, monkeypatch):
    assert ROWS_AT_ONCE > 4
    cli.main(["score", str(reward_folder), "--file", file])
    at_once = lines(capsys.readouterr().out)
    monkeypatch.setattr(score, "ROWS_AT_ONCE", 3)
    assert cli.main(["score", str(reward_folder), "--file", file, "--out", "to/scores.jsonl"]) == 0
    assert capsys.readouterr().out == "4 scores -> to/scores.jsonl\n"
    with open("to/scores.jsonl") as written:
        in_parts = lines(written.read())
    assert [row.pop("id") for row in in_parts] == [row.pop("id") for row in at_once]
    for one, other in zip(in_parts, at_once, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_run_folder_stands_for_its_reward_model(reward_folder, file, tmp_path, capsys):
    (tmp_path / "run" / "reward").mkdir(parents=True)
    (tmp_path / "run" / "reward" / "model").symlink_to(reward_folder)
    cli.main(["score", "run", "--file", file])
    found = capsys.readouterr().out
    cli.main(["score", str(reward_folder), "--file", file])
    assert found == capsys.readouterr().out != ""


def test_bad_rows_are_put_aside(reward_folder, file, tmp_path, capsys):
    rows = (tmp_path / file).read_text().splitlines() * 30
    bad = {"messages": messages("Hi", "No.")[:1], "id": "unanswered"}
    (tmp_path / file).write_text("\n".join([*rows, json.dumps(bad)]))
    assert (
        cli.main(["score", str(reward_folder), "--file", file, "--out", "made/scores.jsonl"]) == 0
    )
    assert "1 of 121 rows" in capsys.readouterr().err
    [aside] = lines((tmp_path / "made" / "quarantine.jsonl").read_text())
    assert aside["line"] == 121
    assert "the last message is the user's" in aside["reason"]
    assert len(lines((tmp_path / "made" / "scores.jsonl").read_text())) == 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --file conversations.jsonl or --pairs FILE"),
        (["--file", "conversations.jsonl", "--pairs", "x"], "Give --file conversations.jsonl or"),
        (["--file", "absent.jsonl"], "there is no absent.jsonl"),
        (["--file", "conversations.jsonl", "--device", "tpu"], "device is 'tpu'"),
        (["--file", "conversations.jsonl", "--url", "nowhere"], "found 'nowhere'; it must look"),
    ],
)
def test_what_cannot_be_scored_is_refused(reward_folder, file, arguments, message, capsys):
    assert cli.main(["score", str(reward_folder), *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_a_language_model_is_no_reward_model(policy_folder, file, capsys):
    assert cli.main(["score", str(policy_folder), "--file", file]) == 2
    assert "found a MistralForCausalLM" in capsys.readouterr().err


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "Hi", "chosen": better, "rejected": worse, "subset": subset}
        for subset, better, worse in (
            ("short", "No.", "It is four"),
            ("short", "4", "Yes?"),
            ("long", "x" * 40, "Hi"),
        )
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_pairs_give_a_table_by_subset_beside_the_longer_answers(
    reward_folder, pairs, tmp_path, capsys
):
    arguments = ["score", str(reward_folder), "--pairs", "pairs.jsonl", "--out", "figures.json"]
    assert cli.main(arguments) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    sides = [messages(row["prompt"], row[side]) for row in pairs for side in ("chosen", "rejected")]
    text = "".join(json.dumps({"messages": side}) + "\n" for side in sides)
    (tmp_path / "sides.jsonl").write_text(text)
    cli.main(["score", str(reward_folder), "--file", "sides.jsonl"])
    scores = [row["score"] for row in lines(capsys.readouterr().out)]
    won = [better > worse for better, worse in zip(scores[::2], scores[1::2], strict=True)]
    short, long = sum(won[:2]) / 2, float(won[2])
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name, mean, number, longer in (
        ("short", short, "2", "0.000"),
        ("long", long, "1", "1.000"),
    ):
        [row] = [row for row in table if row[0] == name]
        assert (row[1], row[2], row[-1]) == (number, f"{mean:.3f}", longer)
        assert figures["subsets"][name]["accuracy"]["mean"] == mean
    [everything] = [row for row in table if row[0] == "all"]
    assert everything[1:3] == ["3", f"{sum(won) / 3:.3f}"]
    assert table[-1] == f"mean of the subsets: {(short + long) / 2:.3f}".split()


REWARD_BENCH = {
    "Chat": {
        "alpacaeval-easy": 2,
        "alpacaeval-length": 1,
        "alpacaeval-hard": 1,
        "mt-bench-easy": 1,
        "mt-bench-med": 1,
    },
    "Chat Hard": {
        "mt-bench-hard": 1,
        "llmbar-natural": 3,
        "llmbar-adver-neighbor": 1,
        "llmbar-adver-GPTInst": 1,
        "llmbar-adver-GPTOut": 1,
        "llmbar-adver-manual": 1,
    },
    "Safety": {
        "refusals-dangerous": 1,
        "refusals-offensive": 1,
        "xstest-should-refuse": 1,
        "xstest-should-respond": 4,
        "donotanswer": 1,
    },
    "Reasoning": {
        "math-prm": 2,
        **{f"hep-{name}": 164 for name in ("cpp", "go", "java", "js", "python", "rust")},
    },
}


class Lengths(RewardModel):
    """Scores an answer by its length."""

    def __init__(self):
        pass

    def score_each(self, items):
        for item in items:
            text = item.messages[-1].content
            yield Score(float(len(text)), float(len(text)), len(text), False)


def make_pairs(won):
    """Pairs of every subset, of which those in `won` are the longer ones."""
    return [
        RewardPair.model_validate(
            {"prompt": f"{subset} {n}", "chosen": "x" * (3 if subset in won else 1)}
            | {"rejected": "yy", "subset": subset}
        )
        for sizes in REWARD_BENCH.values()
        for subset, size in sizes.items()
        for n in range(size)
    ]


def test_rewardbenchs_sections_weigh_by_pairs_and_mathematics_as_much_as_code():
    won = {"alpacaeval-easy", "llmbar-natural", "xstest-should-respond", "math-prm"}
    figures = score.measure_pairs(Lengths(), make_pairs(won))
    expected = {"Chat": 2 / 6, "Chat Hard": 3 / 8, "Safety": 4 / 8, "Reasoning": 984 / (2 * 984)}
    assert figures["sections"] == pytest.approx(expected)
    assert figures["rewardbench"] == pytest.approx(sum(expected.values()) / 4)
    table = score.as_table(figures)
    assert "RewardBench, Chat Hard: 0.375" in table
    assert f"RewardBench, mean of the sections: {figures['rewardbench']:.3f}" in table


def test_a_section_that_lacks_a_subset_has_no_score():
    pairs = [pair for pair in make_pairs(set()) if pair.subset != "donotanswer"]
    figures = score.measure_pairs(Lengths(), pairs)
    assert set(figures["sections"]) == {"Chat", "Chat Hard", "Reasoning"}
    assert figures["rewardbench"] is None
    assert "mean of the sections" not in score.as_table(figures)


def test_a_tie_is_no_win_and_is_counted():
    sides = (("xxx", "yy"), ("xx", "yy"), ("x", "yy"), ("zz", "yy"))
    pairs = [
        RewardPair.model_validate({"prompt": f"{n}", "chosen": one, "rejected": other})
        for n, (one, other) in enumerate(sides)
    ]
    figures = score.measure_pairs(Lengths(), pairs)
    assert figures["all"]["accuracy"]["mean"] == 0.25
    assert figures["ties"] == 2
    assert "2 pairs have equal scores, which is no win" in score.as_table(figures)


def test_the_score_of_a_served_model_is_normalised_here(reward_folder, file, capsys, monkeypatch):
    from starling.models.served_reward import Classifier

    monkeypatch.setattr(Classifier, "served_models", lambda self: ["m"])
    monkeypatch.setattr(Classifier, "classify", lambda self, ids: [float(len(x)) for x in ids])
    arguments = ["score", str(reward_folder), "--file", file, "--url", "http://localhost:8000"]
    assert cli.main(arguments) == 0
    rows = lines(capsys.readouterr().out)
    assert [row["raw_score"] for row in rows] == [row["num_tokens"] for row in rows]


def test_pairs_that_were_cut_are_counted(reward_folder, pairs, tmp_path, capsys):
    long = {"prompt": "Hi", "chosen": "x" * 300, "rejected": "No."}
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    assert cli.main(["score", str(reward_folder), "--pairs", "pairs.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 8 conversations were cut"
