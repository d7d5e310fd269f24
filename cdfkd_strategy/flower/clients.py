"""The clients as a session sees them: who is connected, who a reply is from, and what of it can be used."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from cdfkd_strategy.errors import TooFewTeachersError, UploadError
from cdfkd_strategy.flower import payload
from cdfkd_strategy.flower.architectures import Architectures
from cdfkd_strategy.flower.exchange import Exchange, last_line, message_to, wait_for_nodes
from cdfkd_strategy.flower.options import Options
from cdfkd_strategy.flower.payload import Identity
from cdfkd_strategy.flower.roster import Client, Roster
from cdfkd_strategy.flower.run_state import RoundRecord
from cdfkd_strategy.flower.slots import client_order
from cdfkd_strategy.flower.uploads import Upload
from cdfkd_strategy.local_training.attention import AttentionFit
from cdfkd_strategy.teachers import state_hash

logger = logging.getLogger("flwr")


class Clients:
    """Roster and exchange together.

    Args:
        options: the strategy's settings.
        architectures: what clients may train.
    """

    def __init__(self, options: Options, architectures: Architectures) -> None:
        self.options = options
        self.architectures = architectures
        self.roster = Roster(options.image.num_classes)
        self.exchange = Exchange()

    def wait(self, grid: Grid, usable: int, fresh: int) -> list[int]:
        """The nodes of a round: as many as are expected or, when the time is up, no fewer than the round can do with.

        That is the least: a node may turn out to be the client of a teacher that the round has already. A round that was interrupted and has all that
        it needs, of its own, can do without any.

        Args:
            grid: of the run.
            usable: teachers that the round has already: those that it may use again.
            fresh: how many of them were trained in this round, before it was interrupted.

        Raises:
            TooFewTeachersError: there are too few.
        """
        options = self.options
        least = options.min_available_nodes
        if least is None:
            least = max(options.min_teachers - usable, 1)
        least = max(least, options.min_train_nodes)
        wanted = max(least, options.expected_nodes or 0)
        enough = fresh >= options.min_teachers and options.min_available_nodes is None
        return wait_for_nodes(grid, wanted, options.node_wait, 0 if enough else least)

    def connected(self, grid: Grid, nodes: list[int], config: ConfigRecord, server_round: int, num_rounds: int, timeout: float | None) -> list[Client]:
        """Who is behind these nodes, sorted by key; nodes not known yet are asked, where it matters.

        The first answer may take as long as training (a simulation starts its workers now), the others come soon after.
        """
        self.roster.forget(nodes)
        unknown, options = self.roster.unknown(nodes), self.options
        ask = options.identify
        if ask is None:
            ask = self.architectures.several or options.run_dir is not None or num_rounds > 1
        if not ask:
            for node in unknown:
                self.roster.enter(node, None)
        elif unknown:
            content = payload.request(None, config, server_round, keys=options.keys)
            hello = [message_to(node, content, payload.HELLO, server_round, timeout) for node in unknown]
            patience = options.node_wait if self.roster.clients(nodes) else timeout
            for reply in self.exchange.ask(grid, hello, patience, options.node_wait):
                self.roster.hear(self.exchange.node_of(reply), reply)
        return self.roster.clients(nodes)

    def check_enough(self, possible: set[str], nodes: list[int], record: RoundRecord) -> None:
        """Before anybody trains: can the round have as many teachers as it needs?

        Args:
            possible: keys of the clients of whom there is a teacher, or that are about to train one.
            nodes: that are connected.
            record: of the round.

        Raises:
            TooFewTeachersError: it cannot.
        """
        options = self.options
        if len(possible) >= options.min_teachers:
            return
        record.silent = self.silent(nodes)
        raise TooFewTeachersError(
            f"round {record.round} would have {len(possible)} teachers at most (clients {', '.join(sorted(possible, key=client_order)) or '-'}), with "
            f"{len(nodes)} nodes connected; accepted: at least min_teachers={options.min_teachers}; start more SuperNodes, or lower min_teachers "
            f"(fraction_train is {options.fraction_train}, max_teacher_age {options.max_teacher_age}). {record.missing or 'Every connected node takes part'}"
        )

    def behind(self, reply: Message) -> tuple[int, Client | None, str]:
        """Node, client and key that a reply is about; the key of a client that is not known is its node id."""
        node = self.exchange.node_of(reply)
        client = next(iter(self.roster.clients([node])), None)
        return node, client, str(node) if client is None else client.key

    def silent(self, nodes: Iterable[int]) -> list[str]:
        """The keys of the clients that were asked last and have not answered, and the ids of those nodes that never said who they are."""
        keys = {client.node: client.key for client in self.roster.clients(self.exchange.silent)}
        return sorted({keys.get(node, str(node)) for node in [*self.exchange.silent, *self.roster.unknown(nodes)]}, key=client_order)

    def read_upload(self, reply: Message, server_round: int) -> tuple[Upload, dict[str, Tensor]]:
        """The teacher in a train reply.

        Raises:
            UploadError: why it cannot be used.
        """
        node, known, _ = self.behind(reply)

        def arch_of(identity: Identity | None) -> str | None:
            said = None if identity is None else identity.arch
            return said or (None if known is None else known.arch)

        good = payload.read_train_reply(
            _content(reply),
            lambda identity: self.architectures.initial(arch_of(identity)),
            num_classes=self.options.image.num_classes,
            with_label_counts=self.options.label_counts,
            keys=self.options.keys,
        )
        self.architectures.try_out(arch_of(good.identity), good.state, self.options.distiller.needs, self.options.weights)
        client = self.roster.enter(node, good.identity)
        upload = Upload(
            key=client.key,
            arch=arch_of(good.identity) or self.architectures.default,
            num_examples=good.num_examples,
            round=server_round,
            sha256=state_hash(good.state),
            num_bytes=good.num_bytes,
            speaks=good.identity is not None,
            lasting=client.key != str(node),
            label_counts=good.label_counts,
            metrics=payload.kept_metrics(good.metrics, self.options.keys.weight, good.num_examples),
        )
        return upload, good.state

    def read_evaluations(self, replies: Iterable[Message], server_round: int) -> tuple[list[RecordDict], list[AttentionFit], dict[str, str]]:
        """Metrics and attention fits of evaluate replies, sorted by client key; what is malformed or missing, by client key, is logged and left out."""
        metrics: dict[str, RecordDict] = {}
        fits: dict[str, AttentionFit] = {}
        missing: dict[str, str] = {}
        for reply in replies:
            _, _, key = self.behind(reply)
            try:
                measured = payload.read_metrics(_content(reply), self.options.keys)
                if measured is not None:
                    metrics[key] = measured
                fit = payload.read_attention(reply.content, self.options.image.num_classes)
                if fit is not None and self.options.broadcast == "heads":
                    fits[key] = fit
            except UploadError as error:
                logger.warning("round %d: of client %s's evaluation something is not used: %s", server_round, key, error)
                missing[key] = str(error)
        missing |= dict.fromkeys(self.silent(()), "no reply")
        return [metrics[key] for key in sorted(metrics, key=client_order)], [fits[key] for key in sorted(fits, key=client_order)], missing


def _content(reply: Message) -> RecordDict:
    if reply.has_error():
        raise UploadError(f"the client failed (code {reply.error.code}): {last_line(reply)}")
    return reply.content
