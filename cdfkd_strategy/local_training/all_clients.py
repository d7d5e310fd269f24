"""All teachers of round 1 without Flower: common initialisation, and one process per client where it pays."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cdfkd_strategy.child_process import end_with_parent
from cdfkd_strategy.data.client_share import ClientShare, client_share
from cdfkd_strategy.data.datasets import DataConfig
from cdfkd_strategy.data.image_data import ImageData
from cdfkd_strategy.errors import CDFKDError
from cdfkd_strategy.local_training.client_round import ClientsConfig, train_teacher
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.seeding import seeded_scope
from cdfkd_strategy.types import ImageSpec

DIED = (
    "a training process died before it gave its teacher. If the error above it speaks of a process that is still bootstrapping, the script that "
    'calls this has no guard and was run again by the process: put its calls below `if __name__ == "__main__":`, or use one worker. '
    "Otherwise memory may have run out: use fewer workers, or smaller images"
)


def initial_model(arch: str, image: ImageSpec, seed: int) -> nn.Module:
    """The common initialisation of all clients of one architecture in a run."""
    with seeded_scope("init", seed, arch):
        return build_classifier(arch, image)


class Trained(NamedTuple):
    """A teacher and what `train_teacher` said about its training."""

    model: nn.Module
    stats: dict[str, float]


class _Job(NamedTuple):
    """One client's training as plain values: what crosses the process border (NumPy, so that no shared memory is used)."""

    config: ClientsConfig
    image: ImageSpec
    seed: int
    partition_id: int
    share: tuple[NDArray[Any], ...]

    def initial_model(self) -> nn.Module:
        """The client's model before training: that of all clients of its architecture, or its own."""
        arch = self.config.architecture(self.partition_id)
        if self.config.init == "common":
            return initial_model(arch, self.image, self.seed)
        with seeded_scope("init", self.seed, arch, self.partition_id):
            return build_classifier(arch, self.image)


class _Outcome(NamedTuple):
    state: dict[str, NDArray[Any]]
    stats: dict[str, float]
    error: str | None = None


def train_all(
    config: ClientsConfig,
    data: ImageData,
    data_config: DataConfig,
    image: ImageSpec,
    seed: int,
    *,
    workers: int = 2,
    finished: Mapping[int, Trained] | None = None,
    on_done: Callable[[int, Trained], None] | None = None,
) -> list[Trained]:
    """Train the teachers of round 1, several at a time: bit-identical to `train_teacher` in this process.

    With more than one worker, fresh processes are started ("spawn"): a script that calls this needs the usual
    ``if __name__ == "__main__":`` guard.

    Args:
        config: the clients.
        data: the whole set.
        data_config: partition and local test part.
        image: what the teachers take.
        seed: of the run.
        workers: processes at most; 1 trains in this process, and so does every device but the CPU.
        finished: teachers of an earlier start, by partition id, which are not trained again.
        on_done: called with partition id and teacher as clients finish.

    Returns:
        One teacher per client, in the order of partition ids.

    Raises:
        CDFKDError: what `train_teacher` raises, a process died, or the device is not there.
    """
    if not Runtime(device=config.device).is_available:
        raise CDFKDError(f"clients.device is {config.device!r}, which torch does not see here; use cpu")

    def job(partition_id: int) -> _Job:
        share = client_share(data, data_config, config.count, partition_id, seed)
        return _Job(config, image, seed, partition_id, tuple(part.numpy() for part in share))

    trained = dict(finished or {})
    missing = [k for k in range(config.count) if k not in trained]
    for partition_id, outcome in _outcomes(job, missing, min(workers, len(missing)) if config.device == "cpu" else 1):
        if outcome.error is not None:
            raise CDFKDError(outcome.error)
        trained[partition_id] = _restore(config.architecture(partition_id), image, seed, outcome)
        if on_done is not None:
            on_done(partition_id, trained[partition_id])
    return [trained[k] for k in range(config.count)]


def _outcomes(job: Callable[[int], _Job], partition_ids: Sequence[int], workers: int) -> Iterator[tuple[int, _Outcome]]:
    if workers <= 1:
        yield from ((k, _train_job(job(k))) for k in partition_ids)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            waiting = {pool.submit(_train_job, job(k)): k for k in partition_ids}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BrokenProcessPool as error:
            raise CDFKDError(DIED) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _train_job(job: _Job) -> _Outcome:
    """Runs in the worker; an error crosses the border as its message."""
    try:
        model = job.initial_model().to(job.config.device)
        share = ClientShare(*(torch.from_numpy(np.array(part)) for part in job.share))
        stats = train_teacher(model, share, image=job.image, config=job.config, seed=job.seed, partition_id=job.partition_id, round=1)
    except CDFKDError as error:
        return _Outcome({}, {}, str(error))
    return _Outcome({name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}, stats)


def _restore(arch: str, image: ImageSpec, seed: int, outcome: _Outcome) -> Trained:
    model = initial_model(arch, image, seed)
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in outcome.state.items()})
    return Trained(model.eval(), outcome.stats)
