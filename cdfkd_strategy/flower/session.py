"""One run of the strategy: its stored uploads, and its way through the phases of every round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor

from cdfkd_strategy.errors import CheckpointError, TooFewTeachersError, UploadError
from cdfkd_strategy.flower import payload
from cdfkd_strategy.flower.architectures import Architectures
from cdfkd_strategy.flower.arrays import to_record
from cdfkd_strategy.flower.clients import Clients
from cdfkd_strategy.flower.distillation import Distilled, by_slot, distil_round, ensemble, may_go_on, read_back, restore, teacher_weights
from cdfkd_strategy.flower.exchange import message_to, wait_for_nodes
from cdfkd_strategy.flower.options import Options
from cdfkd_strategy.flower.roster import Client, sample
from cdfkd_strategy.flower.run_state import Phase, RunDirectory, RunState
from cdfkd_strategy.flower.slots import assign_slots, client_order, live_clients
from cdfkd_strategy.flower.uploads import Uploads
from cdfkd_strategy.local_training.attention import attention_from, attention_parameters, mean_attention
from cdfkd_strategy.models.head_fusion import HeadAttention
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash

logger = logging.getLogger("flwr")


class Session:
    """Everything that changes during a run; the strategy forwards to it.

    Args:
        options: the strategy's settings.

    Raises:
        CheckpointError: the run directory is not empty and is not to be resumed, or holds broken files.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.directory = RunDirectory(options.run_dir, options.resume)
        self.architectures = Architectures(options.architecture, options.architectures, options.image, options.seed)
        self.uploads = Uploads(None if options.run_dir is None else options.run_dir / "uploads")
        self.clients = Clients(options, self.architectures)
        self.distilled = Distilled()
        self.attention: HeadAttention | None = None
        self.run_config = options.run_config()  # behind the settings, as plain values, for the index of the uploads
        self.num_rounds = 1
        self.timeout: float | None = 3600.0
        self.runtime = Runtime()
        self._state: RunState | None = None
        self._nodes: list[int] = []
        self._clock = time.monotonic()

    # -- the run -------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        """Where the run stands."""
        if self._state is None:
            raise CheckpointError("the run has not begun; call start()")
        return self._state

    def open(self, initial: ArrayRecord, config: ConfigRecord) -> None:
        """Begin the run, or find the place where it was interrupted; only the first call does anything."""
        if self._state is not None:
            return
        common = None
        if len(initial):
            self.architectures.start_from(initial)
            common = state_hash(self.architectures.initial(None))
        sent = {key: value for key, value in config.items() if not isinstance(value, bytes)}
        settings = {**self.options.settings(), "initial_arrays": common, "train_config": sent}
        self._state = state = self.directory.open(settings, self.options.engine.runtime)
        self.runtime = state.runtime = self.options.engine.continued(state.runtime)
        if not state.rounds:
            self.directory.save(state)  # the directory's first file: whatever comes next, a start finds a run to continue
            return
        if may_go_on(self.options, state):
            logger.info("engine.max_seconds stopped the distillation of round %d, and allows more by now: going on with it", state.round)
            self._advance("distilling")
        logger.info("continuing in round %d, phase %r, with %d stored uploads", state.round, state.phase, len(self.uploads.trained_in))
        if state.attention is not None:
            self.attention = attention_from(state.attention)
        if state.phase != "uploads":
            self.uploads.drop_strays(state.slots)  # it died before it could
        if state.phase in ("distilled", "evaluated"):
            self.distilled = restore(self.options, self._teachers(), state.round, self.uploads, self.runtime)
        elif self.options.run_dir is not None and state.round > 1:
            self.distilled = read_back(self.options)

    def rounds_to_run(self) -> Iterator[int]:
        """The rounds that are not over, from the one in progress."""
        yield from range(self.state.round + (self.state.phase == "evaluated"), self.num_rounds + 1)

    def result(self) -> Result:
        """Flower's Result, of all rounds, those before a restart included."""
        result = Result()
        if self.distilled.student is not None:
            result.arrays = to_record(self.distilled.student.state_dict())
        for record in self.state.rounds:
            for metrics, kept in (
                (record.train, result.train_metrics_clientapp),
                (record.evaluate_clients, result.evaluate_metrics_clientapp),
                (record.evaluate_server, result.evaluate_metrics_serverapp),
            ):
                if metrics is not None:
                    kept[record.round] = MetricRecord(metrics)
        return result

    def _enter_round(self, server_round: int) -> None:
        """A round that is not in progress yet begins with its uploads."""
        if server_round != self.state.round or not self.state.rounds:
            self.state.round = server_round
            self._advance("uploads")
        self._clock = time.monotonic()

    def _advance(self, phase: Phase) -> None:
        self.state.phase = phase
        self.directory.save(self.state)

    def _spent(self, on: str) -> None:
        now = time.monotonic()
        self.state.record.seconds[on] += now - self._clock
        self._clock = now

    # -- training ------------------------------------------------------------------------------------------------------

    def train_messages(self, server_round: int, config: ConfigRecord, grid: Grid) -> list[Message]:
        """One message per sampled client whose upload of this round is not stored yet."""
        self._enter_round(server_round)
        if self.state.phase != "uploads":
            return []
        self.clients.roster.pardon()
        options = self.options
        live = self._live()
        nodes = self._nodes = self.clients.wait(grid, len(live), sum(self.uploads.trained_in[key] == server_round for key in live))
        clients = self.clients.connected(grid, nodes, config, server_round, self.num_rounds, self.timeout)
        self.state.record.quarantined.update(self.clients.roster.refused(nodes))
        chosen = sample(clients, options.fraction_train, options.min_train_nodes, "train", options.seed, server_round)
        asked = [client for client in chosen if self.uploads.trained_in.get(client.key) != server_round]
        logger.info("round %d: %d of %d nodes train; %d uploads are stored already", server_round, len(asked), len(nodes), len(chosen) - len(asked))
        student, broadcast = self._broadcast() if server_round > 1 else (None, None)
        contents = []
        for client in asked:
            try:
                arrays = to_record(self._start_of(client))
            except UploadError as error:
                self._quarantine(client.key, str(error))
                continue
            brings = (student, broadcast) if self._speaks(client) else (None, None)
            contents.append((client, payload.request(arrays, config, server_round, student=brings[0], broadcast=brings[1], keys=options.keys)))
        self.clients.check_enough({*self._live(), *(client.key for client, _ in contents)}, nodes, self.state.record)
        messages = [self._message(client, content, MessageType.TRAIN) for client, content in contents]
        self.state.remember({client.key: client.node for client, _ in contents}, self.uploads)
        self.directory.save(self.state)
        return messages

    def _live(self) -> list[str]:
        """The clients whose stored teacher this round may use."""
        return live_clients(self.uploads.trained_in, self.state.round, self.options.max_teacher_age)

    def _start_of(self, client: Client) -> dict[str, Tensor]:
        """The weights that a client starts from: its own last teacher, or the common initialisation of its architecture."""
        if client.key in self.uploads and client.arch in (None, self.uploads[client.key].arch) and self.state.may_have(client.key, client.node):
            return self.uploads.load(client.key)
        return self.architectures.initial(client.arch)

    def _speaks(self, client: Client) -> bool:
        """Can this client rebuild a student?"""
        return client.speaks or (client.key in self.uploads and self.uploads[client.key].speaks)

    def _broadcast(self) -> tuple[ArrayRecord, payload.Broadcast]:
        """What clients get of the student, and how to rebuild it."""
        student = self.distilled.single or self.distilled.student
        assert student is not None
        weights = None if self.distilled.single is not None else self.state.weights
        return to_record(student.state_dict()), payload.Broadcast(student.spec, weights)

    def _message(self, client: Client, content: RecordDict, message_type: str) -> Message:
        self.state.record.bytes["down"] += sum(record.count_bytes() for record in content.array_records.values())
        return message_to(client.node, content, message_type, self.state.round, self.timeout)

    def collect(self, server_round: int, replies: Iterable[Message]) -> None:
        """Store the uploads one by one as they arrive, then fix slots, teachers and class weights of the round.

        Raises:
            TooFewTeachersError: fewer than ``min_teachers`` are usable.
        """
        if server_round != self.state.round or not self.state.rounds:
            self._enter_round(server_round)
        if self.state.phase != "uploads":
            return
        for reply in replies:
            self._receive(reply)
        self.state.record.silent = self.clients.silent(self._nodes)
        self._spent("clients")
        self._close_uploads()

    def _receive(self, reply: Message) -> None:
        server_round = self.state.round
        try:
            upload, weights = self.clients.read_upload(reply, server_round)
            if self.uploads.trained_in.get(upload.key) == server_round:
                raise UploadError("it has uploaded a teacher in this round already")
        except UploadError as error:
            self._quarantine(self.clients.behind(reply)[2], str(error))
            return
        self.uploads.put(upload, weights)
        self.state.record.quarantined.pop(upload.key, None)
        logger.info("round %d: client %s uploaded a %s trained on %d samples", server_round, upload.key, upload.arch, upload.num_examples)

    def _quarantine(self, key: str, reason: str) -> None:
        logger.warning("round %d: client %s gives no teacher: %s", self.state.round, key, reason)
        self.state.record.quarantined[key] = reason

    def _close_uploads(self) -> None:
        """From stored uploads to the round's teachers; after this the round asks for no more."""
        options, state = self.options, self.state
        live = self._live()
        if len(live) < options.min_teachers:
            self.directory.save(state)
            raise TooFewTeachersError(
                f"round {state.round} has {len(live)} usable teachers; accepted: at least min_teachers={options.min_teachers}. "
                f"{state.record.missing or 'No client was asked'}"
            )
        state.slots = assign_slots(state.slots, live)
        keys = by_slot(state.slots)
        uploads = [self.uploads[key] for key in keys]
        self.distilled.teachers = teachers = ensemble(self.options, self.uploads, keys, self.architectures)
        with self.runtime.scope():
            teachers.weights.copy_(teacher_weights(teachers, uploads, [key in live for key in keys], options.weights, options.seed))
        state.teachers = [{"key": upload.key, "sha256": upload.sha256} for upload in uploads]
        state.weights = teachers.weights.double().tolist()
        self.uploads.write_index([key for key in keys if key in live], options.image, options.seed, self.run_config)
        fresh = sorted((upload for upload in uploads if upload.round == state.round), key=lambda upload: client_order(upload.key))
        state.record.bytes["up"] = sum(upload.num_bytes for upload in fresh)
        state.record.train = dict(options.train_metrics([upload.content() for upload in fresh], options.keys.weight)) if fresh else None
        self.directory.clear_distillation(state.round)
        self._advance("distilling")
        self.uploads.drop_strays(state.slots)

    # -- distillation --------------------------------------------------------------------------------------------------

    def _teachers(self) -> TeacherEnsemble:
        """The ensemble of the round's distillation, as `_close_uploads` fixed it."""
        if self.distilled.teachers is not None:
            return self.distilled.teachers
        for teacher in self.state.teachers:
            if teacher["key"] not in self.uploads or self.uploads[teacher["key"]].sha256 != teacher["sha256"]:
                raise CheckpointError(
                    f"the upload of client {teacher['key']} is not the one this round began with; restore uploads/, or start a new run directory"
                )
        teachers = ensemble(self.options, self.uploads, [teacher["key"] for teacher in self.state.teachers], self.architectures)
        teachers.weights.copy_(teachers.weights.new_tensor(self.state.weights))
        return teachers

    def distil(self) -> MultiHeaderStudent:
        """Distil, unless that is done, and return the student."""
        if self.state.phase == "distilling":
            self._clock = time.monotonic()
            self.distilled = distil_round(self.options, self._teachers(), self.distilled, self.state.round, self.uploads, self.runtime)
            self._spent("distill")
            spent = self.state.record.seconds
            spent["distill"] = max(spent["distill"], sum(row["seconds"] for row in self.distilled.history))  # epochs before a restart included
            self.state.record.stopped_by = self.distilled.stopped_by
            self._advance("distilled")
        assert self.distilled.student is not None
        return self.distilled.student

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate_messages(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """One message per sampled client that can rebuild the student."""
        options = self.options
        self._clock = time.monotonic()
        if options.fraction_evaluate == 0:
            return []
        wanted = max(options.min_evaluate_nodes, 0 if self._nodes else options.expected_nodes or 0)  # after a restart they come back one by one
        try:
            nodes = wait_for_nodes(grid, wanted, options.node_wait, options.min_evaluate_nodes)
        except TooFewTeachersError as error:  # the student is there: what is missing is its evaluation, not the run
            logger.warning("evaluating with fewer nodes: %s", error)
            nodes = sorted(grid.get_node_ids())
        clients = self.clients.connected(grid, nodes, config, server_round, self.num_rounds, self.timeout)
        there = [client for client in clients if client.key not in self.state.record.silent]  # the others may still be training
        able = [client for client in there if self._speaks(client)]
        if len(able) < len(there):
            unable = len(there) - len(able)
            logger.info("%d clients do not evaluate: they did not say who they are (a ConfigRecord 'teacher'), so they cannot know the student", unable)
        student, broadcast = self._broadcast()
        content = payload.request(student if self.distilled.single is not None else arrays, config, server_round, broadcast=broadcast, keys=options.keys)
        chosen = sample(able, options.fraction_evaluate, options.min_evaluate_nodes, "evaluate", options.seed, server_round)
        return [self._message(client, content, MessageType.EVALUATE) for client in chosen]

    def evaluations(self, replies: Iterable[Message]) -> MetricRecord | None:
        """Average what the clients measured, and the attention over heads that they fitted."""
        state = self.state
        contents, fits, state.record.unevaluated = self.clients.read_evaluations(replies, state.round)
        self.attention = mean_attention(fits, self.options.image.num_classes)
        state.attention = None if self.attention is None else attention_parameters(self.attention)
        metrics = self.options.evaluate_metrics(contents, self.options.keys.weight) if contents else None
        state.record.evaluate_clients = None if metrics is None else dict(metrics)
        self._spent("evaluate")
        return metrics

    def finish_round(self, evaluate: Callable[[], MetricRecord | None] | None) -> None:
        """Evaluate at the server, and close the round."""
        self._clock = time.monotonic()
        metrics: Any = None if evaluate is None else evaluate()
        self.state.record.evaluate_server = None if metrics is None else dict(metrics)
        self._spent("evaluate")
        self._advance("evaluated")
