"""The same job without Flower: train the teachers into a directory, and distil a directory of teachers."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdfkd_strategy import parallel, seeding
from cdfkd_strategy.competence import COMPETENCE, LABEL_COUNTS, estimate, weights_of
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.data.client_share import all_training_rows, client_share, train_label_counts
from cdfkd_strategy.data.datasets import ImageData, load_data
from cdfkd_strategy.data.partition import OWN
from cdfkd_strategy.data.transfer_set import load_transfer_set
from cdfkd_strategy.engine import DistillResult, distill, saved_runtime
from cdfkd_strategy.errors import CDFKDError, CheckpointError, ConfigError
from cdfkd_strategy.harness import Examination, Harness
from cdfkd_strategy.local_training import Trained, train_all
from cdfkd_strategy.local_training.attention import fit_attention, mean_attention
from cdfkd_strategy.methods import METHODS, get_method
from cdfkd_strategy.models.head_fusion import HeadAttention, header_weights
from cdfkd_strategy.models.plain_student import Student
from cdfkd_strategy.provenance import peak_memory_mb, usable_cores
from cdfkd_strategy.run_config import WHERE, RunConfig, from_values
from cdfkd_strategy.student_io import save_student
from cdfkd_strategy.summary import SummaryWriter
from cdfkd_strategy.teacher_directory import TeacherSet, about_kept_teacher, keep_teacher, kept_teacher, load_teachers, teacher_file, write_index
from cdfkd_strategy.teachers import TeacherEnsemble, TeacherSpec, state_hash
from cdfkd_strategy.types import Extras, ImageSpec
from cdfkd_strategy.warm_start import chosen_student

logger = logging.getLogger(__name__)

FIXED = ("data", "clients")
"""Parts of a configuration that the teachers in a directory were made with; only ``data.path`` may change afterwards."""

DISTILLED_WITH = ("server.weights", "server.transfer_set")
"""Settings of the server that a distillation without Flower looks at."""

PROXY_IMAGES = 50_000
"""Images at most that a method which declares real ones is given; as float32, 50,000 of 32 x 32 pixels in colour take 600 MB."""

DISCLOSED = f"disclosed by every client: its label counts per class (server.weights={LABEL_COUNTS})"


class Plan(NamedTuple):
    """A distillation to do: its configuration, the teachers, the data set to evaluate on (None if it is not at hand), and what else the method may have."""

    config: RunConfig
    teachers: TeacherSet
    data: ImageData | None
    extras: Extras


def plan(directory: Path, overrides: Iterable[str]) -> Plan:
    """Read a teacher directory and resolve what to do with it.

    Args:
        directory: what `write_teachers` wrote, or the ``uploads`` of a run.
        overrides: ``key=value`` on the directory's configuration.

    Raises:
        ConfigError: an override changes what the teachers were made with, or is about a federation; it asks for label counts that nobody disclosed; or
            there are several processes, and the method needs one.
        NeedsError: the method needs something that there is not.
    """
    overrides = list(overrides)
    made_with = [item for item in overrides if item.partition(".")[0] in FIXED and not item.startswith("data.path=")]
    if made_with:
        raise ConfigError(f"{', '.join(made_with)}: the teachers in {directory} were made with another value; train others with `cdfkd teachers`")
    federated = [item for item in overrides if item.startswith("server.") and item.partition("=")[0] not in DISTILLED_WITH]
    if federated:
        raise ConfigError(f"{', '.join(federated)}: there are no rounds and no clients without Flower; accepted: {', '.join(DISTILLED_WITH)} (or `cdfkd run`)")
    teachers = load_teachers(directory)
    config = from_values(teachers.config, overrides)
    if config.engine.resident_teachers or (config.engine.shard_teachers and parallel.size() > 1):
        teachers = load_teachers(directory, mapped=True)
    return plan_for(config, teachers)


def plan_for(config: RunConfig, teachers: TeacherSet) -> Plan:
    """What to do with teachers under a configuration that is resolved already; see `plan`."""
    config = of_the_teachers_data(config, teachers)
    check_disclosed(config, teachers)
    data = _test_data(config, teachers) if teachers.config else None
    method = get_method(config.method_config()[0])
    extras = extras_of(teachers, config, data)
    method.check_extras(extras)
    method.check_processes()
    return Plan(config, teachers, data, extras)


def of_the_teachers_data(config: RunConfig, teachers: TeacherSet) -> RunConfig:
    """The configuration with the seed of the teachers' data fixed, whatever seed the distillation has."""
    if config.seed == teachers.seed or config.data.seed is not None:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seed=teachers.seed))


def check_disclosed(config: RunConfig, teachers: TeacherSet) -> None:
    """Class weights from label counts need clients that disclosed them; the oracle's counts are for measuring alone.

    Raises:
        ConfigError: they did not.
    """
    if config.server.weights == LABEL_COUNTS and teachers.label_counts is None:
        raise ConfigError(
            f"server.weights is {LABEL_COUNTS!r}, but the clients of these teachers did not disclose their label counts; accepted: {', '.join(COMPETENCE)}; "
            f"or train teachers whose clients opt in: `cdfkd teachers CONFIG server.weights={LABEL_COUNTS}`"
        )


def extras_of(teachers: TeacherSet, config: RunConfig | None = None, data: ImageData | None = None) -> Extras:
    """What there is besides the teachers: disclosed label counts, and images for a method that declares them (`proxy_images`)."""
    counts = None if teachers.label_counts is None else torch.tensor(teachers.label_counts)
    return Extras(label_counts=counts, proxy_data=None if config is None else proxy_images(config, teachers.image, data))


def proxy_images(config: RunConfig, image: ImageSpec, data: ImageData | None) -> Tensor | None:
    """Images for a method that declares real ones, and None for every other: ``server.transfer_set``, or else the training images of all clients.

    The latter no server of a federation has: they make the upper bound of a benchmark. At most `PROXY_IMAGES`, a seeded choice of more.

    Raises:
        ConfigError: a transfer set for a method that takes no images.
        DataError: the transfer set cannot be used.
    """
    name = config.method_config()[0]
    if not get_method(name).needs.proxy_data:
        if config.server.transfer_set is not None:
            takers = ", ".join(sorted(other for other in METHODS if METHODS[other].needs.proxy_data))
            raise ConfigError(f"server.transfer_set is {config.server.transfer_set!r}, but method {name!r} takes no images; accepted with it: {takers}")
        return None
    if config.server.transfer_set is not None:
        pixels = load_transfer_set(Path(config.server.transfer_set), image).pixels
        rows = torch.arange(len(pixels))
    elif data is None or config.data.partition.name == OWN:
        return None
    else:
        pixels, rows = data.x_train, all_training_rows(data, config.data, config.clients.count, config.seed)
    if len(rows) > PROXY_IMAGES:
        chosen = torch.randperm(len(rows), generator=seeding.generator("proxy images", config.seed))[:PROXY_IMAGES]
        rows = rows[chosen.sort().values]
    return image.normalise(pixels[rows].float() / 255)


def _test_data(config: RunConfig, teachers: TeacherSet) -> ImageData | None:
    try:
        data = load_data(config.data, config.seed)
    except CDFKDError as error:
        logger.warning("no accuracies: %s", error)
        return None
    if data.image != teachers.image:
        logger.warning("no accuracies: the data set gives %s, but the teachers take %s", data.image, teachers.image)
        return None
    return data


def check_made_with(made: Mapping[str, Any], config: RunConfig, where: Path) -> None:
    """Teachers that are there must be those that a configuration would train.

    Args:
        made: the configuration that they were trained with, as plain values.
        config: the one of now.
        where: their directory.

    Raises:
        CheckpointError: they were made with other data, clients, or seed.
    """
    mine, theirs = to_dict(config), to_dict(from_values(dict(made)))
    different = [(f"{part}.{key}", theirs[part][key], value) for part in FIXED for key, value in mine[part].items() if theirs[part][key] != value]
    different += [("seed", theirs["seed"], config.seed)] if theirs["seed"] != config.seed else []
    for key, there, here in different:
        if key not in WHERE:
            raise CheckpointError(f"the teachers in {where} were made with {key}={there!r}, not {here!r}; name another directory for teachers")


def write_teachers(config: RunConfig, out: Path) -> ImageData:
    """Train the teachers of round 1 as the Flower clients do, bit for bit, and write them to a directory.

    Each is kept when it is done: a start in the directory of one that was interrupted trains those that are missing.

    Returns:
        The data set that they were trained on.

    Raises:
        CheckpointError: an earlier start in this directory was with other data, clients, or seed.
    """
    data = load_data(config.data, config.seed)
    clients = config.clients
    finished: dict[int, Trained] = {}
    for k in range(clients.count):
        if (about := about_kept_teacher(out, k)) is not None:
            made_with, stats = about
            check_made_with(made_with, config, out)
            finished[k] = Trained(kept_teacher(out, k, clients.architecture(k), data.image), stats)
    if finished:
        logger.info("%d of %d teachers are in %s already", len(finished), clients.count, out)

    def keep(k: int, teacher: Trained) -> None:
        stats = teacher.stats
        logger.info("client %d: %s trained on %d images, loss %.3f", k, clients.architecture(k), stats["num_examples"], stats["loss"])
        keep_teacher(out, k, teacher.model, config=to_dict(config), stats=stats)

    out.mkdir(parents=True, exist_ok=True)
    trained = train_all(clients, data, config.data, data.image, config.seed, workers=usable_cores(), finished=finished, on_done=keep)
    specs = tuple(
        TeacherSpec(str(k), clients.architecture(k), int(teacher.stats["num_examples"]), state_hash(teacher.model.state_dict()))
        for k, teacher in enumerate(trained)
    )
    counts = train_label_counts(data, config.data, clients.count, config.seed).tolist()
    disclosed = counts if config.server.weights == LABEL_COUNTS else None
    if disclosed is not None:
        logger.info(DISCLOSED)
    write_index(out, TeacherSet(specs, [], data.image, config.seed, to_dict(config), counts, disclosed), [teacher_file(k) for k in range(clients.count)])
    return data


class Distilled(NamedTuple):
    """What a finished distillation leaves in memory: the engine's result, the ensemble with its class weights, and the measurements."""

    result: DistillResult
    teachers: TeacherEnsemble
    examination: Examination


def distill_directory(work: Plan, out: Path, *, resume: bool = False) -> Distilled | None:
    """Distil the teachers of a plan, evaluate, and write a run directory: summary, losses, student, generator, checkpoint.

    Of several processes (`parallel`) all compute, and the first one evaluates and writes.

    Class weights and the first student are computed with the runtime of the distillation, so that a run that is continued
    comes to the same ones.

    Raises:
        CDFKDError: whatever keeps the run from going on; the message says what to do.
    """
    config, teachers = work.config, work.teachers
    name, method_config = config.method_config()
    if config.server.weights == LABEL_COUNTS:
        logger.info(DISCLOSED)
    began = saved_runtime(out) if resume else None
    runtime = config.engine.runtime() if began is None else config.engine.continued(began)
    parallel.wait_for_all()  # nobody looks into the directory any more when the first one begins to write
    summary = SummaryWriter(out, config, resume=resume) if parallel.is_first() else None
    harness = Harness(config, work.data)
    ensemble = TeacherEnsemble(teachers.models, image=teachers.image, specs=teachers.specs)
    settings = config.student
    with runtime.scope():
        ensemble.weights.copy_(teacher_weights(config, teachers, ensemble))  # as they are: normalising twice would move the last bit
        student = chosen_student(
            settings.heads, settings.backbone, ensemble, max_width=settings.max_width, init=settings.init, stages=settings.stages, seed=config.seed
        )
    weights = header_weights(ensemble.weights, student.heads)
    started = time.perf_counter()
    result = distill(
        ensemble,
        student,
        name,
        config=method_config,
        image=teachers.image,
        seed=config.seed,
        out=out,
        evaluate=None if work.data is None else harness.watch(weights),
        engine=config.engine,
        resume=resume,
        runtime=runtime,
        extras=work.extras,
    )
    if summary is None:
        return None
    distilled = time.perf_counter()
    save_student(out, student, weights)
    examination = harness.examine(ensemble, student, weights=weights, attention=head_attention(work, student))
    before = sum(row["seconds"] for row in result.history)  # epochs before a restart included
    seconds = {"distill": max(distilled - started, before), "evaluate": time.perf_counter() - distilled}
    summary.round(1, examination.accuracy, seconds=seconds, peak_memory_mb=peak_memory_mb(result.runtime.device), runtime=result.runtime.to_dict())
    summary.finish(result.stopped_by)
    return Distilled(result, ensemble, examination)


def head_attention(work: Plan, student: Student) -> HeadAttention | None:
    """Attention over the headers, as the clients of a federation fit it after the round; None for one header, or without the clients' images."""
    config = work.config
    if work.data is None or student.heads == 1 or config.data.partition.name == OWN:
        return None
    fits = []
    for k in range(config.clients.count):
        share = client_share(work.data, config.data, config.clients.count, k, config.seed)
        asked = {"samples": config.clients.attention_samples, "seed": config.seed, "partition_id": k}
        fits.append(fit_attention(student, share, image=work.data.image, round=1, **asked))
    return mean_attention([fit for fit in fits if fit is not None], work.data.image.num_classes)


def teacher_weights(config: RunConfig, teachers: TeacherSet, ensemble: TeacherEnsemble) -> torch.Tensor:
    """Class weights ``[K, C]`` of the teachers: estimated from their weights, or from the label counts that clients disclosed."""
    if config.server.weights == LABEL_COUNTS:
        check_disclosed(config, teachers)
        return weights_of(torch.tensor(teachers.label_counts))
    return estimate(ensemble, teachers.image, seeding.generator("competence", config.seed), config.server.weights)
