"""``cdfkd bench``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cdfkd_strategy.bench.config import BenchConfig, resolve_bench
from cdfkd_strategy.bench.record import read_done, with_columns
from cdfkd_strategy.bench.running import run_bench
from cdfkd_strategy.bench.table import entries, markdown_table, write_tables
from cdfkd_strategy.cli.running import check_out
from cdfkd_strategy.cli.tables import write_and_say
from cdfkd_strategy.directory_lock import held
from cdfkd_strategy.parallel import check_alone
from cdfkd_strategy.report import find_results, put
from cdfkd_strategy.summary import BENCH, is_same_config


def bench(args: argparse.Namespace) -> None:
    """Run a bench, and write its table after every run."""
    check_alone("cdfkd bench")
    everything = resolve_bench(args.config, args.overrides)
    found = resolve_bench(args.config, [*args.overrides, f"only=[{args.only}]"]) if args.only else everything
    out = check_out(args.out, resume=args.resume)
    results = Path(args.keep) if args.keep else None

    def on_done(summaries: list[dict[str, Any]]) -> None:
        write_tables(out, _in_order([*others, *summaries], everything), picture=False)
        if results is not None:
            write_tables(results / found.study, _keep(results, found.study, summaries), picture=False)

    teachers = Path(args.teachers).resolve() if args.teachers else None
    kept = find_results(results / found.study) if results is not None else []
    entries(kept)  # raises if one table cannot hold them: now, and not after the first row
    with held(out):
        others = _left_out(everything, found, out)
        summaries = run_bench(found, out, teachers=teachers, jobs=args.jobs, kept=[*kept, *others], on_done=on_done)
    print(markdown_table(entries(summaries)))
    write_and_say(out, _in_order([*others, *summaries], everything))
    if results is not None:
        write_and_say(results / found.study, _keep(results, found.study, summaries))


def _left_out(everything: BenchConfig, started: BenchConfig, out: Path) -> list[dict[str, Any]]:
    """The summaries of the rows that ``--only`` leaves out of this start, and that an earlier one has finished."""
    runs = [run for run in everything.runs if run.path not in {run.path for run in started.runs}]
    done = [(run, read_done(out / run.path, run)) for run in runs]
    return [with_columns(summary, run, out / run.path) for run, summary in done if summary is not None and is_same_config(summary["config"], run.config)]


def _in_order(summaries: list[dict[str, Any]], bench: BenchConfig) -> list[dict[str, Any]]:
    places = [(run.cell, run.row, run.seed) for run in bench.runs]
    return sorted(summaries, key=lambda item: places.index((item["cell"], item[BENCH]["row"], item["seed"])))


def _keep(results: Path, study: str, summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copy summaries to the results; gives all that the results have of the study."""
    for summary in summaries:
        put(summary, results)
    return [item for item in find_results(results / study) if item["study"] == study]
