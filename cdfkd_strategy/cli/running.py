"""``cdfkd run``, ``cdfkd teachers`` and ``cdfkd distill``."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cdfkd_strategy.cli.showing import show_labels, show_run
from cdfkd_strategy.directory_lock import held
from cdfkd_strategy.errors import CheckpointError, ConfigError
from cdfkd_strategy.parallel import check_alone, is_first, joined
from cdfkd_strategy.run_config import RunConfig, resolve
from cdfkd_strategy.summary import FILE_NAME, check_same_config, read_summary

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    """The whole job: clients, uploads, distillation, evaluation, in Flower's simulation."""
    check_alone("cdfkd run")
    config = resolve(args.config, args.overrides)
    out = check_out(args.out, resume=args.resume)
    if not is_finished(out, config):
        from cdfkd_strategy.flower.simulation import simulate

        simulate(config, out, resume=args.resume)
    show_run(out)


def teachers(args: argparse.Namespace) -> None:
    """Train the teachers of round 1 and write a teacher directory; with ``--resume``, those that an interrupted start did not come to."""
    from cdfkd_strategy.data.datasets import load_data
    from cdfkd_strategy.offline import check_made_with, write_teachers
    from cdfkd_strategy.teacher_directory import INDEX, load_teachers

    check_alone("cdfkd teachers")
    config = resolve(args.config, args.overrides)
    out = check_out(args.out, resume=args.resume)
    with held(out):
        if (out / INDEX).exists():
            check_made_with(load_teachers(out).config, config, out)
            data = load_data(config.data, config.seed)
        else:
            data = write_teachers(config, out)
    show_labels(config, data)
    print(f"teachers: {out}")


def distill(args: argparse.Namespace) -> None:
    """Distil a teacher directory, in one process or in all that torchrun started."""
    with joined():
        if not is_first():
            logging.getLogger("cdfkd_strategy").setLevel(logging.ERROR)  # what the first one says is enough
        out = _distill(args)
        if is_first():
            show_run(out)


def _distill(args: argparse.Namespace) -> Path:
    from cdfkd_strategy.checkpoint import STATE_FILE
    from cdfkd_strategy.offline import distill_directory, plan

    overrides = list(args.overrides)
    method = args.method or ("kd" if args.transfer_set else None)
    overrides += [f"method.name={method}"] if method else []
    overrides += [f"student.backbone={args.student}"] if args.student else []
    overrides += [f"engine.transfer_images={args.save_transfer_set}"] if args.save_transfer_set is not None else []
    overrides += [f"server.transfer_set={json.dumps(str(Path(args.transfer_set).resolve()))}"] if args.transfer_set else []
    work = plan(Path(args.teachers), overrides)
    out = check_out(args.out, resume=args.resume)
    if (out / STATE_FILE).exists():
        raise CheckpointError(f"{out} holds a run with Flower; continue it with `cdfkd run`, or name another directory")
    with held(out) if is_first() else nullcontext():
        if not is_finished(out, work.config):
            distill_directory(work, out, resume=args.resume)
    return out


def check_out(path: str, *, resume: bool) -> Path:
    """The output directory, absolute.

    Raises:
        ConfigError: it is not empty without ``resume``, or missing with it.
    """
    from cdfkd_strategy.checkpoint import LEFTOVERS

    out = Path(path).resolve()
    if resume and not out.is_dir():
        raise ConfigError(f"--resume, but there is no run directory {out}; start the run without --resume")
    if not resume and out.exists() and not (out.is_dir() and all(file.match(LEFTOVERS) for file in out.iterdir())):
        raise ConfigError(f"--out {out} is not empty; continue that run with --resume, or name another directory")
    return out


def is_finished(out: Path, config: RunConfig) -> bool:
    """Is there a finished run of this configuration?

    A run whose last distillation ``engine.max_seconds`` stopped is not finished any more once that is raised above the time it
    took. One of an earlier round is over: clients have its student.

    Raises:
        CheckpointError: there is a run of another configuration, or its state cannot be read.
    """
    if not (out / FILE_NAME).exists():
        return False
    summary = read_summary(out)
    check_same_config(summary["config"], config)
    if not summary["finished"]:
        return False
    if not was_stopped(out, summary):
        logger.info("the run in %s is finished", out)
        return True
    limit, seconds = (summary["config"].get("engine") or {}).get("max_seconds"), summary["rounds"][-1]["seconds"]["distill"] or 0.0
    if config.engine.is_over(seconds):
        logger.info("the run in %s is finished: engine.max_seconds=%s stopped it after %.1f s, raise that above them to go on", out, limit, seconds)
        return True
    logger.info("the run in %s was stopped by engine.max_seconds=%s, which is raised: going on", out, limit)
    return False


def was_stopped(out: Path, summary: Mapping[str, Any]) -> bool:
    """Did ``engine.max_seconds`` stop the last distillation of a finished run? (Its summary says whether it stopped one of them.)"""
    if summary["stopped_by"] != "max_seconds" or not summary["rounds"]:
        return False
    from cdfkd_strategy.checkpoint import STATE_FILE

    if not (out / STATE_FILE).exists():  # without Flower there is one round
        return True
    try:
        state = json.loads((out / STATE_FILE).read_text(encoding="utf-8"))
        return bool(state["rounds"][-1]["stopped_by"] == "max_seconds")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"cannot read {out / STATE_FILE} ({error}); restore it, or start a new run directory") from error
