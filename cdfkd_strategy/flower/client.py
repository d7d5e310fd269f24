"""What a client of this project does with a message: say who it is, train its teacher, evaluate student and teacher."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor, nn

from cdfkd_strategy import seeding
from cdfkd_strategy.competence import LABEL_COUNTS
from cdfkd_strategy.data.datasets import DataConfig
from cdfkd_strategy.errors import ConfigError, UploadError
from cdfkd_strategy.flower import payload
from cdfkd_strategy.flower.arrays import from_record, to_record
from cdfkd_strategy.flower.payload import Broadcast, Identity
from cdfkd_strategy.flower.place import Place, place_of
from cdfkd_strategy.local_training import initial_model, train_teacher
from cdfkd_strategy.local_training.attention import fit_attention
from cdfkd_strategy.metrics.accuracy import accuracy, predict
from cdfkd_strategy.models.head_fusion import FusedStudent, class_weights, fuse, weighted
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.run_config import RunConfig

TEACHER_STATE = "teacher"
"""Where a client keeps its last teacher in the context of its node, to evaluate it beside the student."""

CONSENT = payload.LABEL_COUNTS
"""Key of a node's configuration: may this client's label counts leave it?"""


def hello(message: Message, context: Context, config: RunConfig | None, own: DataConfig | None = None) -> Message:
    """Answer who this client is, without reading an image; no label counts."""
    place = place_of(message, context, config, own)
    _consents(context, config)  # a node that does not say clearly what it wants is told so before it trains
    image = place.config.data.image
    return Message(payload.hello_reply(_teacher_record(place, None if image is None else image.num_classes)), reply_to=message)


def train(message: Message, context: Context, config: RunConfig | None, own: DataConfig | None = None) -> Message:
    """Train the teacher for one round, with the broadcast student if there is one, and reply with its weights."""
    place, consents = place_of(message, context, config, own), _consents(context, config)
    settings = payload.config_of(message.content)
    server_round, device = payload.server_round(settings), _device(context)
    model = initial_model(place.arch, place.data.image, place.config.seed)
    _fill(model, payload.arrays_of(message.content), f"architecture {place.arch!r} of client {place.partition_id}")
    share = place.share()
    stats = train_teacher(
        model.to(device),
        share,
        image=place.data.image,
        config=place.config.clients,
        seed=place.config.seed,
        partition_id=place.partition_id,
        round=server_round,
        student=_student_of(message.content, settings, device),
    )
    arrays = to_record(model.state_dict())
    context.state[TEACHER_STATE] = arrays
    metrics = {key: stats[name] for name, key in payload.TRAIN_METRICS.items() if name in stats}
    counts = None
    if place.config.server.weights == LABEL_COUNTS and consents:
        counts = torch.bincount(share.y_train, minlength=place.data.image.num_classes).tolist()
    teacher = _teacher_record(place, place.data.image.num_classes, counts)
    return Message(payload.train_reply(arrays, metrics, len(share.x_train), teacher), reply_to=message)


def evaluate(message: Message, context: Context, config: RunConfig | None, own: DataConfig | None = None) -> Message:
    """Evaluate student and own teacher on local test data, and fit attention over heads on a few training samples."""
    place = place_of(message, context, config, own)
    settings, device = payload.config_of(message.content), _device(context)
    broadcast = payload.read_broadcast(settings)
    if broadcast is None:
        raise ConfigError(f"the message to evaluate has no {payload.STUDENT_SPEC}; its sender must be a CDFKDStrategy of this package's version")
    student, weights = _build(broadcast, payload.arrays_of(message.content))
    student = student.to(device)
    share, image = place.share(), place.data.image
    with seeding.threads(1), torch.no_grad():
        metrics: dict[str, float] = {}
        if len(share.x_test):
            heads = predict(lambda images: student(images).logits, share.x_test, image, device=device)
            metrics[payload.STUDENT_ACCURACY] = accuracy(fuse(heads, weights), share.y_test)
            last = context.state.array_records.get(TEACHER_STATE)
            if last is not None:
                teacher = initial_model(place.arch, image, place.config.seed)
                _fill(teacher, last, "own last teacher")
                metrics[payload.TEACHER_ACCURACY] = accuracy(predict(teacher.to(device).eval(), share.x_test, image, device=device), share.y_test)
        attention = None
        if student.heads > 1:
            asked = {"samples": place.config.clients.attention_samples, "seed": place.config.seed, "partition_id": place.partition_id}
            attention = fit_attention(student, share, image=image, round=payload.server_round(settings), **asked)
    return Message(payload.evaluate_reply(metrics, len(share.x_test), attention), reply_to=message)


def _teacher_record(place: Place, num_classes: int | None, label_counts: list[int] | None = None) -> ConfigRecord:
    return payload.identity_record(Identity(place.arch, place.partition_id), num_classes, label_counts)


def _consents(context: Context, config: RunConfig | None) -> bool:
    """May this client's label counts leave it? Its node's configuration says so, or a configuration of its own; a server's alone is no consent."""
    said = context.node_config.get(CONSENT, config is not None)
    if not isinstance(said, bool):
        raise ConfigError(
            f"the node's configuration has {CONSENT}={said!r}; accepted: true or false; write --node-config '{CONSENT}=true', without quotes around it"
        )
    return said


def _device(context: Context) -> str:
    """Where this client computes: the CPU (bit-identical everywhere), unless its node's configuration says otherwise."""
    return str(context.node_config.get("device", "cpu"))


def _fill(model: nn.Module, arrays: ArrayRecord, what: str) -> None:
    try:
        model.load_state_dict(from_record(arrays, model.state_dict()))
    except UploadError as error:
        raise ConfigError(f"the weights that came do not fit the {what}: {error}") from error


def _build(broadcast: Broadcast, arrays: ArrayRecord) -> tuple[MultiHeaderStudent, Tensor]:
    """The student and its class weights, without the heads that have no weight for any class: their teachers are too old."""
    student = broadcast.spec.build()
    _fill(student, arrays, "student")
    given = None if broadcast.weights is None else torch.tensor(broadcast.weights)
    weights = class_weights(given, broadcast.spec.heads, broadcast.spec.image.num_classes)
    counted = weighted(weights)
    return student.only(counted).eval(), weights[counted]


def _student_of(content: RecordDict, settings: ConfigRecord, device: str) -> FusedStudent | None:
    """The broadcast student of a train message, fused; None in the first round."""
    broadcast = payload.read_broadcast(settings)
    if broadcast is None:
        return None
    return FusedStudent(*_build(broadcast, payload.arrays_of(content, payload.STUDENT))).to(device)
