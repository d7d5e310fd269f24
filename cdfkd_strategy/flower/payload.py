"""What is in a message: record keys, packing, unpacking, checking. No other file knows a key.

To a client (``train``, ``evaluate``): ``arrays`` (its own teacher's weights to train, the student's to evaluate),
``student`` (train messages from round 2 on), ``config`` (``server-round``; ``student-spec``, JSON, where a student is
sent; ``run-config``, JSON, where the app sends one; whatever the caller of ``start`` put there).

From a client: ``arrays``, ``metrics`` (``num-examples``) and, from clients that know this project, ``teacher``
(``arch``, ``partition-id``, ``num-classes``, ``label-counts`` only if opted in) and ``attention`` (after evaluation).
``query.hello`` asks for ``teacher`` alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from cdfkd_strategy.config import bind, to_dict
from cdfkd_strategy.errors import CDFKDError, ConfigError, UploadError
from cdfkd_strategy.flower.arrays import from_record
from cdfkd_strategy.local_training.attention import AttentionFit
from cdfkd_strategy.models.multi_header import StudentSpec

ARRAYS, STUDENT, CONFIG, METRICS, TEACHER, ATTENTION = "arrays", "student", "config", "metrics", "teacher", "attention"
ROUND, STUDENT_SPEC, RUN_CONFIG, NUM_EXAMPLES = "server-round", "student-spec", "run-config", "num-examples"
ARCH, PARTITION_ID, NUM_CLASSES, LABEL_COUNTS = "arch", "partition-id", "num-classes", "label-counts"
WEIGHT, BIAS = "weight", "bias"
STUDENT_ACCURACY, TEACHER_ACCURACY = "student-accuracy", "teacher-accuracy"
R = TypeVar("R")

TRAIN_METRICS = {"loss": "train-loss", "accuracy": "train-accuracy", "student_kl": "train-student_kl"}
"""What local training measures -> its metric in a train reply; the last from round 2 on."""

MAX_METRICS = 64
"""Metrics per reply, characters per name, and numbers per metric that are kept."""

HELLO_ACTION = "hello"
HELLO = f"query.{HELLO_ACTION}"

MAX_PARAMETER = 1e6
"""Largest absolute value of an attention parameter that is believed; fitted ones are below ten."""
MAX_EXAMPLES = 10**12
"""A client that claims more samples than this is not believed. Below, it is: the number is its weight in every average (README, Limits)."""


@dataclass(frozen=True)
class Keys:
    """The record keys that a strategy may rename, as Flower's own strategies allow."""

    arrays: str = ARRAYS
    config: str = CONFIG
    weight: str = NUM_EXAMPLES


@dataclass(frozen=True)
class Identity:
    """Who a client says it is; None where it says nothing."""

    arch: str | None = None
    partition_id: int | None = None


@dataclass(frozen=True)
class Broadcast:
    """How to rebuild the student of a message and fuse its headers; ``weights`` is ``[K][C]`` or None (equal)."""

    spec: StudentSpec
    weights: list[list[float]] | None


@dataclass(frozen=True)
class TeacherReply:
    """A train reply that passed every check; ``state`` is the teacher's state dict."""

    state: dict[str, Tensor]
    identity: Identity | None
    num_examples: int
    label_counts: tuple[int, ...] | None
    metrics: MetricRecord
    num_bytes: int


# -- at the server -----------------------------------------------------------------------------------------------------


def request(
    arrays: ArrayRecord | None,
    config: Mapping[str, object],
    server_round: int,
    *,
    student: ArrayRecord | None = None,
    broadcast: Broadcast | None = None,
    keys: Keys,
) -> RecordDict:
    """The content of a train, evaluate or hello message."""
    record = ConfigRecord({**config, ROUND: server_round})  # type: ignore[dict-item]
    if broadcast is not None:
        record[STUDENT_SPEC] = json.dumps({"spec": to_dict(broadcast.spec), "weights": broadcast.weights})
    content = RecordDict({keys.config: record})
    if arrays is not None:
        content[keys.arrays] = arrays
    if student is not None:
        content[STUDENT] = student
    return content


def read_identity(content: RecordDict, num_classes: int) -> Identity | None:
    """Who sent this reply, or None if its sender does not know this project.

    Raises:
        UploadError: the record is malformed, or the client classifies another number of classes.
    """
    record = content.config_records.get(TEACHER)
    if record is None:
        return None
    arch, partition_id, classes = record.get(ARCH), record.get(PARTITION_ID), record.get(NUM_CLASSES, num_classes)
    if classes != num_classes:
        raise UploadError(f"the client has {NUM_CLASSES}={classes!r:.60}; accepted: {num_classes}")
    if arch is not None and not isinstance(arch, str):
        raise UploadError(f"{ARCH} is {arch!r:.60}; accepted: the name of an architecture")
    if partition_id is not None and (not isinstance(partition_id, int) or isinstance(partition_id, bool) or partition_id < 0):
        raise UploadError(f"{PARTITION_ID} is {partition_id!r:.60}; accepted: an integer from 0")
    return Identity(arch, partition_id)


def read_train_reply(
    content: RecordDict,
    reference: Callable[[Identity | None], Mapping[str, Tensor]],
    *,
    num_classes: int,
    with_label_counts: bool,
    keys: Keys,
) -> TeacherReply:
    """Check a train reply, field by field.

    Args:
        content: of the reply.
        reference: from who the client says it is to the state dict that its arrays must fit; raises UploadError too.
        num_classes: C.
        with_label_counts: False leaves label counts unread, whatever the client sent.
        keys: names of the records.

    Raises:
        UploadError: whatever is wrong with it.
    """
    identity = read_identity(content, num_classes)
    record = _the_record(content.array_records, keys.arrays, "ArrayRecord")
    metrics = _the_record(content.metric_records, METRICS, "MetricRecord")
    num_examples = read_num_examples(metrics, keys.weight)
    counts = _label_counts(content, num_classes) if with_label_counts else None
    state = from_record(record, reference(identity))
    return TeacherReply(state, identity, num_examples, counts, metrics, record.count_bytes())


def _the_record(records: Mapping[str, R], key: str, kind: str) -> R:
    """The record under this key, or the only one there is."""
    if key in records:
        return records[key]
    if len(records) == 1:
        return next(iter(records.values()))
    raise UploadError(f"the reply has {len(records)} records of type {kind} and none under {key!r}; accepted: one")


def read_num_examples(metrics: Mapping[str, object], key: str = NUM_EXAMPLES) -> int:
    """The number of samples behind a reply.

    Raises:
        UploadError: it is missing, not a whole number, or absurd.
    """
    value = metrics.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value) or value != int(value) or not 1 <= value <= MAX_EXAMPLES:
        raise UploadError(f"the metric {key!r} is {value!r:.60}; accepted: a whole number from 1 to {MAX_EXAMPLES:.0e}")
    return int(value)


def _label_counts(content: RecordDict, num_classes: int) -> tuple[int, ...]:
    record = content.config_records.get(TEACHER)
    counts = None if record is None else record.get(LABEL_COUNTS)
    whole = [count for count in counts if type(count) is int and 0 <= count <= MAX_EXAMPLES] if isinstance(counts, list) else []
    if not isinstance(counts, list) or not len(whole) == len(counts) == num_classes or not any(whole):
        raise UploadError(f"{LABEL_COUNTS} are {counts!r:.80}; accepted, since the class weights come from them: {num_classes} integers from 0, not all 0")
    return tuple(whole)


def kept_metrics(metrics: MetricRecord, weight: str, num_examples: int) -> dict[str, Any]:
    """The metrics without those that are NaN, infinite or oversized: at most `MAX_METRICS` names, and numbers in each, and the client's weight."""
    found: dict[str, Any] = {weight: num_examples}
    for name, value in metrics.items():
        numbers = value if isinstance(value, list) else [value]
        if name != weight and len(found) <= MAX_METRICS and len(name) <= MAX_METRICS and len(numbers) <= MAX_METRICS and all(map(math.isfinite, numbers)):
            found[name] = value
    return found


def read_metrics(content: RecordDict, keys: Keys) -> RecordDict | None:
    """The metrics of an evaluate reply and nothing else, in the form that aggregation functions take.

    Returns:
        None from a client that has no samples to evaluate on.

    Raises:
        UploadError: there are none, or they do not say how many samples are behind them.
    """
    metrics = _the_record(content.metric_records, METRICS, "MetricRecord")
    if metrics.get(keys.weight) == 0:
        return None
    return RecordDict({METRICS: MetricRecord(kept_metrics(metrics, keys.weight, read_num_examples(metrics, keys.weight)))})


def read_attention(content: RecordDict, num_classes: int) -> AttentionFit | None:
    """The attention parameters in an evaluate reply, or None if the client fitted none.

    Raises:
        UploadError: they are malformed or not finite.
    """
    record = content.config_records.get(ATTENTION)
    if record is None:
        return None
    weight, bias = record.get(WEIGHT), record.get(BIAS)
    numbers = [*weight, bias] if isinstance(weight, list) else []
    if len(numbers) != num_classes + 1 or not all(isinstance(number, float) and abs(number) <= MAX_PARAMETER for number in numbers):
        raise UploadError(f"the attention parameters are {weight!r:.60} and {bias!r:.30}; accepted: {num_classes} floats and one, up to {MAX_PARAMETER:.0e}")
    return AttentionFit(tuple(weight), bias, read_num_examples(record))  # type: ignore[arg-type]


# -- at a client -------------------------------------------------------------------------------------------------------


def identity_record(identity: Identity, num_classes: int | None, label_counts: Sequence[int] | None = None) -> ConfigRecord:
    """The ``teacher`` record; ``num_classes`` is left out where the client has not looked at its images yet."""
    record = ConfigRecord({} if num_classes is None else {NUM_CLASSES: num_classes})
    if identity.arch is not None:
        record[ARCH] = identity.arch
    if identity.partition_id is not None:
        record[PARTITION_ID] = identity.partition_id
    if label_counts is not None:
        record[LABEL_COUNTS] = [int(count) for count in label_counts]
    return record


def train_reply(arrays: ArrayRecord, metrics: Mapping[str, float], num_examples: int, teacher: ConfigRecord) -> RecordDict:
    """The content of a train reply."""
    return RecordDict({ARRAYS: arrays, METRICS: MetricRecord({**metrics, NUM_EXAMPLES: num_examples}), TEACHER: teacher})


def hello_reply(teacher: ConfigRecord) -> RecordDict:
    """The content of a hello reply."""
    return RecordDict({TEACHER: teacher})


def evaluate_reply(metrics: Mapping[str, float], num_examples: int, attention: AttentionFit | None) -> RecordDict:
    """The content of an evaluate reply."""
    content = RecordDict({METRICS: MetricRecord({**metrics, NUM_EXAMPLES: num_examples})})
    if attention is not None:
        content[ATTENTION] = ConfigRecord({WEIGHT: list(attention.weight), BIAS: attention.bias, NUM_EXAMPLES: attention.num_examples})
    return content


def config_of(content: RecordDict) -> ConfigRecord:
    """The configuration in a request; empty if there is none."""
    return content.config_records.get(CONFIG, ConfigRecord())


def arrays_of(content: RecordDict, key: str = ARRAYS) -> ArrayRecord:
    """The weights in a request: ``arrays``, or the broadcast ``student``.

    Raises:
        ConfigError: there are none.
    """
    if key not in content.array_records:
        raise ConfigError(f"the message has no ArrayRecord under {key!r}, only {sorted(content)}; its sender must be a CDFKDStrategy with the default keys")
    return content.array_records[key]


def server_round(config: ConfigRecord) -> int:
    """The round of a request, from 1."""
    value = config.get(ROUND, 1)
    return value if isinstance(value, int) else 1


def run_config_json(config: ConfigRecord) -> str | None:
    """The run's resolved configuration as the server sent it, or None."""
    value = config.get(RUN_CONFIG)
    return value if isinstance(value, str) else None


def read_broadcast(config: ConfigRecord) -> Broadcast | None:
    """How to rebuild the student of a request, or None if it brings none.

    Raises:
        ConfigError: the description is malformed.
    """
    text = config.get(STUDENT_SPEC)
    if text is None:
        return None
    try:
        values = json.loads(str(text))
        return Broadcast(bind(StudentSpec, values["spec"], STUDENT_SPEC), values["weights"])
    except (ValueError, TypeError, KeyError, CDFKDError) as error:
        raise ConfigError(f"the message's {STUDENT_SPEC} is malformed ({error}); server and client must have the same version of this package") from error
