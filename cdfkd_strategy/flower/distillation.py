"""From stored uploads to a student: the server's part of a round that needs no network."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cdfkd_strategy import seeding
from cdfkd_strategy.checkpoint import has_state, load_tensors, save_tensors
from cdfkd_strategy.competence import LABEL_COUNTS, estimate, weights_of
from cdfkd_strategy.engine import GENERATOR_FILE, DistillResult, distill
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.flower.architectures import Architectures
from cdfkd_strategy.flower.options import Options
from cdfkd_strategy.flower.run_state import RunState
from cdfkd_strategy.flower.uploads import Upload, Uploads
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.single_header import distill_single_header
from cdfkd_strategy.student_io import load_student, save_student
from cdfkd_strategy.teachers import TeacherEnsemble, TeacherSpec
from cdfkd_strategy.types import Extras
from cdfkd_strategy.warm_start import first_student

logger = logging.getLogger("flwr")

SINGLE_FILE = "student-single.safetensors"


@dataclass
class Distilled:
    """What the last distillation of a run gave; None before there was one."""

    student: MultiHeaderStudent | None = None
    single: MultiHeaderStudent | None = None
    teachers: TeacherEnsemble | None = None
    generator: nn.Module | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    stopped_by: str | None = None
    runtime: Runtime | None = None


def by_slot(slots: Mapping[str, int]) -> list[str]:
    """Client keys in the order of their header slots."""
    return sorted(slots, key=lambda key: slots[key])


def ensemble(options: Options, uploads: Uploads, keys: Sequence[str], architectures: Architectures) -> TeacherEnsemble:
    """The teachers of these clients, in this order, with uniform weights. With ``engine.resident_teachers`` their weights stay in the uploaded files."""
    mapped = options.engine.resident_teachers > 0
    models = [architectures.load(uploads[key].arch, uploads.load(key), mapped=mapped) for key in keys]
    specs = [TeacherSpec(key, uploads[key].arch, uploads[key].num_examples, uploads[key].sha256) for key in keys]
    return TeacherEnsemble(models, None, image=architectures.image, specs=specs)


def teacher_weights(teachers: TeacherEnsemble, uploads: Sequence[Upload], live: Sequence[bool], mode: str, seed: int) -> Tensor:
    """Class weights ``[K, C]``: 0 for teachers that are too old, columns sum to 1 over the others.

    Args:
        teachers: the ensemble.
        uploads: K, what is known of each teacher.
        live: K, may the teacher still be used?
        mode: a competence estimate, or "label_counts" (``n_kc / sum_k n_kc``).
        seed: of sampling estimates.
    """
    if mode == LABEL_COUNTS:
        return weights_of(torch.tensor([upload.label_counts for upload in uploads]), live)
    weights = estimate(teachers, teachers.image, seeding.generator("competence", seed), mode).cpu()
    return weights if all(live) else weights_of(weights, live)


def extras_of(options: Options, uploads: Uploads, teachers: TeacherEnsemble) -> Extras:
    """What the server has besides the teachers: the label counts of their uploads, where clients were asked for them."""
    if not options.label_counts:
        return Extras()
    return Extras(label_counts=torch.tensor([uploads[spec.key].label_counts for spec in teachers.specs]))


def distil_round(options: Options, teachers: TeacherEnsemble, previous: Distilled, server_round: int, uploads: Uploads, runtime: Runtime) -> Distilled:
    """Distil the ensemble into the last round's student, and write student and single header to the run directory.

    With a run directory, an interrupted distillation of this round is continued from the engine's checkpoint.

    Args:
        options: the strategy's settings.
        teachers: the ensemble with its class weights.
        previous: what the last round gave.
        server_round: from 1.
        uploads: behind the teachers.
        runtime: of the whole run.
    """
    weights = teachers.weights.cpu().clone()
    with runtime.scope():
        before = student_for(options, previous.student, teachers, server_round)
    generator = _kept_generator(options, previous) if options.keep_generator and server_round > 1 else None
    result = _distil(options, teachers, before, server_round, uploads, runtime, generator)
    student: Any = result.student
    done = Distilled(student, None, teachers, result.generator, result.history, result.stopped_by, result.runtime)
    if options.run_dir is not None:
        save_student(options.run_dir, student, weights)
    if options.broadcast == "single":
        done.single = _single(options, student, weights, server_round, result)
        if options.run_dir is not None:
            save_tensors(options.run_dir / SINGLE_FILE, done.single.state_dict())
    return done


def read_back(options: Options) -> Distilled:
    """The last finished distillation's student (and single header) from the run directory."""
    assert options.run_dir is not None
    student = load_student(options.run_dir).student
    assert isinstance(student, MultiHeaderStudent)
    single = None
    if options.broadcast == "single":
        single = student.with_heads(1)
        single.load_state_dict(load_tensors(options.run_dir / SINGLE_FILE))
        single.eval()
    return Distilled(student.eval(), single)


def restore(options: Options, teachers: TeacherEnsemble, server_round: int, uploads: Uploads, runtime: Runtime) -> Distilled:
    """What `distil_round` gave before the server was restarted; generator and history too, if the checkpoint is complete."""
    done = read_back(options)
    done.teachers = teachers
    assert options.run_dir is not None
    if has_state(options.run_dir / "checkpoint"):
        student = student_for(options, None, teachers, 1)
        reading = dataclasses.replace(options, engine=dataclasses.replace(options.engine, max_seconds=0.0))  # the last epoch's checkpoint, and no epoch more
        result = _distil(reading, teachers, student, server_round, uploads, runtime)
        done.generator, done.history, done.stopped_by, done.runtime = result.generator, result.history, result.stopped_by, result.runtime
    return done


def _kept_generator(options: Options, previous: Distilled) -> Mapping[str, Tensor] | None:
    """The last round's generator, from the run directory if there is one: a server that was restarted has it nowhere else."""
    if options.run_dir is not None:
        file = options.run_dir / GENERATOR_FILE
        return load_tensors(file) if file.exists() else None
    return None if previous.generator is None else previous.generator.state_dict()


def _distil(
    options: Options,
    teachers: TeacherEnsemble,
    student: MultiHeaderStudent,
    server_round: int,
    uploads: Uploads,
    runtime: Runtime,
    generator: Mapping[str, Tensor] | None = None,
) -> DistillResult:
    """Distil the teachers that count into their headers; a header whose teacher is too old stays as it is."""
    counted = teachers.counted
    live = teachers.only(counted)
    result = distill(
        live,
        student.only(counted),
        options.method,
        config=options.method_config,
        image=options.image,
        seed=round_seed(options.seed, server_round),
        out=options.run_dir,
        evaluate=None if options.watch is None else options.watch(live.weights.cpu().clone()),
        engine=options.engine,
        resume=options.run_dir is not None,
        runtime=runtime,
        extras=extras_of(options, uploads, live),
        first_generator=generator,
    )
    if not options.engine.resident_teachers:
        result.runtime.place(teachers)
    return result._replace(student=result.runtime.place(student).eval())


def may_go_on(options: Options, state: RunState) -> bool:
    """Did ``engine.max_seconds`` stop the last distillation, and does it allow more by now? (An earlier round is over: clients have its student.)"""
    if state.phase not in ("distilled", "evaluated") or state.record.stopped_by != "max_seconds" or options.run_dir is None:
        return False
    return not options.engine.is_over(state.record.seconds["distill"]) and has_state(options.run_dir / "checkpoint")


def student_for(options: Options, previous: MultiHeaderStudent | None, teachers: TeacherEnsemble, server_round: int) -> MultiHeaderStudent:
    """The student that a round starts from: a fresh one, or the last round's with heads for the new slots."""
    if previous is None:
        width, stages = options.student_max_width, options.student_stages
        return first_student(options.student, teachers, max_width=width, init=options.student_init, stages=stages, seed=options.seed)
    if previous.heads == len(teachers):
        return previous
    with seeding.seeded_scope("student heads", options.seed, server_round):
        return previous.with_heads(len(teachers))


def round_seed(seed: int, server_round: int) -> int:
    """The distillation's seed: the run's own in round 1, so that a one-shot run equals `distill` on the same teachers."""
    return seed if server_round == 1 else seeding.derive_seed("round", seed, server_round)


def _single(options: Options, student: MultiHeaderStudent, weights: Tensor, server_round: int, result: DistillResult) -> MultiHeaderStudent:
    """One header in place of all, distilled on the method's own images."""

    def sample(count: int, rng: torch.Generator) -> Tensor:
        images = result.sample(count, rng)
        if images is None:
            raise ConfigError(
                f"broadcast is 'single', but method {options.distiller.name!r} has no synthetic images to distil it with; "
                "accepted with it: broadcast='heads', in a new run (the student with all headers is in the run directory)"
            )
        return images

    rng = seeding.generator("single header", options.seed, server_round)
    return distill_single_header(student, weights, sample, steps=options.single_steps, rng=rng, runtime=result.runtime)
