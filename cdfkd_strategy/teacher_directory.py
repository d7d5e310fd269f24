"""A directory of trained teachers: ``teachers.json`` and one safetensors file each. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdfkd_strategy.checkpoint import load_metadata, load_tensors, save_tensors, write_json
from cdfkd_strategy.config import bind, to_dict
from cdfkd_strategy.errors import CheckpointError, ConfigError
from cdfkd_strategy.models.classifiers import ARCHITECTURES, build_classifier
from cdfkd_strategy.seeding import seeded_scope
from cdfkd_strategy.teachers import TeacherSpec, state_hash
from cdfkd_strategy.types import ImageSpec

INDEX = "teachers.json"
FORMAT = 1
TRAINING = "training"
"""Metadata of a teacher's file: how that teacher came about, for as long as the directory has no index, which then says it."""

_SPEC_KEYS = {"key", "arch", "file", "sha256", "num_samples"}


@dataclass(frozen=True, eq=False)
class TeacherSet:
    """K teachers and where they come from.

    Args:
        specs: K descriptions; the key is the client's partition id as text.
        models: K networks.
        image: what they take.
        seed: of the run that trained them.
        config: the resolved configuration of that run, as plain values.
        oracle_label_counts: ``[K][C]``, what each client trained on; for the evaluation harness only, never for a method.
        label_counts: ``[K][C]``, what the clients disclosed because that run asked for it (``server.weights=label_counts``); else None.
    """

    specs: tuple[TeacherSpec, ...]
    models: list[nn.Module]
    image: ImageSpec
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    oracle_label_counts: list[list[int]] | None = None
    label_counts: list[list[int]] | None = None


def save_teachers(directory: Path, teachers: TeacherSet) -> TeacherSet:
    """Write a teacher directory; the index comes last, so that a directory with an index is whole.

    Args:
        directory: created if it is not there.
        teachers: the hashes in its specs are computed anew.

    Returns:
        The same set with the hashes that were written.

    Raises:
        CheckpointError: specs, models and counts do not belong together.
    """
    _check(teachers)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX).unlink(missing_ok=True)
    specs = []
    for k, (spec, model) in enumerate(zip(teachers.specs, teachers.models, strict=True)):
        state = model.state_dict()
        specs.append(replace(spec, sha256=state_hash(state)))
        save_tensors(directory / teacher_file(k), state)
    written = replace(teachers, specs=tuple(specs))
    write_index(directory, written, [teacher_file(k) for k in range(len(specs))])
    return written


def teacher_file(k: int) -> str:
    """The name of teacher k's file."""
    return f"teacher-{k}.safetensors"


def keep_teacher(directory: Path, k: int, model: nn.Module, *, config: Mapping[str, Any], stats: Mapping[str, float]) -> None:
    """Keep one teacher of several as soon as it is done, so that an interruption does not cost it. The directory has no index from now on.

    Args:
        directory: what `write_index` will finish.
        k: its number.
        model: the network.
        config: the configuration that it was trained with, as plain values.
        stats: what `train_teacher` said.
    """
    (directory / INDEX).unlink(missing_ok=True)
    save_tensors(directory / teacher_file(k), model.state_dict(), {TRAINING: json.dumps({"config": dict(config), "stats": dict(stats)})})


def about_kept_teacher(directory: Path, k: int) -> tuple[dict[str, Any], dict[str, float]] | None:
    """The configuration and statistics that `keep_teacher` was given; None if it has kept no such teacher.

    Raises:
        CheckpointError: the file is broken.
    """
    path = directory / teacher_file(k)
    about = load_metadata(path).get(TRAINING) if path.exists() else None
    if about is None:
        return None
    try:
        found = json.loads(about)
        return dict(found["config"]), {"num_examples": found["stats"]["num_examples"], **found["stats"]}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not say how its teacher was trained; remove it, and that teacher is trained anew") from error


def kept_teacher(directory: Path, k: int, arch: str, image: ImageSpec) -> nn.Module:
    """The network that `keep_teacher` was given, in eval mode.

    Raises:
        CheckpointError: the file is broken, or does not hold this architecture.
    """
    path = directory / teacher_file(k)
    return _network(path, arch, image, load_tensors(path))


def write_index(directory: Path, teachers: TeacherSet, files: Sequence[str]) -> None:
    """Make a teacher directory of one that has the weights already.

    Args:
        directory: with the files.
        teachers: what is to be read from it; their hashes must be right, their models are not looked at.
        files: K names of safetensors files in the directory.
    """
    index = {
        "format": FORMAT,
        "image": to_dict(teachers.image),
        "seed": teachers.seed,
        "teachers": [{**to_dict(spec), "file": file} for spec, file in zip(teachers.specs, files, strict=True)],
        "oracle": {"label_counts": teachers.oracle_label_counts},
        "disclosed": {"label_counts": teachers.label_counts},
        "config": to_dict(teachers.config),
    }
    write_json(directory / INDEX, index)


def _check(teachers: TeacherSet) -> None:
    keys = [spec.key for spec in teachers.specs]
    if not keys or len(keys) != len(teachers.models) or len(set(keys)) != len(keys):
        raise CheckpointError(f"{len(teachers.models)} teachers with the keys {', '.join(keys) or 'none'}; accepted: at least one, each with its own key")
    for what, counts in (("oracle", teachers.oracle_label_counts), ("disclosed", teachers.label_counts)):
        if counts is not None and (len(counts) != len(keys) or any(len(row) != teachers.image.num_classes for row in counts)):
            raise CheckpointError(f"{what} label counts do not fit; accepted: [K, C] = [{len(keys)}, {teachers.image.num_classes}]")


def load_teachers(directory: Path, *, mapped: bool = False) -> TeacherSet:
    """Read a teacher directory; every file's hash, keys, shapes and types are checked.

    Args:
        directory: what `save_teachers` or a run's uploads made.
        mapped: leave the weights in their files, which the operating system reads when something looks at them (and may drop again): for
            many teachers of which some have working copies at a time (`engine.resident_teachers`). The files must stay as they are meanwhile.

    Raises:
        CheckpointError: the directory is missing, broken, or was changed.
    """
    index = _read_index(directory)
    try:
        image = bind(ImageSpec, index["image"], "image")
        teachers = TeacherSet(
            specs=tuple(bind(TeacherSpec, {key: entry[key] for key in _SPEC_KEYS - {"file"}}, "teachers") for entry in index["teachers"]),
            models=[_load(directory, entry, image, mapped=mapped) for entry in index["teachers"]],
            image=image,
            seed=int(index["seed"]),
            config=dict(index["config"]),
            oracle_label_counts=_counts(index["oracle"]["label_counts"]),
            label_counts=_counts(index.get("disclosed", {}).get("label_counts")),  # older directories do not have it
        )
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{directory / INDEX} is not what this version writes: {what}; make the directory anew with `cdfkd teachers`") from error
    _check(teachers)
    return teachers


def _counts(counts: Any) -> list[list[int]] | None:
    return None if counts is None else [[int(count) for count in row] for row in counts]


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} holds no {INDEX}, so it is no (finished) teacher directory; make one with `cdfkd teachers`") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; make the directory anew with `cdfkd teachers`") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"{path} has another format; accepted: {FORMAT}; make the directory anew with `cdfkd teachers`")
    return index


def _load(directory: Path, entry: Mapping[str, Any], image: ImageSpec, *, mapped: bool) -> nn.Module:
    """One teacher, in eval mode."""
    name = str(entry["file"])
    if Path(name).name != name:
        raise CheckpointError(f"teacher file {name!r}; accepted: a file name inside {directory}")
    path = directory / name
    if entry["arch"] not in ARCHITECTURES:
        raise CheckpointError(
            f"the teacher in {path} is a {entry['arch']!r}, which is no registered architecture; "
            "a network of your own can be distilled by `distill` in Python, with a TeacherEnsemble of it"
        )
    state = load_tensors(path)
    model = _network(path, entry["arch"], image, state, mapped=mapped)
    found = state_hash(state)
    if found != entry["sha256"]:
        raise CheckpointError(
            f"{path} was changed: its weights have the SHA-256 {found[:12]}..., {INDEX} says {str(entry['sha256'])[:12]}...; restore the file or train anew"
        )
    return model


def _network(path: Path, arch: str, image: ImageSpec, state: Mapping[str, Tensor], *, mapped: bool = False) -> nn.Module:
    """The architecture with the weights of a file."""
    with seeded_scope("teacher-directory"):
        model = build_classifier(arch, image)
    _compare(path, arch, state, model.state_dict())
    model.load_state_dict(state, assign=mapped)
    return model.eval()


def _compare(path: Path, arch: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, shapes and dtypes as the architecture, and only finite numbers."""
    if set(state) != set(expected):
        other = sorted(set(state) ^ set(expected))
        raise CheckpointError(f"{path} does not hold a {arch!r}: missing or unknown tensors {', '.join(other[:5])}{', ...' if len(other) > 5 else ''}")
    for name, tensor in state.items():
        like = expected[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}; accepted for {arch!r}: {like.dtype} {list(like.shape)}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite; train this teacher anew with `cdfkd teachers`")
