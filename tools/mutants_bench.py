"""The mutants of the bench; see `mutants.py`."""

CHANGES = {
    ("bench/mt_bench/protocol.py", "tests/bench/test_mt_protocol.py"): [
        (
            "texts[number - 1]\n            for name, texts in ((",
            "texts[0]\n            for name, texts in ((",
        ),
        (
            '{"question": question.turns[0], "answer": answers[0]}',
            '{"question": question.turns[0], "answer": answers[-1]}',
        ),
        (
            '"answer_a": first[0], "answer_b": second[0]',
            '"answer_a": second[0], "answer_b": first[0]',
        ),
        ('("answer_a", first),', '("answer_a", second),'),
        ("name = names[is_guided] +", "name = names[0] +"),
        ('"-multi-turn" if turn == 2', '"-multi-turn" if turn == 1'),
        ("len(found) < len(question.turns)", "len(found) < 1"),
        ("if question.category not in NEED_REFERENCE", "if question.category != 'math'"),
        ("_DOUBLE.search(text) or _SINGLE.search(text)", "_SINGLE.search(text)"),
        ("_DOUBLE.search(text) or _SINGLE.search(text)", "_DOUBLE.search(text)"),
        ("LOWEST <= score <= HIGHEST", "0 <= score <= HIGHEST"),
        ("LOWEST <= score <= HIGHEST", "LOWEST <= score"),
        ("LOWEST <= score <= HIGHEST", "LOWEST <= score < HIGHEST"),
        ("LOWEST <= score <= HIGHEST", "LOWEST < score <= HIGHEST"),
        (
            r'_DOUBLE = re.compile(r"\[\[(\d+\.?\d*)\]\]", re.ASCII)',
            r'_DOUBLE = re.compile(r"\[\[(\d+)\]\]", re.ASCII)',
        ),
        ('"[[A]]": "A", "[[B]]": "B"', '"[[B]]": "B", "[[A]]": "A"'),
        ("if mark in reply.text", "if mark[1:-1] in reply.text"),
        ("enumerate(texts, start=1)", "enumerate(texts, start=0)"),
    ],
    ("bench/mt_bench/figures.py", "tests/bench/test_mt_bench.py"): [
        (
            "[row for row in rows if row.turn == n] for n in (1, 2)",
            "[row for row in rows if row.turn != n] for n in (1, 2)",
        ),
        ("num_failed=len(rows) - len(scores))", "num_failed=0)"),
        ("if row.category == name], seed", "if True], seed"),
        ("if row.repeat == number and", "if"),
        ("stdev(scores) ** 2", "stdev(scores)"),
        ("winner == first\n", "winner != first\n"),
        ("win + tie / 2", "win + tie"),
        (
            "row.g1_winner != row.g2_winner for row in read",
            "row.g1_winner == row.g2_winner for row in read",
        ),
        ("len(read) - sum(wins) - sum(ties)", "len(read) - sum(wins)"),
        ('"failed": len(own) - len(read)', '"failed": 0'),
        ("len(text.split())) for id", "len(text)) for id"),
    ],
    ("bench/mt_bench/count.py", "tests/bench/test_mt_bench.py"): [
        ("if row.score < 0:", "if False:"),
        ("elif strict and not", "elif False and not"),
        ("elif strict and not", "elif not"),
        ("if (each.question_id, turn) not in judged", "if False"),
        ("len(own) - len(set(keys))", "0"),
        ("if len(judges) == 1", "if judges"),
        ("row.model == (options.model or names[0])", "True"),
        (
            'row.model_1: "model_a", row.model_2: "model_b"',
            'row.model_1: "model_b", row.model_2: "model_a"',
        ),
    ],
    ("bench/mt_bench/judge.py", "tests/bench/test_mt_bench.py"): [
        ("(pair, pair[::-1])", "(pair, pair)"),
        (
            '_winner(second.verdict, "model_2", "model_1")',
            '_winner(second.verdict, "model_1", "model_2")',
        ),
        (
            "retries=2 if strict else 0)\n    return [\n        SingleJudgment",
            "retries=2)\n    return [\n        SingleJudgment",
        ),
        ("read_score if strict else read_any_score", "read_score"),
        ("read_score if strict else read_any_score", "read_any_score"),
        ("score=FAILED if judgment.verdict is None", "score=0 if judgment.verdict is None"),
        ("Sampling(JUDGE_TOKENS, 0.0, seed=repeat)", "Sampling(JUDGE_TOKENS, 0.0, seed=0)"),
        ("Sampling(JUDGE_TOKENS, 0.0, seed=repeat)", "Sampling(JUDGE_TOKENS, 0.7, seed=repeat)"),
        ("for name in answers if name != baseline", "for name in answers"),
    ],
    ("bench/asking.py", "tests/bench/test_mt_bench.py"): [
        ("judgment.verdict is None and not _is_silence(outcome)", "not _is_silence(outcome)"),
        (
            'derive_seed(sampling.seed, "bench/retry", attempt) if attempt else',
            "sampling.seed if attempt else",
        ),
        ("num_replies == 0 and len(found) >= HOPELESS", "False"),
        ("len(reasons) > allowed * total", "False"),
        ("for attempt in range(retries + 1)", "for attempt in range(retries)"),
    ],
    ("bench/mt_bench/run.py", "tests/bench/test_mt_bench.py"): [
        ("if found not in (None, *names)", "if False"),
        ('for stale in ("scores.json", "results.md")', "for stale in ()"),
        ("if options.plan:", "if False:"),
    ],
    ("bench/mt_bench/answers.py", "tests/bench/test_mt_bench.py"): [
        ("if name in found", "if False"),
        ('"last" if options.like_fastchat else options.duplicates', "options.duplicates"),
        ("is_mt_bench=True", "is_mt_bench=False"),
    ],
    ("bench/answers.py", "tests/bench/test_mt_bench.py"): [
        ("text.strip() for id", "text for id"),
        ("self.room(messages) // turns_left", "self.room(messages)"),
        ("TEMPERATURES.get(category, OTHER_TEMPERATURE)", "OTHER_TEMPERATURE"),
    ],
    ("data/fastchat.py", "tests/data/test_fastchat.py"): [
        ('if key not in by_key or rule == "last"', "if True"),
        ("score.is_integer()", "score.is_integer() and False"),
        ("or _official_references(folder)", "or None"),
        ("official if official in found else found[0]", "found[0]"),
    ],
}
