"""The command line: parses, calls, prints.  What a command does stands where it calls.

Results go to stdout, everything else to stderr.  Exit status: 0; 1 for a bug of ours, with its
traceback; 2 for something a user can fix; 130 or 143 when stopped.
"""

import difflib
import io
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from starling import __version__
from starling import bench_verbs as verbs
from starling.base.errors import InputError, StarlingError, Stopped, visible
from starling.demo.world import write_world
from starling.options import parse_options
from starling.pipeline import run_pipeline
from starling.recipe import (
    Recipe,
    dump_recipe,
    load_recipe,
    packaged_recipes,
    packaged_text,
    validate_recipe,
)


class Command(NamedTuple):
    """A verb: what follows it, what it does, and the function whose signature says its options."""

    usage: str
    summary: str
    call: Callable[..., None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdin, sys.stdout):
        # Bytes that are no text, and text that a terminal cannot show, must not end the program.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with _messages():
        try:
            _dispatch(list(sys.argv[1:] if arguments is None else arguments))
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader left (`| head`): nothing more can be said, at exit neither.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 128 + signal.SIGPIPE
        except Stopped as error:
            print("Stopped. The same command goes on from here.", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("Stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
            return 130
        except StarlingError as error:
            print(f"error: {visible(str(error))}", file=sys.stderr)
            return error.exit_code
    return 0


def _dispatch(arguments: list[str]) -> None:
    verb, rest = (arguments or ["--help"])[0], arguments[1:]
    if verb in ("-h", "--help"):
        print(_overview())
    elif verb == "--version":
        print(f"starling {__version__}")
    elif verb in COMMANDS:
        command = COMMANDS[verb]
        if command.call in PARSED_BY_ITSELF:
            command.call(verb, rest)
        else:
            parse_options(command.call, verb, rest)
    else:
        near = difflib.get_close_matches(verb, COMMANDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(COMMANDS)}."
        raise InputError(f"there is no command {verb!r}. {hint}")


def _overview() -> str:
    named = {f"{verb} {command.usage}": command.summary for verb, command in COMMANDS.items()}
    width = max(map(len, named))
    lines = "\n".join(f"  {usage:{width}}  {summary}" for usage, summary in named.items())
    return (
        "usage: starling COMMAND ...\n\nAI rankings into a better chat model.\n\n"
        f"{lines}\n\nRECIPE is a path, or one of {', '.join(packaged_recipes())}.\n"
        "starling run RECIPE --help lists every setting, with the recipe's value."
    )


def _demo(*, seed: int = 0, out: Path = Path("runs/demo")) -> None:
    """Run the whole recipe on a small offline world that it makes itself.

    Args:
        seed: Another seed makes another world, and another run of everything.
        out: Run folder; one of another seed is refused.
    """
    tree = load_recipe("demo").recipe.model_dump(mode="json") | {"seed": seed}
    recipe = validate_recipe(tree, "demo")

    def make_world() -> None:
        if not (out / "data").exists():
            temporary = out / ".tmp-data"
            shutil.rmtree(temporary, ignore_errors=True)
            write_world(temporary, seed=seed)
            temporary.rename(out / "data")

    _print_gains(run_pipeline(recipe, out, out=out, prepare=make_world))
    _write_report(out)
    print(f"Talk to it:  starling chat {out}")


def _run(verb: str, arguments: list[str]) -> None:
    """`run` does all stages of a recipe, a stage's name only that one."""
    if arguments and arguments[0] in ("-h", "--help"):
        arguments = ["demo", *arguments]
    if not arguments or arguments[0].startswith("-"):
        raise InputError(
            f"which recipe? It comes first: starling {verb} RECIPE [--ppo.kl-coef 0.02 ...]\n"
            f"RECIPE is a path, or one of {', '.join(packaged_recipes())}."
        )
    source, *rest = arguments
    loaded = load_recipe(source)

    def run(
        recipe: Annotated[Recipe, tyro.conf.arg(name="")] = loaded.recipe,
        *,
        out: str | None = None,
        print_recipe: bool = False,
        plan: bool = False,
    ) -> None:
        """Run a recipe, with any of its settings replaced.

        Args:
            recipe: The settings, a group for each section.
            out: Run folder, in place of run.out.
            print_recipe: Only print the recipe with every default filled in.
            plan: Only say which calls it would make, and about what they cost.
        """
        checked = validate_recipe(recipe.model_dump(mode="json"), source)
        if print_recipe:
            print(dump_recipe(checked), end="")
            return
        folder = Path(out or checked.run.out or f"runs/{loaded.name}")
        only = None if verb == "run" else verb
        if plan:
            from starling.plan import make_plan

            print(make_plan(checked, loaded.folder, folder, only=only))
            return
        run_pipeline(checked, loaded.folder, out=folder, only=only)
        if verb == "run":
            _write_report(folder)
        print(f"Figures:  {folder / 'summary.json'}")

    parse_options(run, f"{verb} {source}", rest)


def _recipe(name: str) -> None:
    """Print a packaged recipe as it is, to start your own from.

    Args:
        name: Which one.
    """
    print(packaged_text(name), end="")


def _chat(verb: str, arguments: list[str]) -> None:
    from starling.serve.chat import chat
    from starling.serve.session import Chat

    def talk(settings: Annotated[Chat, tyro.conf.arg(name="")], *, once: str | None = None) -> None:
        """Talk to a model; on a pipe, each line is a message.

        Args:
            settings: Which model, and how it answers.
            once: Answer this one message and leave.
        """
        chat(settings, once=once)

    try:
        parse_options(talk, verb, arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _tokens(verb: str, arguments: list[str]) -> None:
    from starling.serve.find import resolve_model
    from starling.serve.tokens import EXAMPLE, named_format, read_file, render

    def show(
        model: tyro.conf.Positional[str] = "openchat",
        *,
        mode: str | None = None,
        file: str | None = None,
        json: bool = False,
        chat_format: str | None = None,
        system: Literal["bare", "role", "refuse"] | None = None,
    ) -> None:
        """Show what a model reads: a conversation's text, token ids and response mask.

        Args:
            model: Run folder, model folder or hub id; openchat needs none.
            mode: One of the chat format's modes, or its beginning: code, math.
            file: JSON list of {"role", "content"}, - for standard input; absent, an example.
            json: Print only {"text", "ids", "mask"}, on one line.
            chat_format: Name of the chat format, where it is not the model's own.
            system: How OpenChat's format writes a system message.
        """
        messages = EXAMPLE if file is None else read_file(file)
        from starling.models.codec import find_codec

        codec = find_codec(resolve_model(model), named_format(chat_format, system))
        rendering = render(codec, messages, mode)
        coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        width = shutil.get_terminal_size().columns
        print(rendering.as_json() if json else rendering.as_page(coloured=coloured, width=width))

    parse_options(show, verb, arguments)


def _audit(file: Path, *, out: Path = Path("audit.json")) -> None:
    """Say what decides the rankings of a file beside the answers: place, length, model, tricks.

    Args:
        file: Rankings, JSONL or Nectar's parquet; judgments.jsonl beside it is read too.
        out: The same with all its tables, as JSON.
    """
    from starling.base.jsonl import write_json
    from starling.feedback.audit import as_text, audit_file

    found = audit_file(file, quarantine=out.with_name(f"{out.stem}.quarantine.jsonl"))
    write_json(out, found)
    print(f"{as_text(found)}\n\nAll tables:  {out}")


def _pairs(
    file: Path,
    *,
    out: Path = Path("pairs.jsonl"),
    kind: Literal["all", "adjacent", "best-versus-rest", "sampled"] = "all",
    per_prompt: int = 1,
    seed: int = 0,
) -> None:
    """Write a file's rankings as pairs, for programs that know nothing else.

    Args:
        file: Rankings, JSONL or Nectar's parquet.
        out: Pairs, JSONL: {"prompt", "chosen", "rejected"}, each a list of messages.
        kind: Which pairs of a ranking; ties make none.
        per_prompt: How many of them, of kind sampled.
        seed: Of the sampling.
    """
    from starling.data.pairs import export_pairs

    counts = export_pairs(file, out, kind=kind, per_prompt=per_prompt, seed=seed)
    print(f"{counts['pairs']} pairs of {counts['rankings']} rankings -> {out}")


def _nectar(source: str, target: Path, *, sample: int | None = None, seed: int = 0) -> None:
    """Copy rankings from one file to another in the columns of Nectar: JSONL or parquet.

    Args:
        source: A file of rankings, or hf://datasets/berkeley-nest/Nectar/data/rlaif.parquet.
        target: Ends in .jsonl or .parquet.
        sample: Only so many, drawn from the whole file: Nectar stands in alphabetical order.
        seed: Of the drawing.
    """
    from starling.data.nectar import convert
    from starling.data.rows import HUB_DATA, fetch

    file = fetch(source) if source.startswith(HUB_DATA) else Path(source)
    number = convert(file, target, sample=sample, seed=seed)
    print(f"{number} rankings -> {target}")


class Server(NamedTuple):
    """Where a reward model is served."""

    url: str | None = None
    """Server that holds the model (vllm serve FOLDER --runner pooling), e.g. http://localhost:8000;
    the folder then only says how to read and normalise."""
    served_model: str | None = None
    """The model's name at the server; absent, the only one."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's key."""


HERE = Server()


def _score(
    model: str,
    *,
    file: Path | None = None,
    pairs: Path | None = None,
    out: Path | None = None,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
    server: Annotated[Server, tyro.conf.arg(name="")] = HERE,
) -> None:
    """Score conversations with a reward model, or measure it on pairs.

    Args:
        model: Run folder, folder or hub id of a reward model.
        file: JSONL conversations, each with messages that end with the assistant's turn.
        pairs: JSONL pairs in RewardBench's columns: prompt, chosen, rejected, subset.
        out: File for the scores, JSONL, or the pairs' figures, JSON; absent, standard output.
        device: cpu or cuda; absent, a GPU when there is one.
        dtype: Arithmetic of the model; auto is as stored.
        server: Where the model is, when not here.
    """
    if (file is None) == (pairs is None):
        raise InputError("what is to be scored? Give --file conversations.jsonl or --pairs FILE")
    from starling.base.context import choose_device
    from starling.base.jsonl import dump_line, write_json, write_records
    from starling.data.reward_pairs import RewardPair
    from starling.data.rows import read_rows
    from starling.models.reward_model import RewardModel
    from starling.models.served_reward import ServedRewardModel
    from starling.reward import score

    quarantine = (out or Path("scores.jsonl")).with_name("quarantine.jsonl")
    items = score.read_conversations(file, quarantine) if file else []
    rows = read_rows(pairs, RewardPair, quarantine=quarantine) if pairs else []
    name = score.find_reward_model(model)
    url, served_model, api_key_env = server
    if url is None:
        reward_model = RewardModel.load(name, device=choose_device(device), dtype=dtype)
    else:
        reward_model = ServedRewardModel.connect(
            url, name, served_model=served_model, api_key_env=api_key_env
        )
    if rows:
        figures = score.measure_pairs(reward_model, rows)
        print(score.as_table(figures))
        if out is not None:
            write_json(out, figures)
    elif out is not None:
        write_records(out, score.score_rows(reward_model, items))
        print(f"{len(items)} scores -> {out}")
    else:
        for row in score.score_rows(reward_model, items):
            print(dump_line(row).decode(), end="")


def _report(run: Path) -> None:
    """Write report.html of a run again.

    Args:
        run: A run folder.
    """
    _write_report(run)


COMMANDS = {
    "demo": Command("[--seed N] [--out DIR]", "the whole recipe on a small offline world", _demo),
    "run": Command("RECIPE [--print-recipe]", "all stages of a recipe", _run),
    "recipe": Command("NAME", "print a packaged recipe, to start your own from", _recipe),
    "sft": Command("RECIPE", "only stage 0: conversations -> starting policy", _run),
    "feedback": Command("RECIPE", "only stage 1: prompts -> candidates -> rankings", _run),
    "reward": Command("RECIPE", "only stage 2: rankings -> reward model", _run),
    "ppo": Command("RECIPE", "only stage 3: policy against reward model", _run),
    "bench": Command("RECIPE", "only stage 4: the policy against the one it started from", _run),
    "mt-bench": Command("--data DIR", "MT-Bench as published, judged at a URL", verbs.mt_bench),
    "win-rate": Command("FILE BASELINE", "whose outputs a judge prefers", verbs.win_rate),
    "checks": Command(
        "PROMPTS MODEL", "instructions kept and requests refused, by rule", verbs.checks
    ),
    "ratings": Command("VOTES", "models rated by votes between them", verbs.ratings),
    "compare": Command("RUN RUN ...", "several benches on one page", verbs.compare),
    "audit": Command("FILE [--out FILE]", "what decides rankings beside the answers", _audit),
    "pairs": Command("FILE [--kind KIND]", "rankings as pairs, for other programs", _pairs),
    "nectar": Command("FROM TO", "rankings in Nectar's columns, JSONL or parquet", _nectar),
    "score": Command("MODEL --file FILE", "conversations as a reward model scores them", _score),
    "chat": Command("MODEL", "talk to a run's policy, a folder, a .gguf file or a URL", _chat),
    "tokens": Command("[MODEL] [--file FILE]", "what a model reads: text, ids and mask", _tokens),
    "report": Command("RUN", "write a run's report.html again", _report),
}


PARSED_BY_ITSELF = (_run, _chat, _tokens, verbs.mt_bench)
"""Functions that take the verb and all that follows: what they accept is not known before."""


def _write_report(run_folder: Path) -> None:
    from starling.report.page import write_report

    write_report(run_folder)
    print(f"Report:  {run_folder / 'report.html'}")


def _print_gains(summary: dict[str, Any]) -> None:
    """The demo's last lines: what the policy gained over the one it started from, at what cost."""
    bench, ppo, reward = summary["bench"], summary["ppo"], summary["reward"]
    rows: list[tuple[str, Any, Any]] = [
        (label, bench[name]["sft"], bench[name]["ppo"])
        for label, name in (
            ("gold, sampled", "gold"),
            ("gold, greedy", "gold_greedy"),
            ("correctness, greedy", "gold_correctness_greedy"),
            ("judge's score", "score"),
            ("tokens per answer", "tokens_per_answer"),
        )
    ]
    rows.append(("win rate", None, bench["win_rate"]))
    print(f"{'':20}  {'sft':>6}  {'ppo':>6}")
    for label, *figures in rows:
        cells = ("" if figure is None else f"{figure['mean']:.2f}" for figure in figures)
        print(f"{label:20}" + "".join(f"  {cell:>6}" for cell in cells))
    target = ppo["kl_target"]
    aim = "no target" if target is None else f"target {target:g}"
    print(f"sequence KL: {ppo['sequence_kl']['mean']:.2f} nats ({aim})")
    accuracy, length_only = reward["pair_accuracy"], reward["length_only_accuracy"]
    print(f"reward model: {accuracy['mean']:.2f} of held-out pairs in order", end="")
    print(f" (by length alone {length_only['mean']:.2f})")
    best = bench.get("gold_best_of")
    if best is not None:
        print(f"gold, best of {best['samples']} by the reward model: {best['mean']:.2f}")


@contextmanager
def _messages() -> Iterator[None]:
    """Our messages on stderr as plain lines; of other libraries only what is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("starling").setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
