"""Run a bench: teachers once per cell and seed, then every row on them, each in a process of its own."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any

import torch

from cdfkd_strategy.bench.config import BenchConfig, BenchRun
from cdfkd_strategy.bench.record import BenchRecord, is_whole, measure, read_done, record_of, store, with_columns
from cdfkd_strategy.bench.table import entries
from cdfkd_strategy.child_process import end_with_parent
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.directory_lock import held
from cdfkd_strategy.errors import CDFKDError, CheckpointError, ConfigError
from cdfkd_strategy.offline import check_made_with, distill_directory, plan_for, write_teachers
from cdfkd_strategy.run_config import from_values
from cdfkd_strategy.summary import FILE_NAME, check_same_config, is_same_config, read_summary
from cdfkd_strategy.teacher_directory import INDEX, load_teachers

logger = logging.getLogger(__name__)

TEACHERS = "teachers"
WILL_PASS = (OSError, MemoryError, torch.cuda.OutOfMemoryError)
"""What a run may fail for and succeed the next time: a full disk, memory that something else had."""

Start = Callable[[BenchRun, Path, Path], None]
"""Runs one row: the run, its teacher directory, its run directory."""


def run_bench(
    bench: BenchConfig,
    out: Path,
    *,
    teachers: Path | None = None,
    jobs: int = 1,
    start: Start | None = None,
    kept: Sequence[Mapping[str, Any]] = (),
    on_done: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Run what is not done yet, and give the summaries of all runs.

    A row that fails is a result; the others go on. Fresh processes are started ("spawn"): a script that calls this needs the
    usual ``if __name__ == "__main__":`` guard.

    Args:
        bench: what to run.
        out: directory of the bench; what is in it of an earlier start is kept.
        teachers: directory of teacher directories; None is one inside ``out``.
        jobs: rows that run at the same time.
        start: how a row is run; None is `in_own_process`.
        kept: summaries of before, from other directories: what is finished there with the same settings and teachers is not run again.
        on_done: called with all summaries so far after every run.

    Returns:
        In the order of ``bench.runs``.

    Raises:
        CheckpointError: runs or teachers that are there are of another configuration, or results that are there were made on other teachers.
        ConfigError: ``jobs`` is below 1.
        CDFKDError: teachers cannot be trained, or results that are there were made on two sets of them.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; accepted: at least 1")
    homes, runs = teachers or out / TEACHERS, bench.runs
    for run in runs:
        _check_run(run, out / run.path)
    done = {number: summary for number, run in enumerate(runs) if (summary := read_done(out / run.path, run)) is not None}
    known = [*kept, *done.values()]
    for name, run in {run.teachers: run for run in runs}.items():
        _check_teachers(run, homes / name, known)
    entries(known)  # raises where they are not of the same teachers, whatever is in those directories
    missing = [number for number in range(len(runs)) if number not in done]
    for name, run in {runs[number].teachers: runs[number] for number in missing}.items():
        _train_teachers(run, homes / name, known)
    done |= {number: dict(old) for number in missing if (old := _find(runs[number], kept)) is not None}
    done = {number: with_columns(summary, runs[number], out / runs[number].path) for number, summary in done.items()}
    missing = [number for number in missing if number not in done]

    def run_one(number: int) -> None:
        run = runs[number]
        logger.info("== %d of %d: %s in %s, seed %d", number + 1, len(runs), run.row, run.cell, run.seed)
        (start or in_own_process)(run, homes / run.teachers, out / run.path)

    def keep(number: int) -> None:
        done[number] = read_summary(out / runs[number].path)
        if on_done is not None:
            on_done([done[number] for number in sorted(done)])

    _side_by_side(run_one, missing, jobs, keep)
    return [done[number] for number in sorted(done)]


def _side_by_side(work: Callable[[int], None], items: Sequence[int], jobs: int, then: Callable[[int], None]) -> None:
    """Do the work on every item, then what comes after it, here and one at a time; whatever stops this stops the processes that were started."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(work, item): item for item in items}
        try:
            for future in as_completed(futures):
                future.result()
                then(futures[future])
        finally:
            running = {future for future in futures if not future.cancel() and not future.done()}
            while running:  # a worker may be about to start its process, hence again and again
                for process in multiprocessing.active_children():
                    process.terminate()
                running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED).not_done


def _train_teachers(run: BenchRun, home: Path, known: Sequence[Mapping[str, Any]]) -> None:
    """Make a directory of teachers, if it is not there; in one without an index, those that are missing are trained."""
    if not (home / INDEX).exists():
        with held(home):
            logger.info("training the teachers %s", home.name)
            write_teachers(run.config, home)
        _check_teachers(run, home, known)


def _check_run(run: BenchRun, directory: Path) -> None:
    """A run directory of an earlier start must be of this configuration.

    Raises:
        CheckpointError: it is of another.
    """
    if not (directory / FILE_NAME).exists():
        return
    try:
        check_same_config(read_summary(directory)["config"], run.config)
    except CheckpointError as error:
        what = str(error).partition(";")[0]
        raise CheckpointError(f"row {run.row!r} in cell {run.cell!r}: {what}; give a changed row another name, or remove {directory}") from error


def _check_teachers(run: BenchRun, home: Path, known: Sequence[Mapping[str, Any]]) -> None:
    """Teachers that are there must be those that this run would train, see `check_made_with`, and those of the results of its cell and seed.

    Raises:
        CheckpointError: they are others, so that one table cannot hold those results and this run.
    """
    if not (home / INDEX).exists():
        return
    stored = load_teachers(home)
    check_made_with(stored.config, run.config, home)
    hashes = tuple(spec.sha256 for spec in stored.specs)
    for summary in known:
        record = record_of(summary)
        if record is None or not record.teachers or _place(summary) != _place_of(run):
            continue
        if record.teachers != hashes:
            raise CheckpointError(
                f"row {record.row!r} in cell {run.cell!r}, seed {run.seed}, has a result on other teachers than those in {home}; "
                "name the directory of its teachers, or another one for this bench and for what it keeps"
            )


def _place(summary: Mapping[str, Any]) -> tuple[str, str, int]:
    return summary["study"], summary["cell"], summary["seed"]


def _place_of(run: BenchRun) -> tuple[str, str, int]:
    return run.config.study, run.cell, run.seed


def _find(run: BenchRun, kept: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """A finished result of this row and its settings; None if it has to be run."""
    for summary in kept:
        record = record_of(summary)
        if record is None or (record.row, _place(summary)) != (run.row, _place_of(run)):
            continue
        if is_whole(summary, run) and is_same_config(summary["config"], run.config):
            return summary
    return None


def in_this_process(run: BenchRun, home: Path, directory: Path) -> None:
    """Distil and measure; whatever goes wrong in it becomes the run's record."""
    hashes: tuple[str, ...] = ()
    try:
        teachers = load_teachers(home)
        hashes = tuple(spec.sha256 for spec in teachers.specs)
        done = distill_directory(plan_for(run.config, teachers), directory, resume=True)
        assert done is not None  # there is one process
        record = measure(run, done, hashes)
    except Exception as error:  # a method of anybody's: what it raises is a result, and the bench goes on
        logger.warning("%s in %s, seed %d failed: %s", run.row, run.cell, run.seed, error, exc_info=not isinstance(error, CDFKDError))
        words = str(error) if isinstance(error, CDFKDError) else f"{type(error).__name__}: {error}"
        record = BenchRecord(run.row, run.config.method_config()[0], hashes, error=words, died=isinstance(error, WILL_PASS))
    store(directory, run, record)


def in_own_process(run: BenchRun, home: Path, directory: Path) -> None:
    """`in_this_process` in a process of its own, so that peak memory is this run's alone; if it dies, that is the record."""
    what = (run.cell, run.row, run.seed, to_dict(run.config), run.metrics, run.published, str(home), str(directory))
    process = multiprocessing.get_context("spawn").Process(target=_child, args=what, daemon=True)
    process.start()
    process.join()
    if process.exitcode != 0 and read_done(directory, run) is None:  # it may die after its last file
        why = "it was stopped" if process.exitcode in (-signal.SIGINT, -signal.SIGTERM) else "memory may have run out"
        words = f"its process died with exit code {process.exitcode}; {why}"
        logger.warning("%s in %s, seed %d: %s", run.row, run.cell, run.seed, words)
        store(directory, run, BenchRecord(run.row, run.config.method_config()[0], error=words, died=True))


def _child(cell: str, row: str, seed: int, values: dict[str, Any], metrics: tuple[str, ...], published: tuple[float, ...], home: str, directory: str) -> None:
    end_with_parent()
    log = logging.getLogger("cdfkd_strategy")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    in_this_process(BenchRun(cell, row, seed, from_values(values), metrics, published), Path(home), Path(directory))
