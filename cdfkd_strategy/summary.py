"""``summary.json``: the contract by which other tools read a run. Built round by round, checked, and written atomically."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cdfkd_strategy.checkpoint import write_json
from cdfkd_strategy.competence import LABEL_COUNTS
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.errors import CDFKDError, CheckpointError
from cdfkd_strategy.provenance import commit, hardware, versions
from cdfkd_strategy.run_config import PATIENCE, WHERE, RunConfig, from_values

FILE_NAME = "summary.json"

KEYS = ("study", "cell", "seed", "commit", "hardware", "versions", "config", "runtime", "finished", "stopped_by", "rounds")
CONTINUED = "continued"
"""Only in the summary of a run whose later starts had another origin: a list of these, oldest first."""
BENCH = "bench"
"""Only in the summary of a run of `cdfkd bench`: what is compared there besides accuracies, in the terms of `bench.record`."""
ORIGIN_KEYS = ("commit", "hardware", "versions")
"""Where a start ran; in the summary itself, where the run began."""
ROUND_KEYS = ("round", "accuracy", "seconds", "bytes", "peak_memory_mb")
ACCURACY_KEYS = (
    "teachers",
    "fedavg",
    "ensemble_uniform",
    "ensemble_estimated",
    "ensemble_oracle",
    "student_heads",
    "student_mean",
    "student_merged",
    "student_single",
    "student_attention",
)
LISTS = ("teachers", "student_heads")
"""Accuracy keys that hold one number per teacher or header; the others hold one number. Each may be null."""
SECONDS_KEYS = ("clients", "distill", "evaluate")
BYTES_KEYS = ("up", "down")
STOPPED_BY = ("schedule", "max_seconds", None)


def no_accuracy() -> dict[str, Any]:
    """Every accuracy null: there is no global test set, or nothing to evaluate."""
    return dict.fromkeys(ACCURACY_KEYS)


class SummaryWriter:
    """Keeps a run's ``summary.json`` up to date: after every call the file on disk is whole.

    Until `finish`, the file says ``"finished": false`` with the rounds done so far, so a killed run leaves a readable one.
    A start of the run under another commit, hardware or versions than the last one adds itself to ``"continued"``. A start
    that records no round, because the run was over, leaves the file as it was.

    Args:
        directory: the run directory; made if missing.
        config: the resolved configuration.
        runtime: the engine's resolved choices; may be given later with `round`.
        resume: keep the rounds of an existing file, which must be of the same configuration.

    Raises:
        CheckpointError: ``resume`` with a summary of another configuration.
    """

    def __init__(self, directory: Path, config: RunConfig, *, runtime: Mapping[str, Any] | None = None, resume: bool = False) -> None:
        self.path = directory / FILE_NAME
        directory.mkdir(parents=True, exist_ok=True)
        self._before: dict[str, Any] | None = None
        """The summary of earlier starts, until this one records a round."""
        here = {"commit": commit(), "hardware": hardware(), "versions": versions()}
        self.values: dict[str, Any] = {
            "study": config.study,
            "cell": config.cell,
            "seed": config.seed,
            **here,
            "config": to_dict(config),
            "runtime": None if runtime is None else dict(runtime),
            "finished": False,
            "stopped_by": None,
            "rounds": [],
        }
        if resume and self.path.exists():
            self._before = before = read_summary(directory)
            check_same_config(before["config"], config)
            self.values |= {key: before[key] for key in (*ORIGIN_KEYS, "rounds")} | {"runtime": self.values["runtime"] or before["runtime"]}
            starts = origins(before)
            if here != starts[-1]:
                starts.append(here)
            if len(starts) > 1:
                self.values[CONTINUED] = starts[1:]
        self.write()

    def round(
        self,
        number: int,
        accuracy: Mapping[str, Any] | None,
        *,
        seconds: Mapping[str, float | None],
        traffic: Mapping[str, int | None] | None = None,
        peak_memory_mb: float | None = None,
        runtime: Mapping[str, Any] | None = None,
    ) -> None:
        """Record round ``number`` (from 1), in place of an earlier record of it and of any later round.

        Args:
            number: the round.
            accuracy: what `Harness.evaluate` gave; None is all null.
            seconds: of "clients", "distill" and "evaluate"; missing ones are null.
            traffic: bytes "up" to and "down" from the server; missing ones are null (no network was used).
            peak_memory_mb: of the process that distils.
            runtime: the engine's resolved choices.
        """
        record = {
            "round": number,
            "accuracy": no_accuracy() | dict(accuracy or {}),
            "seconds": {key: (seconds or {}).get(key) for key in SECONDS_KEYS},
            "bytes": {key: (traffic or {}).get(key) for key in BYTES_KEYS},
            "peak_memory_mb": peak_memory_mb,
        }
        self._before = None
        self.values["rounds"] = [*(old for old in self.values["rounds"] if old["round"] < number), record]
        if runtime is not None:
            self.values["runtime"] = dict(runtime)
        self.write()

    def finish(self, stopped_by: Literal["schedule", "max_seconds"]) -> None:
        """The run is complete; ``stopped_by`` says what ended its distillations: "max_seconds" if it ended one of them."""
        if self._before is not None:  # no round was computed by this start
            self.values = self._before
        self.values.update(finished=True, stopped_by=stopped_by)
        self.write()

    def add_bench(self, values: Mapping[str, Any]) -> None:
        """Add what `cdfkd bench` measured, of a run that is finished or that failed."""
        if self._before is not None:
            self.values = self._before
        self.values[BENCH] = dict(values)
        self.write()

    def write(self) -> None:
        """Check and write the file; a number that is not finite is written as null."""
        self.values = finite(self.values)
        validate(self.values)
        write_json(self.path, self.values)


def finite(value: Any) -> Any:
    """The same nested value with null in place of NaN and infinities (JSON has neither)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_summary(directory: Path) -> dict[str, Any]:
    """Read and check the ``summary.json`` of a run directory.

    Raises:
        CDFKDError: it is missing, not JSON, or breaks the contract.
    """
    path = directory / FILE_NAME if directory.is_dir() else directory
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CDFKDError(f"there is no {path}; give the directory of a run") from error
    except (OSError, ValueError) as error:
        raise CDFKDError(f"cannot read {path}: {error}") from error
    try:
        validate(values)
    except CDFKDError as error:
        raise CDFKDError(f"{path}: {error}") from error
    return dict(values)


def origins(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``commit``, ``hardware`` and ``versions`` of the run's first start, and of later ones under others."""
    return [{key: summary[key] for key in ORIGIN_KEYS}, *summary.get(CONTINUED, [])]


def discloses_counts(summary: Mapping[str, Any]) -> bool:
    """Do the class weights of this run come from label counts that the clients disclosed?"""
    return bool(summary["config"].get("server", {}).get("weights") == LABEL_COUNTS)


def check_same_config(saved: Mapping[str, Any], config: RunConfig) -> None:
    """Compare the configuration of an earlier start of a run with this one.

    ``engine`` may differ (a checkpoint brings its own runtime), and so may what only says how long to wait (`PATIENCE`), or where (`WHERE`).

    Raises:
        CheckpointError: they differ; the message names the first differing key.
    """
    mine, saved = json.loads(json.dumps(to_dict(config))), _completed(saved)
    for part, _, key in (name.partition(".") for name in (*(f"server.{key}" for key in PATIENCE), *WHERE)):
        saved[part] = {**(saved.get(part) or {}), key: mine[part][key]}
    for key, value in mine.items():
        if key != "engine" and saved.get(key) != value:
            where, there, here = _difference(key, saved.get(key), value)
            raise CheckpointError(
                f"the run was started with {where}={there!r}, not {here!r}; continue with the same configuration, or start a new run directory"
            )


def is_same_config(saved: Mapping[str, Any], config: RunConfig) -> bool:
    """Does `check_same_config` accept it?"""
    try:
        check_same_config(saved, config)
    except CheckpointError:
        return False
    return True


def same_settings(summaries: Sequence[Mapping[str, Any]]) -> bool:
    """Do the configurations of these runs differ in their seeds alone, and in what `check_same_config` lets differ?"""
    first, *others = [summary["config"] for summary in summaries]
    try:
        return all(is_same_config(first, from_values({**other, "seed": first["seed"]})) for other in others)
    except CDFKDError:  # settings or methods that this version does not have: as they stand
        return all({**other, "seed": first["seed"], "engine": first.get("engine")} == first for other in others)


def _completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration with the defaults of settings that its version did not have yet."""
    try:
        values = json.loads(json.dumps(to_dict(from_values(saved))))
    except CDFKDError:  # it has settings that are no more: whatever differs is named in its own terms
        values = dict(saved)
    return values


def _difference(where: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in {**here, **there}:
            if there.get(key) != here.get(key):
                return _difference(f"{where}.{key}", there.get(key), here.get(key))
    return where, there, here


def validate(summary: Any) -> None:
    """Check a summary against the contract: exactly the agreed keys (and perhaps `CONTINUED` and `BENCH`), fractions between 0 and 1, no NaN.

    Raises:
        CDFKDError: it breaks the contract; the message says where.
    """
    _check_keys(summary, KEYS, "the summary", perhaps=(CONTINUED, BENCH))
    for key in ("study", "cell"):
        _check(isinstance(summary[key], str), key, summary[key], "a string")
    _check(_whole(summary["seed"]), "seed", summary["seed"], "an integer")
    _validate_origin(summary, "")
    later = summary.get(CONTINUED, [])
    _check(isinstance(later, list), CONTINUED, later, "a list")
    for index, origin in enumerate(later):
        _check_keys(origin, ORIGIN_KEYS, f"{CONTINUED}[{index}]")
        _validate_origin(origin, f"{CONTINUED}[{index}].")
    _check(isinstance(summary["config"], dict), "config", summary["config"], "a mapping")
    _check(summary["runtime"] is None or isinstance(summary["runtime"], dict), "runtime", summary["runtime"], "a mapping or null")
    _check(isinstance(summary["finished"], bool), "finished", summary["finished"], "true or false")
    _check(summary["stopped_by"] in STOPPED_BY, "stopped_by", summary["stopped_by"], f"one of {STOPPED_BY}")
    _check(summary["finished"] == (summary["stopped_by"] is not None), "stopped_by", summary["stopped_by"], "null exactly while unfinished")
    _check(isinstance(summary.get(BENCH, {}), dict), BENCH, summary.get(BENCH), "a mapping")
    _check(isinstance(summary["rounds"], list), "rounds", summary["rounds"], "a list")
    for index, record in enumerate(summary["rounds"]):
        _validate_round(record, f"rounds[{index}]")
    _check(finite(summary) == summary, "the summary", "NaN or infinity", "finite numbers")


def _validate_origin(origin: Mapping[str, Any], where: str) -> None:
    _check(origin["commit"] is None or isinstance(origin["commit"], str), f"{where}commit", origin["commit"], "a string or null")
    for key in ("hardware", "versions"):
        _check(isinstance(origin[key], dict), f"{where}{key}", origin[key], "a mapping")


def _validate_round(record: Any, where: str) -> None:
    _check_keys(record, ROUND_KEYS, where)
    _check(_whole(record["round"]) and record["round"] >= 1, f"{where}.round", record["round"], "an integer from 1")
    _check_keys(record["accuracy"], ACCURACY_KEYS, f"{where}.accuracy")
    for key, value in record["accuracy"].items():
        if key in LISTS and value is not None:
            good = isinstance(value, list) and all(item is None or _fraction(item) for item in value)
            _check(good, f"{where}.accuracy.{key}", value, "a list of fractions between 0 and 1, or null")
        else:
            _check(value is None or _fraction(value), f"{where}.accuracy.{key}", value, "a fraction between 0 and 1, or null")
    for part, keys in (("seconds", SECONDS_KEYS), ("bytes", BYTES_KEYS)):
        _check_keys(record[part], keys, f"{where}.{part}")
        for key, value in record[part].items():
            _check(value is None or _number(value), f"{where}.{part}.{key}", value, "a number or null")
    _check(record["peak_memory_mb"] is None or _number(record["peak_memory_mb"]), f"{where}.peak_memory_mb", record["peak_memory_mb"], "a number or null")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return (_whole(value) or isinstance(value, float)) and math.isfinite(value) and value >= 0


def _fraction(value: Any) -> bool:
    return _number(value) and value <= 1


def _check(good: bool, where: str, value: Any, accepted: str) -> None:
    if not good:
        raise CDFKDError(f"{where} is {value!r}; accepted: {accepted}")


def _check_keys(value: Any, keys: tuple[str, ...], where: str, *, perhaps: tuple[str, ...] = ()) -> None:
    _check(isinstance(value, dict), where, value, "a mapping")
    if not set(keys) <= set(value) <= {*keys, *perhaps}:
        also = f", perhaps {', '.join(perhaps)}" if perhaps else ""
        raise CDFKDError(f"{where} has the keys {', '.join(map(str, value))}; accepted: exactly {', '.join(keys)}{also}")
