"""The ``cdfkd`` command. Parsing is here and imports nothing heavy, so that ``cdfkd --help`` is quick."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cdfkd_strategy import __version__
from cdfkd_strategy.errors import CDFKDError

ERROR, INTERRUPTED = 2, 130

WAITING_THREADS = {"GOMP_SPINCOUNT": "10000"}
"""GNU OpenMP reads it when torch is imported. By default its threads spin long while they wait for one another, and where
another program wants the cores, steps were seen to take thirty times as long; threads that do not spin at all are slower
than one thread. A user's own setting wins."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for an error that the message explains, 130 when interrupted."""
    for name, value in WAITING_THREADS.items():
        os.environ.setdefault(name, value)
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    strange = [item for item in rest if item.startswith("-") or "=" not in item or not hasattr(args, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)} (settings are given as key=value)")
    if rest:
        args.overrides = [*args.overrides, *rest]
    module, _, function = args.command.partition(":")
    try:
        with _log_to_stderr():
            getattr(importlib.import_module(f"{__name__}.{module}"), function)(args)
    except CDFKDError as error:
        print(f"cdfkd: error: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        hint = "; continue the run with the same command and --resume" if hasattr(args, "resume") else ""
        print(f"cdfkd: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `cdfkd methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # no directory, no permission, no space
        print(f"cdfkd: error: cannot read or write: {error}; what is finished stays where it is", file=sys.stderr)
        return ERROR
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = argparse.ArgumentParser(prog="cdfkd", description="Federated learning by data-free distillation of client teachers into one multi-header student.")
    parser.add_argument("--version", action="version", version=f"cdfkd-strategy {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="the whole job in Flower's simulation", description="Run a configuration in Flower's in-process simulation.")
    _takes_config(run)
    _takes_out(run, resume=True)
    run.set_defaults(command="running:run")

    teachers = commands.add_parser("teachers", help="train the clients' teachers only", description="Train the teachers of round 1, without Flower.")
    _takes_config(teachers)
    _takes_out(teachers, resume=True)
    teachers.set_defaults(command="running:teachers")

    distill = commands.add_parser("distill", help="distil a teacher directory, without Flower")
    distill.add_argument("--teachers", required=True, metavar="DIR", help="what `cdfkd teachers` wrote, or the uploads/ of a run")
    distill.add_argument("--method", metavar="NAME", help="default: the one in the directory's configuration")
    distill.add_argument("--student", metavar="BACKBONE", help="the student's backbone; default: the one in the directory's configuration")
    distill.add_argument("--save-transfer-set", metavar="N", type=int, help="keep N synthetic images in --out as transfer_set.safetensors")
    distill.add_argument("--transfer-set", metavar="FILE", help="learn from the images that an earlier run kept; without --method, by kd")
    _takes_overrides(distill)
    _takes_out(distill, resume=True)
    distill.set_defaults(command="running:distill")

    bench = commands.add_parser("bench", help="compare methods on the same teachers", description="Run methods on the same teachers, and write one table.")
    bench.add_argument("config", metavar="BENCH", help="a name in simulations/configs/bench, or a path to a YAML file")
    _takes_overrides(bench)
    _takes_out(bench, resume=True)
    bench.add_argument("--teachers", metavar="DIR", help="where the teachers are, or are put; default: in --out")
    bench.add_argument("--only", metavar="ROWS", help="rows to run, separated by commas; default: all")
    bench.add_argument("--jobs", type=int, default=1, metavar="N", help="rows to run at the same time; give each its share of the cores by engine.threads")
    bench.add_argument(
        "--keep",
        metavar="RESULTS",
        help="also copy every summary to RESULTS/<study>, and write the table there; what is finished there, on the same teachers, is not run again",
    )
    bench.set_defaults(command="benching:bench")
    _add_showing(commands)
    return parser


def _add_showing(commands: Any) -> None:
    """The commands that train and distil nothing."""
    methods = commands.add_parser("methods", help="list the distillation methods, what they need and what clients disclose")
    methods.set_defaults(command="showing:methods")

    config = commands.add_parser("config", help="print a configuration with all defaults, or the names of all")
    config.add_argument("config", nargs="?", metavar="CONFIG", help="a name or a path; without it, the names are listed")
    _takes_overrides(config)
    config.set_defaults(command="showing:config")

    report = commands.add_parser("report", help="tables and pictures of a run, or tables of a folder of results")
    report.add_argument("directory", metavar="DIR", help="a run directory, or a folder with results in it")
    report.add_argument("--keep", metavar="RESULTS", help="also copy the summary of a finished run to RESULTS/<study>/<cell>-seed<n>")
    report.add_argument("--readme", metavar="FILE", help="also rewrite the result tables between the markers of this Markdown file")
    report.add_argument(
        "--tables", action="store_true", help="also write table.csv, table.md and accuracy_seconds.png of every bench in DIR, beside its results"
    )
    report.set_defaults(command="showing:report")


def _takes_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a name (see `cdfkd config`) or a path to a YAML file")
    _takes_overrides(parser)


def _takes_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings with dotted keys, such as method.epochs=6")


def _takes_out(parser: argparse.ArgumentParser, *, resume: bool = False) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory to write; must be empty or new")
    if resume:
        parser.add_argument("--resume", action="store_true", help="continue the run in --out where it stopped")


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Show this package's log on standard error while a command runs."""
    logger = logging.getLogger("cdfkd_strategy")
    handler, level = logging.StreamHandler(), logger.level
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
