"""The verbs that measure: mt-bench, win-rate, checks, ratings, compare.  Parses, calls, prints."""

from typing import Annotated

import tyro

from starling.bench.mt_bench.options import MtBench
from starling.options import parse_options

DEFAULTS = MtBench()


def mt_bench(verb: str, arguments: list[str]) -> None:
    """`starling mt-bench`."""

    def measure(options: Annotated[MtBench, tyro.conf.arg(name="")] = DEFAULTS) -> None:
        """Judge a model's answers to MT-Bench as published, and count them.

        Args:
            options: Whose answers, by whom, and how.
        """
        from starling.bench.mt_bench.run import run
        from starling.serve.find import resolve_model

        policy = options.policy
        if policy is not None and options.policy_url is None and not options.plan:
            policy = resolve_model(policy)
        print(run(options, policy))

    parse_options(measure, verb, arguments)
