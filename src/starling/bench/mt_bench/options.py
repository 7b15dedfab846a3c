"""The options of `starling mt-bench`, and which of them go together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from starling.base.errors import InputError
from starling.base.spending import Price, Spending
from starling.data.fastchat import Rule
from starling.models.config import check_url


@dataclass(frozen=True, kw_only=True)
class MtBench:
    """Whose answers are judged, by whom, and how they are counted."""

    data: str | None = None
    """Folder in FastChat's layout (question.jsonl, judge_prompts.jsonl, reference_answer/), or one
    on the hub: hf://datasets/OWNER/NAME/FOLDER, hf://spaces/OWNER/NAME/FOLDER."""
    out: Path = Path("runs/mt-bench")
    """Folder for answers, judgments and scores.json, of one model."""
    answers: tuple[Path, ...] = ()
    """Answers in FastChat's columns; of several models for --mode pairwise."""
    model: str | None = None
    """Name of the model under test; needed where a file holds several."""
    policy: str | None = None
    """Without --answers: who answers. Run folder, model folder or hub id, or a name at
    --policy-url."""
    policy_url: str | None = None
    """OpenAI-compatible server of the policy."""
    policy_key_env: str | None = None
    """Environment variable that holds the key of --policy-url."""
    judge_url: str | None = None
    """OpenAI-compatible server of the judge, e.g. https://api.openai.com/v1."""
    judge_model: str = "gpt-4"
    """The judge's name there; scores of two judges cannot be compared."""
    judge_key_env: str | None = None
    """Environment variable that holds the key of --judge-url; a server without one needs none."""
    mode: Literal["single", "pairwise"] = "single"
    """A rating from 1 to 10 of every answer, or every pair of models in both orders."""
    baseline: str | None = None
    """With --mode pairwise: only pairs with this model."""
    judgments: Path | None = None
    """Count the judgments in this file, FastChat's or ours; nobody is asked."""
    repeats: int = 1
    """Rounds of judging, to see the judge's noise; each is paid."""
    canaries: bool = False
    """Also have answers rated that only cheat, in calls of their own: does the judge fall for them?
    The published protocol has no such calls."""
    references: Path | None = None
    """Reference answers in place of the folder's, such as a corrected file."""
    like_fastchat: bool = False
    """Count as FastChat does: failures left out unseen, duplicates averaged, whatever the scale."""
    duplicates: Rule = "refuse"
    """What becomes of a second row about the same thing."""
    allowed_failures: float = 0.05
    """Share of judgments that may fail before there is no score at all."""
    concurrency: int = 16
    """Calls in flight."""
    timeout_seconds: float = 100.0
    """One call's time limit."""
    usd_per_million: tuple[float, float] | None = None
    """The judge's price, for tokens read and written."""
    max_usd: float | None = None
    """Stop when so much is spent; what was answered is kept."""
    seed: int = 0
    """Of sampled answers and of the intervals."""
    device: str | None = None
    """Where --policy runs: cpu or cuda; absent, a GPU when there is one."""
    chat_format: str | None = None
    """Chat format of --policy, where it is not the model's own."""
    plan: bool = False
    """Only say what would be asked, and about what it costs."""

    def check(self) -> None:
        """Raise InputError for options that do not go together, or make no sense."""
        is_pairwise = self.mode == "pairwise"
        for is_wrong, problem in (
            (
                self.data is None,
                "which questions? Give --data DIR, a folder in FastChat's layout: of its "
                "repository, fastchat/llm_judge/data/mt_bench",
            ),
            (self.repeats < 1, f"--repeats is {self.repeats}; it is at least 1"),
            (self.concurrency < 1, f"--concurrency is {self.concurrency}; it is at least 1"),
            (self.timeout_seconds <= 0, "--timeout-seconds must be above 0"),
            (
                not 0 <= self.allowed_failures <= 1,
                f"--allowed-failures is {self.allowed_failures}; it is a share, from 0 to 1",
            ),
            (is_pairwise and self.repeats > 1, "--repeats is for --mode single"),
            (is_pairwise and self.canaries, "--canaries is for --mode single"),
            (self.judgments and self.canaries, "--judgments asks nobody, so no --canaries either"),
            (is_pairwise and self.policy, "--mode pairwise takes --answers, of each model a file"),
            (not is_pairwise and self.baseline, "--baseline is for --mode pairwise"),
            (not is_pairwise and len(self.answers) > 1, "--mode single takes one answers file"),
            (self.policy_url and not self.policy, "--policy-url needs --policy, the model's name"),
            (
                self.plan and self.judgments,
                "--judgments asks nobody, so there is nothing to --plan",
            ),
            (self.policy and self.answers, "give --answers or --policy, not both"),
            (
                self.max_usd is not None and self.usd_per_million is None,
                "--max-usd needs the judge's price: --usd-per-million READ WRITTEN",
            ),
            (
                not (self.judgments or self.policy or self.answers),
                "whose answers? Give --answers FILE, or --policy MODEL that answers now",
            ),
            (
                not (self.judgments or self.judge_url or self.plan),
                "who judges? Give --judge-url URL (and --judge-model NAME), or count a file of "
                "judgments with --judgments FILE",
            ),
        ):
            if is_wrong:
                raise InputError(problem)
        for name, url in (("--judge-url", self.judge_url), ("--policy-url", self.policy_url)):
            try:
                check_url(url or "http://localhost")
            except ValueError as error:
                raise InputError(f"{name}: {error}") from error

    def spending(self) -> Spending:
        """A fresh account of the judge's calls; without a price it counts no money."""
        if self.usd_per_million is None:
            return Spending()
        read, written = self.usd_per_million
        prices = {self.judge_model: Price(input=read, output=written)}
        return Spending(prices, max_usd=self.max_usd)
