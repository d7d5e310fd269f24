"""A distilled student on disk: ``student.safetensors``, with how to build and fuse it inside; ``student.json`` repeats that for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdfkd_strategy import seeding
from cdfkd_strategy.checkpoint import load_metadata, load_tensors, save_tensors, write_json
from cdfkd_strategy.config import bind, to_dict
from cdfkd_strategy.errors import CheckpointError
from cdfkd_strategy.models.head_fusion import FusedStudent
from cdfkd_strategy.models.multi_header import StudentSpec
from cdfkd_strategy.models.plain_student import Student, build_student

WEIGHTS_FILE = "student.safetensors"
SPEC_FILE = "student.json"
DESCRIPTION = "student"


def save_student(run_dir: Path, student: Student, weights: Tensor | None = None) -> None:
    """Write a student to a run directory.

    Args:
        run_dir: the directory; made if missing.
        student: the student.
        weights: class weights of its headers ``[K, C]``; None is uniform.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    rows = None if weights is None else weights.detach().double().cpu().tolist()
    description = {"spec": to_dict(student.spec), "weights": rows}
    save_tensors(run_dir / WEIGHTS_FILE, student.state_dict(), {DESCRIPTION: json.dumps(description)})  # one file: never half a student
    write_json(run_dir / SPEC_FILE, description)


def load_student(run_dir: Path | str) -> FusedStudent:
    """The student of a run as one classifier, in eval mode on the CPU.

    Args:
        run_dir: what ``cdfkd run`` or ``cdfkd distill`` wrote.

    Returns:
        A module that takes pixels in [0, 1], ``[B, channels, H, W]``, and gives log-probabilities ``[B, C]``: the headers
        fused with the class weights of the run.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    run_dir = Path(run_dir)
    description = _read_description(run_dir / WEIGHTS_FILE)
    with seeding.seeded_scope("load_student"):
        student = build_student(bind(StudentSpec, description["spec"], "student"))
    try:
        student.load_state_dict(load_tensors(run_dir / WEIGHTS_FILE))
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {run_dir / WEIGHTS_FILE} do not fit their description: {error}") from error
    weights = description["weights"]
    return FusedStudent(student, None if weights is None else torch.tensor(weights)).eval()


def _read_description(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"there is no {path}: give the directory of a finished run")
    try:
        description = json.loads(load_metadata(path)[DESCRIPTION])
        if set(description) >= {"spec", "weights"}:
            return dict(description)
        reason = "it lacks spec or weights"
    except (KeyError, ValueError, TypeError) as error:
        reason = f"it is missing or malformed ({error})"
    raise CheckpointError(f"cannot read the student's description {path}: {reason}")
