"""A progress bar for a terminal; a log line now and then everywhere else."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)


class Progress:
    """Shows how far a distillation is, with the first few of its terms.

    Args:
        name: of the method.
        total: epochs of the schedule.
        done: epochs already done.
        enabled: False is silent; True still draws no bar where standard error is not a terminal.
    """

    def __init__(self, name: str, total: int, done: int, *, enabled: bool) -> None:
        self._name, self._total, self._done, self._enabled = name, total, done, enabled
        self._bar: RichProgress | None = None
        if enabled and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[terms]}"),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=total, completed=done, terms="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, terms: Mapping[str, float]) -> None:
        """One epoch more, with its terms."""
        self._done += 1
        text = " ".join(f"{name.rpartition('/')[2]}={value:.3g}" for name, value in list(terms.items())[:4])
        if self._bar is not None:
            self._bar.update(self._task, advance=1, terms=text)
        elif self._enabled and (self._done == self._total or self._done % max(1, self._total // 10) == 0):
            logger.info("%s: epoch %d of %d, %s", self._name, self._done, self._total, text)
