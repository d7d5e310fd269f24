"""The teachers that clients uploaded: one safetensors file per client, or memory where there is no run directory."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import MetricRecord, RecordDict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cdfkd_strategy.checkpoint import load_tensors, save_tensors, write_json
from cdfkd_strategy.config import bind, to_dict
from cdfkd_strategy.errors import CDFKDError, CheckpointError
from cdfkd_strategy.flower.payload import METRICS
from cdfkd_strategy.teacher_directory import INDEX, TeacherSet, write_index
from cdfkd_strategy.teachers import TeacherSpec, state_hash
from cdfkd_strategy.types import ImageSpec

_HEADER = "upload"


@dataclass(frozen=True)
class Upload:
    """What is known of a client's last good upload.

    Args:
        key: of the client.
        arch: the architecture's name.
        num_examples: training samples.
        round: in which it was trained.
        sha256: of the weights (`state_hash`).
        num_bytes: of the message's arrays.
        speaks: the client knows this project's records.
        lasting: the key is the client's own, not a node id, which ends with its node.
        label_counts: disclosed counts per class; None unless opted in.
        metrics: the finite ones of what the client reported.
    """

    key: str
    arch: str
    num_examples: int
    round: int
    sha256: str
    num_bytes: int
    speaks: bool
    lasting: bool
    label_counts: tuple[int, ...] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def content(self) -> RecordDict:
        """The reply's metrics, in the form that aggregation functions take."""
        return RecordDict({METRICS: MetricRecord(dict(self.metrics))})


class Uploads:
    """The last good upload of every client.

    A file is replaced in one step, after its bytes are on the disk, and describes itself in its header, so that a killed
    server (or machine) finds, for every client, either its former upload or its new one, whole. The ``.json`` beside it repeats the header for people.

    Args:
        directory: where the files are; None keeps the weights in memory.

    Raises:
        CheckpointError: a file is broken.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._uploads: dict[str, Upload] = {}
        self._states: dict[str, dict[str, Tensor]] = {}
        if directory is None:
            return
        for leftover in directory.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        for path in sorted(directory.glob("*.safetensors")):
            upload = _read_header(path)
            self._uploads[upload.key] = upload

    def __contains__(self, key: object) -> bool:
        return key in self._uploads

    def __getitem__(self, key: str) -> Upload:
        return self._uploads[key]

    @property
    def trained_in(self) -> dict[str, int]:
        """Client key -> round of its last good upload."""
        return {key: upload.round for key, upload in self._uploads.items()}

    def put(self, upload: Upload, state: dict[str, Tensor]) -> None:
        """Store an upload in place of the client's former one."""
        if self.directory is None:
            self._states[upload.key] = state
        else:
            path = self._path(upload.key)
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / INDEX).unlink(missing_ok=True)  # it is of the last round
            # one metadata key: safetensors writes several in any order, and equal uploads must give equal files
            save_tensors(path, state, {_HEADER: json.dumps(to_dict(upload))})
            write_json(path.with_suffix(".json"), to_dict(upload))
        self._uploads[upload.key] = upload

    def load(self, key: str) -> dict[str, Tensor]:
        """The weights of a client's last good upload.

        Raises:
            CheckpointError: the file is missing, broken or changed.
        """
        if self.directory is None:
            return self._states[key]
        state = load_tensors(self._path(key))
        if state_hash(state) != self._uploads[key].sha256:
            raise CheckpointError(
                f"the weights in {self._path(key)} are not those that were uploaded (another SHA-256); restore the file, or start a new run directory"
            )
        return state

    def write_index(self, keys: Sequence[str], image: ImageSpec, seed: int, config: Mapping[str, Any]) -> None:
        """Say which uploads are a round's teachers, so that `cdfkd distill --teachers` reads them: nobody need train again for other settings.

        Args:
            keys: of the clients, in the order of their header slots.
            image: what the teachers take.
            seed: of the run.
            config: of the run, as plain values; empty if it had none.
        """
        if self.directory is None:
            return
        uploads = [self[key] for key in keys]
        specs = tuple(TeacherSpec(upload.key, upload.arch, upload.num_examples, upload.sha256) for upload in uploads)
        disclosed = [list(upload.label_counts) for upload in uploads if upload.label_counts is not None]
        counts = disclosed if len(disclosed) == len(uploads) else None
        teachers = TeacherSet(specs, [], image, seed, dict(config), label_counts=counts)
        write_index(self.directory, teachers, [self._path(key).name for key in keys])

    def drop_strays(self, slots: Container[str]) -> None:
        """Forget nodes without a header slot. Clients with a key of their own are kept: they go on from their teacher when they return."""
        for key in [key for key, upload in self._uploads.items() if key not in slots and not upload.lasting]:
            self.remove(key)

    def remove(self, key: str) -> None:
        """Forget a client."""
        self._uploads.pop(key, None)
        self._states.pop(key, None)
        if self.directory is not None:
            self._path(key).unlink(missing_ok=True)
            self._path(key).with_suffix(".json").unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{key}.safetensors"


def _read_header(path: Path) -> Upload:
    try:
        with safe_open(path, framework="pt") as file:
            return bind(Upload, json.loads((file.metadata() or {})[_HEADER]), path.name)
    except (OSError, SafetensorError, KeyError, ValueError, CDFKDError) as error:
        raise CheckpointError(f"{path} is not an upload of this run ({error}); restore it, or start a new run directory") from error
