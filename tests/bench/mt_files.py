"""A benchmark of three questions in FastChat's layout, in our own words, and answers to it."""

import json

SINGLE = "[Task]\nRate it, as [[rating]].\n\n[Q]\n{question}\n\n[A]\n{answer}\n[End]"
SINGLE_TWO = "1: {question_1}\nA: {answer_1}\n2: {question_2}\nA: {answer_2}\n"
PAIR = "[Q]\n{question}\n[A]\n{answer_a}\n[B]\n{answer_b}"
PAIR_TWO = "{question_1}|{question_2}\nA: {answer_a_1}|{answer_a_2}\nB: {answer_b_1}|{answer_b_2}"
GUIDE = "\n[R]\n{ref_answer_1}"
GUIDE_TWO = "\n[R]\n{ref_answer_1}\n{ref_answer_2}"


def prompts():
    """The eight prompts under the names that FastChat gives them."""
    rows = []
    for kind, format, one, two in (
        ("single", "[[rating]]", ("single-v1", SINGLE), ("single-v1-multi-turn", SINGLE_TWO)),
        ("pairwise", "[[A]]", ("pair-v2", PAIR), ("pair-v2-multi-turn", PAIR_TWO)),
    ):
        math = {"single": "single-math-v1", "pairwise": "pair-math-v1"}[kind]
        for name, template, system in (
            (one[0], one[1], "You help."),
            (two[0], two[1], "Rate the second turn.\n\n"),
            (math, one[1] + GUIDE, "You help."),
            (f"{math}-multi-turn", two[1] + GUIDE_TWO, "Rate the second turn.\n\n"),
        ):
            rows.append(
                {
                    "name": name,
                    "type": kind,
                    "system_prompt": system,
                    "prompt_template": template,
                    "description": "",
                    "category": "general",
                    "output_format": format,
                }
            )
    return rows


QUESTIONS = (
    {"question_id": 81, "category": "writing", "turns": ["Write {x}.", "Now in capitals."]},
    {"question_id": 111, "category": "math", "turns": ["What is 2+2?", "And 3+3?"]},
    {"question_id": 141, "category": "stem", "turns": ["What is mass?", "And weight?"]},
)


def answer_row(model, question_id, turns):
    choice = {"index": 0, "turns": list(turns)}
    return {
        "question_id": question_id,
        "answer_id": f"{model}-{question_id}",
        "model_id": model,
        "choices": [choice],
        "tstamp": 1700000000.5,
    }


def answers_of(model):
    return [
        answer_row(model, row["question_id"], [f"{model} one {{y}}", f"{model} two"])
        for row in QUESTIONS
    ]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_bench(folder, *models):
    """The whole folder, with the answers of the models; returns it."""
    write_lines(folder / "question.jsonl", QUESTIONS)
    write_lines(folder / "judge_prompts.jsonl", prompts())
    write_lines(folder / "reference_answer" / "gpt-4.jsonl", [answer_row("gpt-4", 111, ["4", "6"])])
    for model in models:
        write_lines(folder / "model_answer" / f"{model}.jsonl", answers_of(model))
    return folder
