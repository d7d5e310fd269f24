"""``distill()``: runs a method's epochs with resume, evaluation, logging, progress and a watch for collapse. Works without Flower."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cdfkd_strategy import parallel, seeding
from cdfkd_strategy.checkpoint import has_state, load_state, save_state, save_tensors, write_text
from cdfkd_strategy.collapse import CollapseWatch
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.data.transfer_pool import TransferPool
from cdfkd_strategy.data.transfer_set import FILE_NAME, Origin, TransferSet, save_transfer_set
from cdfkd_strategy.distiller import Distiller
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.errors import CDFKDError, CheckpointError, ConfigError
from cdfkd_strategy.history import losses_csv
from cdfkd_strategy.methods import get_method
from cdfkd_strategy.models.shared_batch_norm import average_statistics, shared_batch_norm
from cdfkd_strategy.progress import Progress
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.step_counter import StepCounter
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from cdfkd_strategy.types import Extras, ImageSpec

logger = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module], Mapping[str, float]]

GENERATOR_FILE, SYNTHETIC_FILE = "generator.safetensors", "synthetic.safetensors"
KEPT_IMAGES = 64
"""Synthetic images that a run directory keeps to look at: a square grid."""
SAMPLED_AT_ONCE = 256
"""Images of a transfer set that a generator makes at a time: always as many, since its BatchNorm layers take the statistics of a batch."""
CLIPPED_IS_SAID = 0.01
"""A transfer set that more than this share of values had to be clipped for comes with a warning."""


class DistillResult(NamedTuple):
    """What a distillation gives.

    ``history`` has one mapping per epoch: ``epoch``, ``seconds``, the method's terms, ``steps/...`` (optimiser steps), ``watch/...``
    and what ``evaluate`` returned. Its length is the number of epochs, so it is bounded by the schedule. ``sample`` is the method's
    own `Distiller.sample`, and keeps the method alive as long as the result is kept.
    """

    student: nn.Module
    generator: nn.Module | None
    history: list[dict[str, float]]
    epochs_done: int
    stopped_by: Literal["schedule", "max_seconds"]
    runtime: Runtime
    sample: Callable[[int, torch.Generator], Tensor | None]


@dataclass
class _Run:
    """What `distill` keeps while it runs."""

    distiller: Distiller
    identity: dict[str, Any]
    directory: Path | None
    runtime: Runtime
    seed: int
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of all epochs, those before a restart included."""
        return sum(row["seconds"] for row in self.history)

    def save(self) -> None:
        if self.directory is not None:
            state = {"identity": self.identity, "runtime": self.runtime.to_dict(), "history": self.history, "distiller": self.distiller.state_dict()}
            save_state(self.directory / "checkpoint", state)

    def write_losses(self) -> None:
        if self.directory is not None:
            write_text(self.directory / "losses.csv", losses_csv(self.history))


def distill(
    teachers: TeacherEnsemble,
    student: nn.Module,
    method: str | type[Distiller],
    *,
    config: Any = None,
    image: ImageSpec | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    evaluate: Evaluate | None = None,
    engine: EngineConfig | None = None,
    resume: bool = False,
    runtime: Runtime | None = None,
    extras: Extras | None = None,
    first_generator: Mapping[str, Tensor] | None = None,
) -> DistillResult:
    """Distil the teachers into the student, in place, with no data.

    In a process group of torch.distributed every process calls it alike and computes its rows of every batch; all get the student, the first
    one evaluates it and writes the files (`parallel`).

    Args:
        teachers: the frozen ensemble.
        student: gives `StudentOutputs`; trained in place and returned.
        method: a registered name, or a `Distiller` class.
        config: the method's ``Config``; None is its defaults.
        image: what the networks take; None is the teachers' own.
        seed: of everything random in the run.
        out: directory for ``losses.csv``, ``generator.safetensors``, ``synthetic.safetensors`` (64 images, pixels as bytes),
            ``transfer_set.safetensors`` if ``engine`` asks for it, and ``checkpoint/``; None keeps nothing.
        evaluate: called with the student (in eval mode) at epoch boundaries; what it returns is added to the history.
        engine: how to run; None is the defaults.
        resume: continue from ``out/checkpoint`` if there is one.
        runtime: resolved choices to reuse; None takes the checkpoint's when resuming, else resolves ``engine``'s.
        extras: what there is besides the teachers; the method gets of it what its ``needs`` declare.
        first_generator: the state dict that the method's generator starts from; None is the method's own start.

    Returns:
        `DistillResult`; the student is on the runtime's device, in eval mode.

    Raises:
        NeedsError: the teachers or the extras lack what the method needs; raised before any training.
        CheckpointError: ``resume`` with a checkpoint of another configuration, seed or other teachers, or of a device that is gone.
        ConfigError: several processes, for a method or with devices that do not allow it.
        CDFKDError: a loss term is not finite.
    """
    engine = engine or EngineConfig()
    image = image or teachers.image
    cls = get_method(method) if isinstance(method, str) else method
    config = cls.Config() if config is None else config
    given = (extras or Extras()).only(cls.needs)
    cls.check_extras(given)
    cls.check_processes()
    directory = None if out is None else Path(out)
    saved = load_state(directory / "checkpoint") if resume and directory is not None and has_state(directory / "checkpoint") else None
    identity = _identity(cls, config, image, seed, teachers, student, given)
    if saved is not None:
        _check_identity(saved["identity"], identity)
    if runtime is None:
        runtime = engine.runtime() if saved is None else engine.continued(Runtime.from_dict(saved["runtime"]))
    if runtime.channels_last and not teachers.accepts_channels_last():
        logger.info("a teacher cannot take images in the channels-last layout; distilling without it")
        runtime = dataclasses.replace(runtime, channels_last=False)
    runtime = engine.recomputing(engine.shared(runtime), cls.teachers_at_once(config, len(teachers)))
    runtime = teachers.folding(runtime, engine.resident_teachers, sharded=engine.shard_teachers)
    if not parallel.is_first():
        directory, engine = None, dataclasses.replace(engine, progress=False)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    with runtime.scope(), teachers.prepared(runtime, engine.resident_teachers, sharded=engine.shard_teachers), runtime.computing(student):
        with seeding.seeded_scope("distiller", seed):
            declared = {"extras": given} if given.tensors() else {}
            distiller = cls(teachers, student, config, image=image, rng=seeding.generator("distill", seed), runtime=runtime, **declared)
        if first_generator is not None:
            distiller.start_generator(first_generator)
        run = _Run(distiller, identity, directory, runtime, seed)
        if saved is not None:
            distiller.load_state_dict(saved["distiller"])
            run.history = saved["history"]
            logger.info("continuing after epoch %d of %d", len(run.history), distiller.num_epochs)
        _check_together(run)
        shared = shared_batch_norm(distiller.networks if parallel.size() > 1 and runtime.batch_norm == "synchronised" else [])
        with shared, runtime.compiling([distiller.generator] if distiller.generator is not None else []):
            stopped_by = _epochs(run, engine, evaluate if parallel.is_first() else None)
    student.eval()
    if directory is not None:
        _keep_images(directory, distiller, seed)
        if engine.transfer_images:
            _keep_transfer_set(directory, run, engine.transfer_images)
    return DistillResult(student, distiller.generator, run.history, len(run.history), stopped_by, runtime, distiller.sample)


def _keep_images(directory: Path, distiller: Distiller, seed: int) -> None:
    """The generator, and some images as the method shows them to the student; whichever of the two it has."""
    if distiller.generator is not None:
        save_tensors(directory / GENERATOR_FILE, distiller.generator.state_dict())
    with distiller.runtime.scope():
        images = distiller.sample(KEPT_IMAGES, seeding.generator("pictures", seed))
    if images is not None:
        pixels = distiller.image.to_pixels(images).mul(255).round().to(torch.uint8)
        save_tensors(directory / SYNTHETIC_FILE, {"pixels": pixels.contiguous()})


def _keep_transfer_set(directory: Path, run: _Run, count: int) -> None:
    """So many images of a generator, or different ones of a pool and no more than it has."""
    distiller, rng = run.distiller, seeding.generator("transfer set", run.seed)
    pool = getattr(distiller, "pool", None)
    if isinstance(pool, TransferPool) and len(pool):
        pixels = pool.pixels[pool.choose(min(count, len(pool)), rng)]
    else:
        with distiller.runtime.scope():
            parts = [distiller.sample(SAMPLED_AT_ONCE, rng) for _ in range(0, count, SAMPLED_AT_ONCE)]
        made = [part for part in parts if part is not None]
        if not made:
            logger.warning("method %r has made no images, so that there is no transfer set to keep", distiller.name)
            return
        pixels = torch.cat([distiller.image.to_pixels(part).mul(255).round().to(torch.uint8).cpu() for part in made])[:count]
        clipped = sum(map(distiller.image.share_outside, made)) / len(made)
        if clipped > CLIPPED_IS_SAID:
            logger.warning(
                "%.0f %% of the values in the transfer set were no pixels and were clipped to black or white: these are not the images that the student "
                "learned from (a generator with output=sigmoid makes pixels)", 100 * clipped
            )  # fmt: skip
    origin = Origin(distiller.image, distiller.name, run.seed, tuple(run.identity["teachers"]))
    save_transfer_set(directory / FILE_NAME, TransferSet(pixels, origin))
    logger.info("transfer set: %d images in %s", len(pixels), directory / FILE_NAME)


def saved_runtime(directory: Path) -> Runtime | None:
    """What the checkpoint in a run directory was computed with; None without a checkpoint.

    Raises:
        CheckpointError: it is broken.
    """
    return Runtime.from_dict(load_state(directory / "checkpoint")["runtime"]) if has_state(directory / "checkpoint") else None


def _epochs(run: _Run, engine: EngineConfig, evaluate: Evaluate | None) -> Literal["schedule", "max_seconds"]:
    """The epoch loop, from the first epoch that is not in the history."""
    distiller, total = run.distiller, run.distiller.num_epochs
    watch, steps = CollapseWatch(distiller, engine.watch_images, run.seed, run.history), StepCounter(distiller.student)
    with Progress(distiller.name, total, len(run.history), enabled=engine.progress) as progress:
        while (epoch := len(run.history)) < total:
            if run.history and engine.is_over(run.seconds):  # a run that was stopped before stays stopped
                return "max_seconds"
            started = time.perf_counter()
            with seeding.seeded_scope("epoch", run.seed, epoch), parallel.splitting(), steps.counting() as made:
                terms = dict(distiller.run_epoch(epoch))
            terms, seconds = _together(run, terms, time.perf_counter() - started)
            terms.update(made)
            _check_finite(terms, epoch, distiller.name)
            terms.update(watch.look(epoch))
            last = epoch + 1 == total
            out_of_time = engine.is_over(run.seconds + seconds) and not last
            if evaluate is not None and (last or out_of_time or (engine.evaluate_every and (epoch + 1) % engine.evaluate_every == 0)):
                distiller.student.eval()
                with seeding.seeded_scope("evaluate", run.seed, epoch), torch.no_grad():
                    terms.update(evaluate(distiller.student))
            run.history.append({"epoch": epoch, "seconds": seconds, **terms})
            run.write_losses()
            if last or out_of_time or (epoch + 1) % engine.checkpoint_every == 0:
                run.save()
            progress.advance(terms)
            if out_of_time:
                logger.warning("stopped after epoch %d of %d: %.0f s are over engine.max_seconds=%s", epoch + 1, total, run.seconds, engine.max_seconds)
                return "max_seconds"
    return "schedule"


def _together(run: _Run, terms: dict[str, float], seconds: float) -> tuple[dict[str, float], float]:
    """The epoch's terms of the whole batch and its seconds, the same for all processes; statistics that they do not share are averaged."""
    if parallel.size() == 1:
        return terms, seconds
    if run.runtime.batch_norm == "local":
        average_statistics(run.distiller.networks)
    found = parallel.everyone(torch.tensor([seconds, *terms.values()], dtype=torch.float64, device=run.runtime.device))
    return dict(zip(terms, found[:, 1:].mean(0).tolist(), strict=True)), float(found[0, 0])


def _check_together(run: _Run) -> None:
    """All processes must begin with the same job, teachers, weights and epoch; otherwise each would train a student of its own."""
    if parallel.size() == 1:
        return
    weights = [state_hash(network.state_dict()) for network in run.distiller.networks]
    mine = seeding.derive_seed(json.dumps([to_dict(run.identity), len(run.history), weights]))
    found = parallel.everyone(torch.tensor(mine, device=run.runtime.device)).tolist()
    if len(set(found)) > 1:
        others = [number for number, value in enumerate(found) if value != found[0]]
        raise ConfigError(
            f"processes {others} begin with another configuration, teachers, checkpoint or first student than process 0; "
            "accepted: the same files and the same kind of machine for all"
        )


def _identity(cls: type[Distiller], config: Any, image: ImageSpec, seed: int, teachers: TeacherEnsemble, student: nn.Module, extras: Extras) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    return {
        "method": cls.name,
        "config": to_dict(config),
        "image": to_dict(image),
        "seed": seed,
        "teachers": [state_hash(net.state_dict()) for net in teachers.nets],
        "weights": state_hash({"weights": teachers.weights}),
        "student": state_hash({name: torch.zeros(tensor.shape) for name, tensor in student.state_dict().items()}),
        **({"extras": state_hash(extras.tensors())} if extras.tensors() else {}),
    }


def _check_identity(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    # JSON has no tuples: compare the round-tripped form
    different = [name for name in mine if to_dict(saved.get(name)) != to_dict(mine[name])]
    if different:
        first = different[0]
        raise CheckpointError(
            f"the checkpoint was written with another {', '.join(different)} ({first}: {saved.get(first)!r} there, {mine[first]!r} here); "
            "continue with the same configuration and teachers, or start a new run directory"
        )


def _check_finite(terms: Mapping[str, float], epoch: int, name: str) -> None:
    broken = [key for key, value in terms.items() if not math.isfinite(value)]
    if broken:
        raise CDFKDError(
            f"{name}: {', '.join(broken)} became NaN or infinite in epoch {epoch + 1}; lower the learning rates "
            "(method.student_lr, method.generator_lr) in a new run directory, and check the teachers; those of a federation are not lost: "
            "`cdfkd distill --teachers RUN/uploads` takes them"
        )
