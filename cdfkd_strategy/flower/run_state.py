"""Where a run stands, on disk: ``state.json``. Whatever moment the server dies at, the next start continues from there.

A round passes through phases, and ``state.json`` is replaced only after the files that its new phase relies on are
whole:

``uploads`` (each good upload is stored as it arrives) -> ``distilling`` (slots, teachers and class weights are fixed; the
engine keeps its own checkpoint) -> ``distilled`` (student written) -> ``evaluated`` (round over).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cdfkd_strategy.checkpoint import LEFTOVERS, STATE_FILE, drop_state, write_json
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.directory_lock import hold
from cdfkd_strategy.errors import CheckpointError
from cdfkd_strategy.flower.options import NO_RESULT
from cdfkd_strategy.flower.payload import RUN_CONFIG
from cdfkd_strategy.run_config import WHERE
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.summary import FILE_NAME, finite

logger = logging.getLogger("flwr")

Phase = Literal["uploads", "distilling", "distilled", "evaluated"]

FORMAT = 1


@dataclass
class RoundRecord:
    """What is known of one finished or running round.

    Args:
        round: from 1.
        seconds: spent so far on "clients", "distill" and "evaluate", restarts included.
        bytes: "up" from and "down" to the clients so far, array payload only.
        quarantined: client key -> why its upload was not used; node id -> why the node was not asked for one.
        silent: keys of clients that were asked for a teacher and did not answer.
        unevaluated: client key -> why there is no evaluation of the client, or why something of it was not used; what no client was asked for is not here.
        train: aggregated metrics of the train replies.
        evaluate_clients: aggregated metrics of the evaluate replies.
        evaluate_server: metrics of ``evaluate_fn``.
        stopped_by: what ended the distillation.

    Metrics may be NaN, in lists too: null in the file.
    """

    round: int
    seconds: dict[str, float] = field(default_factory=lambda: {"clients": 0.0, "distill": 0.0, "evaluate": 0.0})
    bytes: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    quarantined: dict[str, str] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    unevaluated: dict[str, str] = field(default_factory=dict)
    train: dict[str, Any] | None = None
    evaluate_clients: dict[str, Any] | None = None
    evaluate_server: dict[str, Any] | None = None
    stopped_by: str | None = None

    @property
    def missing(self) -> str:
        """Who gave no teacher, and why, in words."""
        return "; ".join(f"client {key}: {reason}" for key, reason in (self.quarantined | dict.fromkeys(self.silent, "no reply")).items())


@dataclass
class RunState:
    """Everything that the next step depends on and that is not in a tensor file.

    Args:
        settings: the strategy's resolved settings; a resumed run must have the same.
        runtime: device, threads and layout that the first start resolved, for all rounds.
        round: the round in progress, from 1.
        phase: how far it is.
        slots: client key -> header slot.
        teachers: per slot, the upload behind the last distillation: ``key`` and ``sha256``.
        weights: class weights [K][C] of the last distillation.
        attention: averaged attention parameters, or None.
        nodes: client key -> the node that was last asked for its teacher.
        rounds: one record per round so far.
    """

    settings: dict[str, Any]
    runtime: Runtime
    round: int = 1
    phase: Phase = "uploads"
    slots: dict[str, int] = field(default_factory=dict)
    teachers: list[dict[str, str]] = field(default_factory=list)
    weights: list[list[float]] | None = None
    attention: dict[str, Any] | None = None
    nodes: dict[str, int] = field(default_factory=dict)
    rounds: list[RoundRecord] = field(default_factory=list)

    @property
    def record(self) -> RoundRecord:
        """The record of the round in progress."""
        if not self.rounds or self.rounds[-1].round != self.round:
            self.rounds.append(RoundRecord(self.round))
        return self.rounds[-1]

    def may_have(self, key: str, node: int) -> bool:
        """May this node be sent the client's last teacher? Not if it was another client before; one that is new may be that client, restarted."""
        others = [other for other, known in self.nodes.items() if known == node and other != key]
        if others:
            what = "node %d was client %s and says now that it is client %s: it begins with the common initialisation, not with that client's teacher"
            logger.warning(what, node, others[0], key)
        return not others

    def remember(self, asked: Mapping[str, int], known: Container[str]) -> None:
        """Note which nodes are asked for whose teachers; of the clients before, those of whom a teacher is known are kept."""
        self.nodes = {key: node for key, node in self.nodes.items() if key in known} | dict(asked)


class RunDirectory:
    """The strategy's files in a run directory; without one, nothing is written.

    Args:
        path: the directory, or None.
        resume: continue what is there; else it must be empty.

    Raises:
        CheckpointError: the directory is not empty and ``resume`` is False, or another process works in it.
    """

    def __init__(self, path: Path | None, resume: bool) -> None:
        self.path = path
        self.resume = resume
        if path is None:
            return
        if path.exists() and not resume and any(not file.match(LEFTOVERS) for file in path.iterdir()):
            raise CheckpointError(f"the run directory {path} is not empty; continue it with resume=True (--resume), or choose another one")
        path.mkdir(parents=True, exist_ok=True)
        hold(path)
        for leftover in path.glob(LEFTOVERS):
            leftover.unlink(missing_ok=True)

    def open(self, settings: Mapping[str, Any], runtime: Callable[[], Runtime]) -> RunState:
        """The state to continue from, or a fresh one.

        Args:
            settings: of this start.
            runtime: resolves that of a fresh run.

        Raises:
            CheckpointError: the state is broken, or of a run with other settings.
        """
        mine = json.loads(json.dumps(to_dict(settings)))
        if self.path is None or not (self.path / STATE_FILE).exists():
            if self.path is not None and (self.path / FILE_NAME).exists():
                raise CheckpointError(f"{self.path} holds a distillation without Flower; continue it with `cdfkd distill`, or choose another run directory")
            return RunState(mine, runtime())
        state = _read(self.path / STATE_FILE)
        names = {*mine, *state.settings} - NO_RESULT
        different = sorted(key for key in names if _without_places(mine.get(key)) != _without_places(state.settings.get(key)))
        if different:
            key = different[0]
            raise CheckpointError(
                f"the run in {self.path} was started with another {', '.join(different)} "
                f"({key}: {state.settings.get(key)!r:.200} there, {mine.get(key)!r:.200} here); continue with the same settings, or start a new run directory"
            )
        return state

    def save(self, state: RunState) -> None:
        """Write the state; files that it relies on must be there already."""
        if self.path is not None:
            write_json(self.path / STATE_FILE, {"format": FORMAT, **finite(to_dict(state))})  # clients may report NaN

    def clear_distillation(self, server_round: int) -> None:
        """Before the distillation of a round: put the last round's losses aside and drop its checkpoint.

        Called in phase ``uploads``, where whatever checkpoint there is belongs to an earlier round.
        """
        if self.path is None:
            return
        if server_round > 1 and (self.path / "losses.csv").exists():
            (self.path / "losses.csv").replace(self.path / f"losses-round{server_round - 1}.csv")
        drop_state(self.path / "checkpoint")


def _without_places(setting: Any) -> Any:
    """A setting as it is, but for the places in the configuration that clients are sent (`WHERE`), which may change."""
    if not isinstance(setting, Mapping) or not isinstance(text := setting.get(RUN_CONFIG), str):
        return setting
    config = json.loads(text)
    for part, _, key in (name.partition(".") for name in WHERE):
        config.get(part, {}).pop(key, None)
    return {**setting, RUN_CONFIG: config}


def _metrics(saved: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Metrics as they were before `finite`: a MetricRecord takes NaN, also among the numbers of a list, and no null."""
    if saved is None:
        return None
    nan = float("nan")
    return {
        name: [nan if item is None else item for item in value] if isinstance(value, list) else nan if value is None else value for name, value in saved.items()
    }


def _read(path: Path) -> RunState:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        runtime, rounds = Runtime.from_dict(values.pop("runtime")), [RoundRecord(**record) for record in values.pop("rounds")]
        for record in rounds:
            record.train, record.evaluate_clients, record.evaluate_server = map(_metrics, (record.train, record.evaluate_clients, record.evaluate_server))
        return RunState(**values, runtime=runtime, rounds=rounds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); start a new run directory") from error
