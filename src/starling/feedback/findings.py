"""The sentences of an audit: what its tables say, with how sure that is, and what to do.

A finding is {"name", "is_concern", "sentence", "advice"}.  It is of concern only where the whole
interval is, or what chance alone does once in a hundred, or a count is that should be none;
too few rows are said to be too few, and what is not seen is never said not to be there.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Finding = tuple[str, bool, str, str]
"""Name, whether it is of concern, the sentence, and what to do if it is."""

LENGTH_DECIDES = 0.6
"""Share of pairs in order by length alone, from which on length is a rival explanation."""
UNREADABLE, SPOILED = 0.01, 0.1
"""Shares of verdicts without a ranking, and of answers refused or cut, that are too many.

Canaries that leave more wins than SPOILED possible were too few.
"""
TIED = 0.5
"""Share of pairs, from which on most of what was paid for orders nothing."""
AGREEING = 0.5
"""About Kendall's tau of GPT-4 with itself on Nectar's answers."""
FREQUENT = 0.1
"""Share of the rankings that a model has to be in before it is called best or worst."""
ROTATED = (
    "A vote is a single rotation here, and each ranking the mean of all of them, in which what a "
    "place or a letter earns by itself cancels."
)
"""What to know of the votes of a judge of kind logits, whose strategy cannot be chosen."""
NOISE = "Its ranks are mostly noise: "
STRONGER = "use a stronger judge."
UNREAD = "Read the replies in judgments.jsonl; judge.max_tokens may cut them."
ADVICE = {
    "kwise": {
        "position": "Answers are shuffled, so this is noise in the ranks; judge.strategy "
        "kwise-repeated or pairwise takes most of it out.",
    },
    "kwise-repeated": {
        "position": "Each ranking is of several orders, in which most of it cancels; more "
        "judge.repeats leave less of it.",
        "agreement": f"{NOISE}raise judge.repeats, or {STRONGER}",
    },
    "pairwise": {
        "position": "Each pair is shown in both orders, so it ends in ties, not in wrong ranks; a "
        "stronger judge has fewer.",
    },
    "pointwise": {"ties": "judge.strategy kwise puts all answers in an order."},
    "logits": {
        "position": ROTATED,
        "agreement": f"{ROTATED} Where the ranks look wrong all the same, {STRONGER}",
        "unparsed": "It is asked only what its context has room for: leave out what is longer, or "
        "use a judge with a longer context.",
    },
}
"""What to do, by what the judge does already: nothing that it has, or that the recipe refuses."""


def find(tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every finding that the tables allow, in the order in which they are best read."""
    if "judge" in tables:
        found = [*_positions(tables), *_canaries(tables), *_judge(tables)]
    else:
        sentence = "No verdict stands in a judgments.jsonl beside these rankings, so the judge's "
        sentence += "preference for a place, its agreement with itself and what could not be read "
        found = [("unknown", False, sentence + "are not known.", "")]
    found += [*_length(tables), *_models(tables), *_answers(tables)]
    names = ("name", "is_concern", "sentence", "advice")
    return [
        dict(zip(names, (*said, advice if said[1] else ""), strict=True)) for *said, advice in found
    ]


def _advice(tables: Mapping[str, Any], name: str, otherwise: str = NOISE + STRONGER) -> str:
    about = tables.get("about", {})
    kind, strategy = about.get("kind", about.get("judge")), about.get("strategy", "kwise")
    return ADVICE.get("logits" if kind == "logits" else strategy, {}).get(name, otherwise)


def _positions(tables: Mapping[str, Any]) -> Iterator[Finding]:
    for k, table in tables.get("positions", {}).items():
        verdicts, is_biased = table["verdicts"], table["is_biased"]
        shares = {n: place["winner_share"] for n, place in table["places"].items()}
        chance = 1 / len(shares)
        worst = max(shares, key=lambda n: abs(shares[n]["mean"] - chance))
        sentence = (
            f"Of {verdicts} verdicts on {k} answers, the winner stood at place {worst} in "
            f"{_percent(shares[worst])}, where {chance:.0%} show no preference: chi-square is "
            f"{table['chi_square']:.1f}, by chance at most {table['critical_99']:.1f} (99 %)"
        )
        sentence += "." if is_biased else ": none seen, though the interval leaves room for one."
        if is_biased is None:
            sentence = f"{verdicts} verdicts on {k} answers are too few to see whether the judge "
            sentence += "prefers a place."
        yield "position", bool(is_biased), sentence, _advice(tables, "position")


def _canaries(tables: Mapping[str, Any]) -> Iterator[Finding]:
    """They answer nothing, so an honest judge puts them last, and chance excuses no win."""
    found = tables.get("all_canaries")
    if found is not None:
        n, wins, way = found.get("questions", 0), found.get("wins", 0), found.get("way_to_last")
        kinds = [
            f"'{kind}' {each['wins']:.3g} of {each['questions']}"
            for kind, each in tables["canaries"].items()
            if each.get("wins")
        ]
        sentence = f"Of {n} answers that cheat, {wins:.3g} won"
        sentence += f" ({', '.join(kinds)})." if kinds else "."
        if n and not wins:
            missed = 1 - 0.05 ** (1 / n)
            sentence += f" A judge that lets {missed:.0%} of them win could still be missed (95 %)"
            sentence += "; too few were asked." if missed > SPOILED else "."
        if way is not None:
            sentence += f" Between first (0) and last (1) place they stood at {_number(way)}."
        if found["unparsed"]:
            sentence += f" {found['unparsed']} more got no ranking that could be read."
        is_last = way is None or way["low"] is None or way["low"] > 0.5
        advice = "Text that answers nothing can win this judge: use a stronger one, and read what "
        yield "canary", wins > 0 or not is_last, sentence, advice + "PPO writes for it."


def _judge(tables: Mapping[str, Any]) -> Iterator[Finding]:
    judge = tables["judge"]
    unparsed, tau = judge["unparsed"], judge.get("kendall_tau")
    sentence = f"No ranking could be read for {_percent(unparsed)} of {unparsed['n']} prompts."
    if unparsed["mean"]:
        sentence += f" The first: {judge['examples'][0]['reason']}."
    is_concern = (unparsed["low"] or 0) > UNREADABLE
    yield "unparsed", is_concern, sentence, _advice(tables, "unparsed", UNREAD)
    if tau is not None:
        sentence = f"Asked again in another order, the judge agrees with itself to {_number(tau)} "
        sentence += "(Kendall's tau: 1 is always, 0 is chance)."
        is_concern = tau["high"] is not None and tau["high"] < AGREEING
        yield "agreement", is_concern, sentence, _advice(tables, "agreement")


def _length(tables: Mapping[str, Any]) -> Iterator[Finding]:
    wins = tables["all"].get("longer_wins")
    if wins is not None:
        sign = "longer" if wins["mean"] >= 0.5 else "shorter"
        if sign == "shorter":
            turned = (("mean", "mean"), ("low", "high"), ("high", "low"))
            wins = {to: None if wins[of] is None else 1 - wins[of] for to, of in turned}
        sentence = f"The {sign} of two answers is the better ranked one in {_percent(wins)} of the "
        advice = f"A reward model that only learned '{sign} is better' is as right as that: "
        advice += "compare its accuracy with this figure, and watch the length of answers in PPO."
        yield "length", (wins["low"] or 0) > LENGTH_DECIDES, sentence + "pairs.", advice


def _models(tables: Mapping[str, Any]) -> Iterator[Finding]:
    models = tables["models"].items()
    ranks = {name: model["mean_rank"] for name, model in models if "mean_rank" in model}
    about, most = tables.get("about", {}), FREQUENT * tables["all"]["rankings"]
    named = [name for name in ranks if ranks[name]["n"] >= most and ranks[name]["low"] is not None]
    if len(named) > 1:
        named.sort(key=lambda name: ranks[name]["mean"])
        best, worst = named[0], named[-1]
        sentence = (
            f"By mean rank {best} is the best of the {len(named)} frequent models "
            f"({_number(ranks[best])}) and {worst} the worst ({_number(ranks[worst])})"
        )
        overlap = ranks[best]["high"] >= ranks[worst]["low"]
        sentence += "; the intervals overlap, so they may be equally good." if overlap else "."
        if ranks[best]["mean"] == ranks[worst]["mean"]:
            sentence = f"The {len(named)} frequent models have the same mean rank, "
            sentence += f"{_number(ranks[best])}."
        yield "models", False, sentence, ""
    for name in sorted({*about.get("own", ()), about.get("judge")} & set(ranks)):
        others = [rank for other, rank in ranks.items() if other != name]
        number = sum(rank["n"] for rank in others) or 1
        mean = sum(rank["mean"] * rank["n"] for rank in others) / number
        sentence = (
            f"The judge ranks answers of its own model ({name}) at {_number(ranks[name])} in the "
            f"mean, others at {mean:.2f}; whether they are better, it cannot say itself."
        )
        is_concern = (ranks[name]["high"] or mean) < mean
        advice = "Have another judge rank some of these prompts, and compare."
        yield "own answers", is_concern, sentence, advice


def _answers(tables: Mapping[str, Any]) -> Iterator[Finding]:
    answers, everything = tables["answers"], tables["all"]
    repeated, good = everything["repeated_prompts"], everything.get("good_natured")
    given, known = answers["given"], answers["known_to_end"]
    for name, of, said, advice in (
        ("refused", given, "open with a refusal", "Read some: refusing is learnt too."),
        ("truncated", known, "were cut by their limit", "Raise the candidates' max_tokens."),
    ):
        share = answers[name] / of if of else 0.0
        sentence = f"{answers[name]} of {of} answers ({share:.1%}) {said}."
        if of < given:
            sentence = sentence.removesuffix(".") if of else "Whether answers were cut is not known"
            sentence += f"; {given - of} do not say how they ended."
        yield name, share > SPOILED, sentence, advice
    if good is not None:
        sentence = f"The judge called {_percent(good)} of {good['n']} conversations good-natured."
        yield "good-natured", False, sentence, ""
    tied, pairs = tables["pairs"]["tied"], sum(tables["pairs"].values())
    if pairs:
        advice = "A tie teaches nothing: " + _advice(tables, "ties", STRONGER)
        sentence = f"{tied} of {pairs} pairs of answers ({tied / pairs:.1%}) are ties."
        yield "ties", tied > TIED * pairs, sentence, advice
    sentence = f"{repeated} rankings repeat an earlier prompt but for case and signs, and "
    sentence += f"{answers['repeated']} answers another one of their prompt."
    advice = "feedback.prepare.duplicates: nectar makes one prompt of those with equal checks, "
    advice += "with the answers of all."
    yield "duplicates", repeated > 0, sentence, advice


def _number(estimate: Mapping[str, Any], form: str = ".2f") -> str:
    """`1.27 [1.22 to 1.33]`; values that are all alike say nothing about their spread."""
    low, high = estimate["low"], estimate["high"]
    spread = "" if low is None or low == high else f" [{low:{form}} to {high:{form}}]"
    return f"{estimate['mean']:{form}}{spread}"


def _percent(share: Mapping[str, Any]) -> str:
    return _number(share, ".1%")
