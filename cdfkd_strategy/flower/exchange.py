"""Talking to the nodes: wait for them with a deadline, send, and take replies one by one as they come."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator

from flwr.app import DEFAULT_TTL, Message, RecordDict
from flwr.serverapp import Grid

from cdfkd_strategy.errors import TooFewTeachersError

logger = logging.getLogger("flwr")

_SHORTEST, _LONGEST = 0.02, 1.0  # seconds between two looks for replies; from one to the other while nothing comes


def wait_for_nodes(grid: Grid, count: int, seconds: float, least: int | None = None) -> list[int]:
    """The ids of the connected nodes, sorted, as soon as there are ``count``; when the time is up, ``least`` are enough.

    Args:
        grid: of the run.
        count: nodes to wait for.
        seconds: how long.
        least: None is ``count``.

    Raises:
        TooFewTeachersError: there are fewer than ``least`` when the time is up.
    """
    deadline = time.monotonic() + seconds
    least = count if least is None else least
    told = pause = 0.0
    while len(nodes := sorted(grid.get_node_ids())) < count:
        now = time.monotonic()
        if now >= deadline and len(nodes) >= least:
            logger.warning("%d of %d nodes are missing after waiting %.0f s; going on without them", count - len(nodes), count, seconds)
            return nodes
        if now >= deadline:
            raise TooFewTeachersError(
                f"{len(nodes)} nodes are connected after waiting {seconds:.0f} s; accepted: at least {least} "
                "(min_available_nodes, min_train_nodes, min_teachers); start more SuperNodes, lower these, or raise node_wait"
            )
        if now - told > 10:
            told = now
            logger.info("waiting for nodes: %d of %d connected, %.0f s left", len(nodes), count, deadline - now)
        pause = min(_LONGEST, 2 * pause or _SHORTEST)
        time.sleep(min(pause, deadline - now))
    return nodes


class Exchange:
    """One question to many nodes at a time; remembers whom it asked, since an error reply may not say who failed.

    (The SuperLink answers in the name of a node that died, with its own node id.)
    """

    def __init__(self) -> None:
        self._asked: dict[str, int] = {}
        self._unanswered: set[str] = set()
        self._unsent: set[str] = set()

    def node_of(self, reply: Message) -> int:
        """The node that a reply is about."""
        return self._asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)

    @property
    def silent(self) -> list[int]:
        """The nodes of the last question that have not answered, those that it could not be sent to included."""
        return sorted(self._asked[message_id] for message_id in self._unanswered | self._unsent)

    def ask(self, grid: Grid, messages: list[Message], timeout: float | None, lag: float | None = None) -> Iterator[Message]:
        """Send all messages, then yield every reply when it arrives, until all are there or the time is up.

        Args:
            grid: of the run.
            messages: at most one per node; emptied, to free their payload once it is sent.
            timeout: seconds; None waits for ever.
            lag: once there was a reply, give up after so many seconds without another; None does not.
        """
        self._asked, self._unanswered, self._unsent = {}, set(), set()
        if not messages:
            return
        pushed = set(grid.push_messages(messages))
        self._asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        messages.clear()
        self._unanswered = {message_id for message_id in self._asked if message_id in pushed}
        self._unsent = set(self._asked) - self._unanswered
        if self._unsent:
            logger.warning("no message could be sent to nodes %s", sorted(self._asked[message_id] for message_id in self._unsent))
        latest = deadline = math.inf if timeout is None else time.monotonic() + timeout
        pause = _SHORTEST
        while self._unanswered:
            replies = list(grid.pull_messages(list(self._unanswered)))
            for reply in replies:
                self._unanswered.discard(reply.metadata.reply_to_message_id)
                yield reply
            if replies:
                pause = _SHORTEST
                deadline = latest if lag is None else min(latest, time.monotonic() + lag)
            elif time.monotonic() >= deadline:
                logger.warning("no reply in time from nodes %s; going on without them", self.silent)
                return
            else:
                time.sleep(pause)
                pause = min(_LONGEST, 1.5 * pause)


def message_to(node: int, content: RecordDict, message_type: str, server_round: int, timeout: float | None) -> Message:
    """A message that stays valid for as long as its reply is waited for."""
    return Message(content, dst_node_id=node, message_type=message_type, ttl=max(DEFAULT_TTL, timeout or 0), group_id=str(server_round))


def last_line(reply: Message) -> str:
    """The last line of an error reply's reason: a traceback's error."""
    return ((reply.error.reason or "").strip().splitlines() or ["no reason given"])[-1][:300]
