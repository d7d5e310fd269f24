"""What a run of a bench adds to its summary: everything that methods are compared by, besides accuracies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cdfkd_strategy import seeding
from cdfkd_strategy.bench.config import BenchRun
from cdfkd_strategy.config import bind, to_dict
from cdfkd_strategy.engine import DistillResult
from cdfkd_strategy.errors import CDFKDError
from cdfkd_strategy.history import read_losses
from cdfkd_strategy.offline import Distilled
from cdfkd_strategy.step_counter import GENERATOR_STEPS, STUDENT_STEPS
from cdfkd_strategy.summary import BENCH, FILE_NAME, SummaryWriter, read_summary
from cdfkd_strategy.teachers import TeacherEnsemble

ENTROPY_IMAGES = 512
WATCHED = "test/student_merged"


@dataclass(frozen=True)
class BenchRecord:
    """One run, in plain values; None is what does not exist.

    Args:
        row: of the table.
        method: the registered name.
        teachers: SHA-256 of every teacher's weights.
        error: why the run failed.
        died: did its process die, or lack memory or a disk, so that the run is tried again when the bench is continued?
        agreement: fraction of test images to which student and ensemble give the same class.
        seconds: of all epochs; evaluation is not in them.
        student_steps: optimiser steps of the student.
        generator_steps: optimiser steps of everything else: generators, latent codes, images.
        class_entropy: entropy (nats) of the classes that the ensemble gives `ENTROPY_IMAGES` synthetic images; at most ln C.
        accuracy_best: of the best evaluated epoch, which is a selection on the test images.
        best_epoch: that epoch, from 1.
        bytes_up: of the teachers' weights, which is what clients upload.
        bytes_down: of the student's weights, times the clients.
        curve: seconds and accuracy at every evaluated epoch.
        recall: of every class: the fraction of its test images that the student gives it after the last epoch. Results of before it was kept have none.
        metrics: the bench's own columns: terms of the last epoch that has them.
        published: accuracies of student and teacher in the method's paper, if the bench says.
    """

    row: str
    method: str
    teachers: tuple[str, ...] = ()
    error: str | None = None
    died: bool = False
    agreement: float | None = None
    seconds: float | None = None
    student_steps: int | None = None
    generator_steps: int | None = None
    class_entropy: float | None = None
    accuracy_best: float | None = None
    best_epoch: int | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    curve: tuple[tuple[float, ...], ...] = ()
    recall: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    published: tuple[float, ...] = ()


def record_of(summary: Mapping[str, Any]) -> BenchRecord | None:
    """The record in a summary, or None if it is not of a bench."""
    return bind(BenchRecord, summary[BENCH], BENCH) if BENCH in summary else None


def measure(run: BenchRun, done: Distilled, hashes: tuple[str, ...]) -> BenchRecord:
    """The record of a run that is finished."""
    history, student, teachers, confusion = done.result.history, done.result.student, done.teachers, done.examination.confusion
    curve, seconds = [], 0.0
    for row in history:
        seconds += row["seconds"]
        if WATCHED in row:
            curve.append((int(row["epoch"]) + 1, round(seconds, 3), row[WATCHED]))
    best = max(curve, key=lambda point: point[2], default=None)
    return BenchRecord(
        run.row,
        run.config.method_config()[0],
        teachers=hashes,
        agreement=done.examination.agreement,
        seconds=round(seconds, 3),
        student_steps=int(sum(row[STUDENT_STEPS] for row in history)),
        generator_steps=int(sum(row[GENERATOR_STEPS] for row in history)),
        class_entropy=class_entropy(done.result, teachers, run.seed),
        accuracy_best=best[2] if best else None,
        best_epoch=best[0] if best else None,
        bytes_up=sum(_bytes(net) for net in teachers.nets),
        bytes_down=_bytes(student) * len(teachers),
        curve=tuple(point[1:] for point in curve),
        recall=() if confusion is None else tuple(round(share, 6) for share in (confusion.diag() / confusion.sum(1).clamp(min=1)).tolist()),
        metrics={name: next(row[name] for row in reversed(history) if name in row) for name in run.metrics if any(name in row for row in history)},
        published=run.published,
    )


@torch.no_grad()
def class_entropy(result: DistillResult, teachers: TeacherEnsemble, seed: int) -> float | None:
    """Entropy (nats) of the histogram of the ensemble's classes on a synthetic batch; None if the method has no images."""
    with result.runtime.scope():
        images = result.sample(ENTROPY_IMAGES, seeding.generator("class entropy", seed))
        if images is None:
            return None
        classes = teachers.fused(images.to(teachers.weights.device)).argmax(-1)
    share = torch.bincount(classes, minlength=teachers.image.num_classes).double() / len(classes)
    return float(torch.special.entr(share).sum())


def _bytes(net: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())


def with_columns(summary: Mapping[str, Any], run: BenchRun, directory: Path) -> dict[str, Any]:
    """A finished run's summary with what its bench says today of columns: ``published``, and ``metrics``, new ones from the directory's ``losses.csv``."""
    record = record_of(summary)
    if record is None or record.error is not None:
        return dict(summary)
    known = {name: value for row in read_losses(directory / "losses.csv") for name, value in row.items()} | dict(record.metrics)
    now = replace(record, metrics={name: known[name] for name in run.metrics if name in known}, published=run.published)
    return {**summary, BENCH: to_dict(now)} if now != record else dict(summary)


def store(directory: Path, run: BenchRun, record: BenchRecord) -> None:
    """Add a record to the summary of a run directory, which a run that failed early does not have yet."""
    SummaryWriter(directory, run.config, resume=True).add_bench(to_dict(record))


def read_done(directory: Path, run: BenchRun) -> dict[str, Any] | None:
    """The summary of a run that need not be run (again): finished, or failed for a reason that will not go away."""
    if not (directory / FILE_NAME).exists():
        return None
    summary = read_summary(directory)
    record = record_of(summary)
    if record is None or record.died:
        return None
    if record.error is not None:
        return summary
    if not summary["finished"]:
        raise CDFKDError(f"{directory / FILE_NAME} has a record and no end; remove the directory, so that it is run anew")
    return summary if is_whole(summary, run) else None


def is_whole(summary: Mapping[str, Any], run: BenchRun) -> bool:
    """Is a summary that of a run without an error which ``engine.max_seconds``, as it is now, would not let go on?"""
    record = record_of(summary)
    if record is None or record.error is not None or not summary["finished"]:
        return False
    return summary["stopped_by"] != "max_seconds" or run.config.engine.is_over(record.seconds or 0.0)
