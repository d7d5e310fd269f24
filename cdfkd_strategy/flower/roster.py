"""Who is behind a node id: clients are known by a key of their own, because node ids change when a node restarts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr.app import Message

from cdfkd_strategy import seeding
from cdfkd_strategy.errors import UploadError
from cdfkd_strategy.flower.exchange import last_line
from cdfkd_strategy.flower.payload import Identity, read_identity
from cdfkd_strategy.flower.slots import client_order

logger = logging.getLogger("flwr")

NO_HANDLER = "No query function registered"
"""What Flower answers for a ClientApp that was never told what to do with a hello."""

AWAY = (3, 4, 5, 8)
"""Flower's codes of messages that were lost and of nodes or processes that are not there: a later message may find them again."""


@dataclass(frozen=True)
class Client:
    """One client of the run.

    Args:
        node: its present node id.
        key: partition id if it said one, else the node id: the name of its header slot and of its upload.
        arch: the architecture it said; None takes the strategy's default.
        speaks: it knows this project's records, and so can rebuild the student.
    """

    node: int
    key: str
    arch: str | None = None
    speaks: bool = False


class Roster:
    """Node id -> `Client` for the nodes that are or were connected.

    Args:
        num_classes: C, compared with what clients say.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._clients: dict[int, Client] = {}
        self._refused: dict[int, str] = {}

    def unknown(self, nodes: Iterable[int]) -> list[int]:
        """The nodes of which nothing is known yet."""
        return [node for node in nodes if node not in self._clients and node not in self._refused]

    def forget(self, connected: Iterable[int]) -> None:
        """Drop nodes that are gone: a restarted client comes back under another id and claims its key again."""
        here = set(connected)
        if any(node not in here for node in self._clients):  # a key is free again: whoever was refused it may ask once more
            self._refused = {}
        self._clients = {node: client for node, client in self._clients.items() if node in here}
        self._refused = {node: reason for node, reason in self._refused.items() if node in here}

    def pardon(self) -> None:
        """Let refused nodes be asked again: one that was put right keeps its node id where nodes authenticate."""
        self._refused = {}

    def refused(self, nodes: Iterable[int]) -> dict[str, str]:
        """Node id -> why it takes no part, for those of these nodes that do not."""
        return {str(node): self._refused[node] for node in nodes if node in self._refused}

    def hear(self, node: int, reply: Message) -> None:
        """Take a hello reply: a client that has no answer does not know this project, and one that fails to give it is misconfigured."""
        try:
            if not reply.has_error():
                self.enter(node, read_identity(reply.content, self.num_classes))
            elif NO_HANDLER in (reply.error.reason or ""):
                logger.info("node %d does not say who it is: it takes the default architecture, and its node id as key", node)
                self.enter(node, None)
            elif reply.error.code in AWAY:
                logger.warning("node %d could not be asked who it is (code %d): %s", node, reply.error.code, last_line(reply))
            else:
                raise UploadError(f"it could not say who it is (code {reply.error.code}): {last_line(reply)}")
        except UploadError as error:
            logger.warning("node %d takes no part: %s", node, error)
            self._refused[node] = str(error)

    def enter(self, node: int, identity: Identity | None) -> Client:
        """Enter a node, or look it up again.

        Raises:
            UploadError: it claims the key of another connected node, or another key than before.
        """
        known = self._clients.get(node)
        partition = None if identity is None else identity.partition_id
        key = str(node if partition is None else partition)
        if known is not None and known.speaks:
            if partition is not None and key != known.key:
                del self._clients[node]  # it may have been started anew, and put right: it is asked again
                raise UploadError(f"node {node} says it is client {key}, but it was client {known.key} when it was asked to train; it is asked anew who it is")
            return known
        holder = next((client.node for client in self._clients.values() if client.key == key and client.node != node), None)
        if holder is not None:
            raise UploadError(f"node {node} says it is client {key}, which is node {holder}; give every node its own partition-id")
        self._clients[node] = Client(node, key, None if identity is None else identity.arch, identity is not None)
        return self._clients[node]

    def clients(self, nodes: Iterable[int]) -> list[Client]:
        """The clients behind these nodes, sorted by key; nodes that are not entered are left out."""
        return sorted((self._clients[node] for node in nodes if node in self._clients), key=lambda client: client_order(client.key))


def sample(clients: Sequence[Client], fraction: float, minimum: int, *seed: int | str) -> list[Client]:
    """A seeded choice of clients that depends on their keys only.

    Args:
        clients: sorted by key.
        fraction: of them, rounded down.
        minimum: but at least so many, if there are.
        seed: parts of the seed.

    Returns:
        The chosen ones, in the same order.
    """
    count = min(len(clients), max(int(len(clients) * fraction), minimum))
    chosen = seeding.numpy_rng(*seed).permutation(len(clients))[:count]
    return [clients[index] for index in sorted(chosen)]
