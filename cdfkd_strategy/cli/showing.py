"""``cdfkd methods``, ``cdfkd config`` and ``cdfkd report``."""

from __future__ import annotations

import argparse
import logging
import re
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml
from rich.table import Table

from cdfkd_strategy.cli.tables import run_table, show
from cdfkd_strategy.config import bind, to_dict
from cdfkd_strategy.distiller import Distiller
from cdfkd_strategy.errors import CDFKDError, MissingExtraError
from cdfkd_strategy.methods import METHODS
from cdfkd_strategy.report import collect, find_results, markdown_report, rewrite_tables
from cdfkd_strategy.run_config import RunConfig, config_names, resolve
from cdfkd_strategy.summary import FILE_NAME, read_summary

logger = logging.getLogger(__name__)


def methods(args: argparse.Namespace) -> None:  # noqa: ARG001 - one signature for all commands
    """A table of the registered methods."""
    table = Table()
    for column in ("name", "method", "paper", "needs (a client discloses its weights, and)", "from"):
        table.add_column(column, overflow="fold")
    for name in METHODS:
        cls = METHODS[name]
        title, paper = describe(cls)
        table.add_row(name, title, paper, ", ".join(need.replace("_", " ") for need in cls.needs.disclosed()) or "nothing else", origin(cls))
    show(table)


def describe(cls: type[Distiller]) -> tuple[str, str]:
    """The first sentence of the docstring of a method's module, and the first link in it."""
    text = import_module(cls.__module__).__doc__ or cls.__doc__ or ""
    link = re.search(r"https?://[^\s)>\]]+", text)
    title = " ".join(text.strip().partition("\n\n")[0].split()).rstrip(".")
    return title, link.group(0).rstrip(".,") if link else "-"


def origin(cls: type[Distiller]) -> str:
    """Who ships a method: "built in", or the name of another distribution."""
    package = cls.__module__.partition(".")[0]
    if package == "cdfkd_strategy":
        return "built in"
    return ", ".join(packages_distributions().get(package, [package]))


def config(args: argparse.Namespace) -> None:
    """Print a resolved configuration as YAML, or the names of all."""
    if args.config is None:
        print("\n".join(config_names()))
        return
    resolved = resolve(args.config, args.overrides)
    print(yaml.safe_dump(to_dict(resolved), sort_keys=False, allow_unicode=True), end="")


def report(args: argparse.Namespace) -> None:
    """Tables of a run or of a folder of results."""
    directory = Path(args.directory)
    if not directory.is_dir():
        raise CDFKDError(f"there is no directory {directory}; give a run directory or a folder of results")
    if (directory / FILE_NAME).exists():
        show_run(directory)
        if args.keep:
            print(f"kept:     {collect(directory, Path(args.keep))}")
        return
    summaries = find_results(directory)
    if not summaries:
        raise CDFKDError(f"there is no {FILE_NAME} in or below {directory}; give a run directory or a folder of results")
    print(markdown_report(summaries))
    if args.readme:
        changed = rewrite_tables(Path(args.readme), summaries)
        logger.info("%s: %s", args.readme, "tables rewritten" if changed else "tables were up to date")


def show_run(directory: Path) -> None:
    """The table of a run, its pictures (drawn now), and where everything is."""
    summary = read_summary(directory)
    show(run_table(summary))
    if not summary["finished"]:
        print("this run is not finished; continue it with --resume")
    elif summary["stopped_by"] != "schedule":
        print(f"the distillation was stopped by engine.{summary['stopped_by']} before the end of its schedule")
    pictures: list[Path] = []
    try:
        from cdfkd_strategy.pictures import draw_pictures

        pictures = draw_pictures(directory, bind(RunConfig, summary["config"]))
    except MissingExtraError as error:
        logger.info("no pictures: %s", error)
    print(f"results:  {directory / FILE_NAME}")
    for path in pictures:
        print(f"picture:  {path}")
