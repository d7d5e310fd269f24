"""The configuration of a bench: one run configuration, and a row of the table for every method (or variant of one)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdfkd_strategy.config import bind, override
from cdfkd_strategy.errors import ConfigError, UnknownNameError
from cdfkd_strategy.models.classifiers import ARCHITECTURES
from cdfkd_strategy.run_config import RunConfig, bench_names, bench_root, find_config, from_values, merge, read_config

ROW_KEYS = ("student", "server", "cells", "like", "published")
"""Keys of a row that are not the method's: its student, how its server weighs the teachers, the cells it is run in, a row that it starts from, and
what its paper reports."""


@dataclass(frozen=True)
class BenchRun:
    """One row's run on one set of teachers.

    Args:
        cell: the setting.
        row: the name of the row.
        seed: of teachers and distillation.
        config: the resolved configuration.
        metrics: names of its epochs' terms that the table shows.
        published: accuracies of student and teacher in the method's paper, or nothing.
    """

    cell: str
    row: str
    seed: int
    config: RunConfig
    metrics: tuple[str, ...] = ()
    published: tuple[float, ...] = ()

    @property
    def path(self) -> Path:
        """Of the run directory, in that of the bench and among committed results."""
        return Path(self.cell) / f"{self.row}-seed{self.seed}"

    @property
    def teachers(self) -> str:
        """The name of its teacher directory."""
        return f"{self.cell}-seed{self.seed}"


@dataclass(frozen=True)
class BenchConfig:
    """What is compared, on what.

    Args:
        study: whose table it is.
        config: a run configuration (keys as there; ``base`` names another one) for all runs; its ``method``, ``study``, ``cell`` and ``seed`` are set here.
        methods: rows of the table by name: ``name`` of the method and its settings, and perhaps ``student`` (keys of the student's
            configuration that are other ones for this row), ``server`` (the same) and ``cells`` (a list; without it the row is run in all cells). A row
            that is ``like`` another one has all that the other has, except for what it says itself. ``published`` is what the method's paper reports of
            this kind of task, [student, teacher], for the table to show beside the row's own gap.
        seeds: of the runs; each has its own teachers.
        cells: settings by name: what differs from ``config``; the teachers of a cell are the same for all rows.
        only: run and show these rows only; empty is all.
        metrics: terms of a method's epochs, as in its ``losses.csv``, that are columns of the table beside the usual ones; a method without such a
            term has nothing there.

    Raises:
        ConfigError: any setting of any run is not accepted; all are bound here, before anything is trained.
    """

    study: str
    config: Mapping[str, Any]
    methods: Mapping[str, Any]
    seeds: tuple[int, ...] = (0, 1, 2)
    cells: Mapping[str, Any] = field(default_factory=lambda: {"default": {}})
    only: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind, names in (("seeds", self.seeds), ("methods", self.methods), ("cells", self.cells)):
            if not names:
                raise ConfigError(f"{kind} is empty; accepted: at least one")
        for name in (*self.methods, *self.cells):
            if not isinstance(name, str) or not name or set(name) & set("/\\ .|"):
                raise ConfigError(f"a row or cell is named {name!r}; accepted: a word without dots that can be a file name")
        unknown = [name for name in self.only if name not in self.methods]
        if unknown:
            raise ConfigError(f"only names the rows {', '.join(unknown)}; accepted: {', '.join(self.methods)}")
        object.__setattr__(self, "_runs", tuple(self._bind()))

    @property
    def runs(self) -> tuple[BenchRun, ...]:
        """All runs, seed by seed and cell by cell, so that all rows of one set of teachers come together."""
        runs: tuple[BenchRun, ...] = self._runs  # type: ignore[attr-defined]
        return runs

    def _bind(self) -> Iterator[BenchRun]:
        for seed in self.seeds:
            for cell in self.cells:
                for row in self.methods:
                    if self.only and row not in self.only:
                        continue
                    values = self._values_of(row)
                    if cell in self._cells_of(row, values):
                        yield BenchRun(cell, row, seed, self._bind_run(cell, row, values, seed), self.metrics, _published(row, values))

    def _values_of(self, row: str) -> Mapping[str, Any]:
        values = self.methods[row]
        if not isinstance(values, Mapping):
            raise ConfigError(f"methods.{row} is {values!r}; accepted: a mapping with the method's name and settings")
        if "like" not in values:
            return values
        complete = [name for name, other in self.methods.items() if isinstance(other, Mapping) and "like" not in other]
        if values["like"] not in complete:
            raise ConfigError(f"methods.{row}.like is {values['like']!r}; accepted: a row that says everything itself: {', '.join(complete)}")
        return merge(self.methods[values["like"]], values)

    def _cells_of(self, row: str, values: Mapping[str, Any]) -> list[str]:
        cells = values.get("cells") or list(self.cells)
        if not isinstance(cells, list) or set(cells) - set(self.cells):
            raise ConfigError(f"methods.{row}.cells is {cells!r}; accepted: a list of {', '.join(self.cells)}")
        return cells

    def _bind_run(self, cell: str, row: str, values: Mapping[str, Any], seed: int) -> RunConfig:
        method = {key: value for key, value in values.items() if key not in ROW_KEYS}
        mine = {"study": self.study, "cell": cell, "seed": seed, **{part: values[part] for part in ("student", "server") if values.get(part)}}
        try:
            common = {key: value for key, value in merge(self.config, self.cells[cell] or {}).items() if key != "method"}
            config = from_values({**merge(common, mine), "method": method})
        except ConfigError as error:
            raise ConfigError(f"row {row!r} in cell {cell!r}: {error}") from error
        for name in (*config.clients.architectures, config.student.backbone):
            ARCHITECTURES[name]
        return config


def _published(row: str, values: Mapping[str, Any]) -> tuple[float, ...]:
    found = values.get("published") or ()
    if found and not (isinstance(found, list | tuple) and len(found) == 2 and all(isinstance(share, int | float) and 0 < share <= 1 for share in found)):
        raise ConfigError(f"methods.{row}.published is {found!r}; accepted: [student, teacher], accuracies from 0 to 1")
    return tuple(map(float, found))


def resolve_bench(name: str, overrides: Iterable[str] = ()) -> BenchConfig:
    """The bench of a name (in the folder ``bench`` of the configurations) or path, with overrides such as ``seeds=[100]``.

    Raises:
        ConfigError: something in it is not accepted.
    """
    if Path(name).suffix not in (".yaml", ".yml") and name not in bench_names():
        raise UnknownNameError("bench", name, bench_names())
    path = find_config(name, bench_root())
    values = override(read_config(path, (bench_root(),)), overrides)
    common = values.get("config")
    if isinstance(common, dict) and "base" in common:
        base = read_config(find_config(str(common.pop("base")), path.parent))
        values["config"] = merge(base, common)
    return bind(BenchConfig, values)
