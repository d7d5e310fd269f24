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

from cdfkd_strategy.cli.tables import label_table, run_table, show, write_and_say
from cdfkd_strategy.config import bind, to_dict
from cdfkd_strategy.data.image_data import ImageData
from cdfkd_strategy.distiller import Distiller
from cdfkd_strategy.errors import CDFKDError, MissingExtraError
from cdfkd_strategy.harness import Harness
from cdfkd_strategy.methods import METHODS
from cdfkd_strategy.offline import DISCLOSED
from cdfkd_strategy.report import collect, find_results, markdown_report, rewrite_tables
from cdfkd_strategy.run_config import RunConfig, bench_names, config_names, resolve
from cdfkd_strategy.summary import BENCH, FILE_NAME, discloses_counts, read_summary

logger = logging.getLogger(__name__)


def methods(args: argparse.Namespace) -> None:  # noqa: ARG001 - one signature for all commands
    """A table of the registered methods, and what a client of this package tells a server that runs them."""
    from cdfkd_strategy.flower.disclosure import OPTED_IN, disclosed

    table = Table()
    for column in ("name", "method", "paper", "the method needs", "student", "status", "from"):
        table.add_column(column, overflow="fold", no_wrap=column == "paper")
    for name in METHODS:
        cls = METHODS[name]
        title, paper = describe(cls)
        table.add_row(name, title, paper, needs(cls), students(cls), status(cls), origin(cls))
    show(table)
    print("student: single, one header for all teachers; multi, one header per teacher")
    print(f"a client discloses, whatever the method: {'; '.join(disclosed(label_counts=False))}")
    print(f"{', '.join(OPTED_IN.values())}: only where server.weights=label_counts asks for them and the client consents")


def needs(cls: type[Distiller]) -> str:
    """What a method cannot do without, and what it looks at where it is there."""
    from cdfkd_strategy.flower.disclosure import needed

    optional = f"; uses, where they are: {', '.join(needed(cls.uses))}" if needed(cls.uses) else ""
    return (", ".join(needed(cls.needs)) or "the networks") + optional


def students(cls: type[Distiller]) -> str:
    """The kinds of students that a method says it takes."""
    return ", ".join(cls.students) or "not stated"


def status(cls: type[Distiller]) -> str:
    """What a method says of itself, or else whether its docstring speaks of a reconstruction."""
    text = import_module(cls.__module__).__doc__ or cls.__doc__ or ""
    return cls.status or ("reconstruction, in part: see its docstring" if "reconstruct" in text.lower() else "not stated")


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
    """Print a resolved configuration as YAML, or the names of all, and of the benches."""
    if args.config is None:
        print("\n".join(config_names()))
        print(f"for `cdfkd bench`: {', '.join(bench_names())}")
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
    if args.tables:
        for study in dict.fromkeys(item["study"] for item in summaries if BENCH in item):
            folder = directory / study if (directory / study).is_dir() else directory
            write_and_say(folder, [item for item in summaries if item["study"] == study])
    if args.readme:
        changed = rewrite_tables(Path(args.readme), summaries)
        logger.info("%s: %s", args.readme, "tables rewritten" if changed else "tables were up to date")


def show_labels(config: RunConfig, data: ImageData | None) -> None:
    """Who holds which classes, as the configuration deals them; nothing without the data set."""
    counts = Harness(config, data).label_counts
    if data is not None and counts is not None:
        show(label_table(counts, data.class_names))


def show_run(directory: Path) -> None:
    """The tables of a run, its pictures (drawn now), and where everything is."""
    from cdfkd_strategy.pictures import draw_pictures, images_of

    summary = read_summary(directory)
    show(run_table(summary))
    if discloses_counts(summary):
        print(DISCLOSED)
    config = bind(RunConfig, summary["config"])
    data = images_of(config)
    show_labels(config, data)
    if not summary["finished"]:
        print("this run is not finished; continue it with --resume")
    elif summary["stopped_by"] != "schedule":
        print(f"the distillation was stopped by engine.{summary['stopped_by']} before the end of its schedule")
    pictures: list[Path] = []
    try:
        pictures = draw_pictures(directory, config, data)
    except MissingExtraError as error:
        logger.info("no pictures: %s", error)
    print(f"results:  {directory / FILE_NAME}")
    for path in pictures:
        print(f"picture:  {path}")
