"""The student of a first round: one or more fresh headers on a trunk that is random, or already knows something."""

from __future__ import annotations

import logging
from typing import Literal, get_args

import torch

from cdfkd_strategy import seeding
from cdfkd_strategy.averaging import average_state
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.models.plain_student import PlainStudent, Student
from cdfkd_strategy.models.stages import MAX_STAGES
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec

logger = logging.getLogger(__name__)

Init = Literal["average", "random"]
Heads = Literal["per_teacher", "one", "plain"]


def first_student(
    backbone: str,
    teachers: TeacherEnsemble,
    *,
    max_width: int | Literal["auto"] | None = "auto",
    init: Init = "average",
    stages: int = MAX_STAGES,
    seed: int,
) -> MultiHeaderStudent:
    """A student with one header per teacher.

    The paper (CDFKD-MFS, arXiv:2205.11845) starts from random weights, ``init="random"``. In a federation there is
    something better for free: ``init="average"``, the default, fills the trunk with the sample-weighted mean of the
    teachers that have the student's own architecture (they started from a common initialisation, so their mean still
    has features, even where label skew spoils its classifier). Without such a teacher it is random too. Headers are
    always fresh. `simulations/LOG.md` has the comparison.

    Args:
        backbone: an architecture's name.
        teachers: the ensemble; its specs say who has which architecture.
        max_width: see `MultiHeaderStudent`.
        init: "average" or "random".
        stages: see `MultiHeaderStudent`.
        seed: of the random part.

    Raises:
        ConfigError: another ``init``.
    """
    _check_init(init)
    with seeding.seeded_scope("student", seed):
        student = MultiHeaderStudent(backbone, len(teachers), teachers.image, max_width=max_width, stages=stages)
    same = [index for index, spec in enumerate(teachers.specs) if spec.arch == backbone]
    if init == "average" and same:
        state = average_state([teachers.nets[index] for index in same], [teachers.specs[index].num_samples for index in same])
        trunk = student.trunk.net
        trunk.load_state_dict({name: state[name] for name in trunk.state_dict()})
        logger.info("the student's trunk starts from the mean of %d teachers", len(same))
    return student


def check_student(
    backbone: str, image: ImageSpec, *, max_width: int | Literal["auto"] | None = "auto", init: Init = "average", stages: int = MAX_STAGES
) -> None:
    """Can `first_student` make such a student, whatever the teachers? For a server, before its clients train; nothing is allocated.

    Args:
        backbone: an architecture's name.
        image: what the teachers take.
        max_width: see `MultiHeaderStudent`.
        init: "average" or "random".
        stages: see `MultiHeaderStudent`.

    Raises:
        ConfigError: an unknown name, or a setting that is not accepted.
        ArchitectureError: the backbone has no stages at this image size.
    """
    _check_init(init)
    with torch.device("meta"):
        MultiHeaderStudent(backbone, 1, image, max_width=max_width, stages=stages)


def _check_init(init: Init) -> None:
    if init not in get_args(Init):
        raise ConfigError(f"student init is {init!r}; accepted: {', '.join(map(repr, get_args(Init)))}")


def chosen_student(
    heads: Heads,
    backbone: str,
    teachers: TeacherEnsemble,
    *,
    max_width: int | Literal["auto"] | None = "auto",
    init: Init = "average",
    stages: int = MAX_STAGES,
    seed: int,
) -> Student:
    """A first student of one of three kinds, for the comparison of methods; the same seed gives students with headers the same trunk.

    Args:
        heads: "per_teacher" is `first_student`; "one" has its trunk and the first of its headers; "plain" is the backbone with its own
            classifier, always from random weights.
        backbone: an architecture's name.
        teachers: the ensemble.
        max_width: see `MultiHeaderStudent`.
        init: "average" or "random".
        stages: see `MultiHeaderStudent`.
        seed: of the random part.
    """
    if heads == "plain":
        with seeding.seeded_scope("student", seed):
            return PlainStudent(backbone, teachers.image)
    student = first_student(backbone, teachers, max_width=max_width, init=init, stages=stages, seed=seed)
    return student.with_heads(1) if heads == "one" else student
