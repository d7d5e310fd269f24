"""`CDFKDStrategy`: a Flower strategy that distils the clients' models, without data, into one multi-header student."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from cdfkd_strategy.distiller import Distiller
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.flower.arrays import to_record
from cdfkd_strategy.flower.averages import mean_metrics
from cdfkd_strategy.flower.options import MetricsAggregation, Options
from cdfkd_strategy.flower.payload import Keys
from cdfkd_strategy.flower.run_state import RoundRecord
from cdfkd_strategy.flower.session import Session
from cdfkd_strategy.models.head_fusion import HeadAttention
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.models.stages import MAX_STAGES
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec
from cdfkd_strategy.warm_start import Init

logger = logging.getLogger("flwr")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class CDFKDStrategy(Strategy):
    """Data-free distillation of client teachers into one multi-header student (CDFKD-MFS, https://arxiv.org/abs/2205.11845).

    Each round every client trains a teacher on its own data and uploads weights; the server distils all teachers into
    the student, which starts the next round at the clients. Clients may have different architectures, and those that
    know nothing of this project (any ClientApp that answers ``arrays`` and ``metrics``) take part in one-shot runs.

    Args:
        image: what teachers and student take, and the number of classes.
        architecture: of clients that do not name theirs: a registered name, or a function (or class) that gives the network.
        architectures: registered names that clients may train; None is ``architecture`` alone. With several, clients are asked.
        student: backbone of the student, a registered architecture.
        student_max_width: channels to which wide stages are narrowed; None never; "auto" not in the paper's layouts.
        student_init: of the first student's trunk: the "average" of the teachers of its own architecture, or "random" as in the paper.
        student_stages: how many of the deepest stages the headers see, at most; 1 is no multi-level sharing, and fewer computations.
        method: a distillation method by name, or a `Distiller` class.
        method_config: its ``Config``, or a mapping of its keys; None is its defaults.
        weights: how much each teacher counts per class: a competence estimate ("auto", "uniform", ...) from the uploaded
            weights, or "label_counts", which clients must disclose.
        engine: how the distillation is run.
        seed: of everything random at the server, and of the common initialisation.
        watch: from the class weights ``[K, C]`` to what the engine calls with the student while it is distilled.
        run_dir: where uploads, checkpoints and student are kept; None keeps the run in memory. Without ``resume`` it must be empty.
        resume: continue the run in ``run_dir`` where it was interrupted.
        min_teachers: fewer usable teachers than this end the run with an error.
        max_teacher_age: rounds for which the last teacher of a client that did not report is used again. An older one does not count any
            more: it has no weight and no part in the distillation, and its header rests until the client reports again, unless a new
            client takes its slot. Every client with a partition id goes on from its own last teacher, however old.
        broadcast: what clients get of the student: all "heads" and their class weights, or one "single" header distilled from them.
        single_steps: optimiser steps for that single header.
        keep_generator: a round's generator starts from that of the round before, in place of random weights; for methods whose generator lasts.
        identify: ask every node who it is before it trains; None asks where it matters: several architectures, a run
            directory, or more than one round. Nodes that do not know the question take the default architecture, with their node
            id as key; those that fail to answer it are misconfigured and take no part.
        node_wait: seconds to wait for nodes to connect; also, after the first node said who it is, for the next one to do so.
        fraction_train: of the connected nodes, to train in a round.
        fraction_evaluate: of the connected nodes, to evaluate the student; 0 skips evaluation and head attention.
        min_train_nodes: train at least so many.
        min_evaluate_nodes: evaluate on at least so many, if that many are connected.
        min_available_nodes: do not begin a round with fewer nodes; None needs as many as ``min_teachers`` does, besides the
            teachers that may be used again.
        expected_nodes: wait for so many nodes until ``node_wait`` is over, then go on with those that are there; None is
            ``min_available_nodes``.
        weighted_by_key: the metric that counts a client's samples.
        arrayrecord_key: of the weights in messages.
        configrecord_key: of the configuration in messages.
        train_metrics_aggr_fn: from replies (metrics only) and ``weighted_by_key`` to one MetricRecord; None is the weighted mean.
        evaluate_metrics_aggr_fn: the same for evaluation.

    Attributes:
        student: the student of the last round; None before the first.
        single: the single-header student (``broadcast="single"``), else None.
        teachers: the last round's ensemble, with the class weights used.
        attention: attention over heads, averaged over the clients' fits, or None.
        generator: the method's generator after the last round, or None.

    Raises:
        ConfigError: a setting is not accepted.
        CheckpointError: ``run_dir`` is not empty and ``resume`` is False.
    """

    def __init__(
        self,
        image: ImageSpec,
        *,
        architecture: str | Callable[[], nn.Module] = "small_cnn",
        architectures: Iterable[str] | None = None,
        student: str = "small_cnn",
        student_max_width: int | Literal["auto"] | None = "auto",
        student_init: Init = "average",
        student_stages: int = MAX_STAGES,
        method: str | type[Distiller] = "cdfkd_mfs",
        method_config: Mapping[str, Any] | object | None = None,
        weights: str = "auto",
        engine: EngineConfig | None = None,
        seed: int = 0,
        watch: Callable[[Tensor], Callable[[nn.Module], Mapping[str, float]]] | None = None,
        run_dir: Path | str | None = None,
        resume: bool = False,
        min_teachers: int = 1,
        max_teacher_age: int = 1,
        broadcast: Literal["heads", "single"] = "heads",
        single_steps: int = 300,
        keep_generator: bool = False,
        identify: bool | None = None,
        node_wait: float = 120.0,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int | None = 2,
        expected_nodes: int | None = None,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsAggregation | None = None,
        evaluate_metrics_aggr_fn: MetricsAggregation | None = None,
    ) -> None:
        self.options = Options(
            image=image,
            architecture=architecture,
            architectures=None if architectures is None else tuple(architectures),
            student=student,
            student_max_width=student_max_width,
            student_init=student_init,
            student_stages=student_stages,
            method=method,
            method_config=method_config,
            weights=weights,
            engine=engine or EngineConfig(),
            seed=seed,
            watch=watch,
            run_dir=None if run_dir is None else Path(run_dir),
            resume=resume,
            min_teachers=min_teachers,
            max_teacher_age=max_teacher_age,
            broadcast=broadcast,
            single_steps=single_steps,
            keep_generator=keep_generator,
            identify=identify,
            node_wait=node_wait,
            fraction_train=fraction_train,
            fraction_evaluate=fraction_evaluate,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=min_evaluate_nodes,
            min_available_nodes=min_available_nodes,
            expected_nodes=expected_nodes,
            keys=Keys(arrayrecord_key, configrecord_key, weighted_by_key),
            train_metrics=train_metrics_aggr_fn or mean_metrics,
            evaluate_metrics=evaluate_metrics_aggr_fn or mean_metrics,
        )
        self.session = Session(self.options)

    @property
    def student(self) -> MultiHeaderStudent | None:
        """The student of the last round."""
        return self.session.distilled.student

    @property
    def single(self) -> MultiHeaderStudent | None:
        """The student with one header on the same trunk, if that is what clients get."""
        return self.session.distilled.single

    @property
    def teachers(self) -> TeacherEnsemble | None:
        """The ensemble of the last distillation; its ``weights`` are those that were used."""
        return self.session.distilled.teachers

    @property
    def generator(self) -> nn.Module | None:
        """The method's generator after the last distillation."""
        return self.session.distilled.generator

    @property
    def attention(self) -> HeadAttention | None:
        """Attention over heads, averaged over the clients' fits."""
        return self.session.attention

    @property
    def rounds(self) -> list[RoundRecord]:
        """Seconds, bytes, quarantined uploads and metrics of every round."""
        return self.session.state.rounds

    @property
    def disclosures(self) -> list[str]:
        """What the clients disclose under these settings."""
        return self.options.disclosures(self.session.num_rounds)

    def summary(self) -> None:
        """Log the settings and what they disclose."""
        options = self.options
        logger.info("\t├──> Method: %s, student: %s", options.distiller.name, options.student)
        logger.info("\t├──> Class weights: %s, broadcast: %s", options.weights, options.broadcast)
        logger.info("\t├──> Teachers: at least %d, reused for %d rounds", options.min_teachers, options.max_teacher_age)
        logger.info("\t├──> Nodes: expected %s, at least %s", options.expected_nodes or "any", options.min_available_nodes or "what min_teachers needs")
        logger.info("\t├──> Train on a fraction of %.2f, at least %d", options.fraction_train, options.min_train_nodes)
        logger.info("\t├──> Evaluate on a fraction of %.2f, at least %d", options.fraction_evaluate, options.min_evaluate_nodes)
        logger.info("\t├──> Run directory: %s", options.run_dir or "none (nothing is kept, no resume)")
        logger.info("\t└──> Disclosed:")
        for line in self.disclosures:
            logger.info("\t\t├── %s", line)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Messages to the sampled clients whose upload for this round is not stored yet: each gets its own teacher's weights."""
        self.session.open(arrays if server_round == 1 else ArrayRecord(), config)
        return self.session.train_messages(server_round, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord | None]:
        """Store every reply as it arrives, then distil all usable teachers into the student.

        Raises:
            TooFewTeachersError: fewer than ``min_teachers`` are usable.
        """
        self.session.open(ArrayRecord(), ConfigRecord())
        self.session.collect(server_round, replies)
        student = self.session.distil()
        metrics = self.session.state.record.train
        return to_record(student.state_dict()), None if metrics is None else MetricRecord(metrics)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Messages with the student to the sampled clients that can rebuild it."""
        return self.session.evaluate_messages(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:  # noqa: ARG002 - Flower's signature
        """Average the clients' metrics, and the attention over heads that they fitted."""
        return self.session.evaluations(replies)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float | None = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the federation, from round 1 or from where an earlier start of the run was interrupted.

        Args:
            grid: of the ServerApp.
            initial_arrays: common initialisation of the default architecture; empty or None is a seeded one.
            num_rounds: 1 is one-shot.
            timeout: seconds to wait for the replies of a round; None waits for ever. The run goes on with those that came.
            train_config: sent with train (and who-are-you) messages.
            evaluate_config: sent with evaluate messages.
            evaluate_fn: called with round and student state dict after every round; not before the first, when there is no student.

        Returns:
            Flower's Result: ``arrays`` is the student's state dict.
        """
        started = time.monotonic()
        train_config, evaluate_config = ConfigRecord(dict(train_config or {})), ConfigRecord(dict(evaluate_config or {}))
        session = self.session
        session.num_rounds, session.timeout = num_rounds, timeout
        logger.info("Starting %s: %d rounds", type(self).__name__, num_rounds)
        self.summary()
        arrays = ArrayRecord() if initial_arrays is None else initial_arrays
        session.open(arrays, train_config)
        for server_round in session.rounds_to_run():
            logger.info("[ROUND %d/%d]", server_round, num_rounds)
            messages = self.configure_train(server_round, arrays, train_config, grid)
            arrays, _ = self.aggregate_train(server_round, session.clients.exchange.ask(grid, messages, timeout))
            messages = self.configure_evaluate(server_round, arrays, evaluate_config, grid)
            self.aggregate_evaluate(server_round, session.clients.exchange.ask(grid, messages, timeout))
            session.finish_round(None if evaluate_fn is None else partial(evaluate_fn, server_round, arrays))
            _log_metrics(self.rounds[-1])
        logger.info("Strategy execution finished in %.2f s", time.monotonic() - started)
        return session.result()


def _log_metrics(record: RoundRecord) -> None:
    """What was measured in a round, as Flower's own strategies say it."""
    for what, metrics in (("train", record.train), ("clients' evaluation", record.evaluate_clients), ("server's evaluation", record.evaluate_server)):
        if metrics:
            logger.info("\t├──> Round %d, %s: %s", record.round, what, ", ".join(f"{name} {_in_short(value)}" for name, value in metrics.items()))


def _in_short(value: Any) -> str:
    return f"[{', '.join(map(_in_short, value))}]" if isinstance(value, list) else f"{value:.4g}" if isinstance(value, float) else str(value)
