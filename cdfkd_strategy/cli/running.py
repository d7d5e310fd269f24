"""``cdfkd run``, ``cdfkd teachers`` and ``cdfkd distill``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from cdfkd_strategy.cli.showing import show_labels, show_run
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.run_config import RunConfig, resolve
from cdfkd_strategy.summary import FILE_NAME, check_same_config, read_summary

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    """The whole job: clients, uploads, distillation, evaluation, in Flower's simulation."""
    config = resolve(args.config, args.overrides)
    out = check_out(args.out, resume=args.resume)
    if not is_finished(out, config):
        from cdfkd_strategy.flower.simulation import simulate

        simulate(config, out, resume=args.resume)
    show_run(out)


def teachers(args: argparse.Namespace) -> None:
    """Train the teachers of round 1 and write a teacher directory."""
    from cdfkd_strategy.offline import write_teachers
    from cdfkd_strategy.pictures import images_of

    config = resolve(args.config, args.overrides)
    out = check_out(args.out, resume=False)
    write_teachers(config, out)
    show_labels(config, images_of(config))
    print(f"teachers: {out}")


def distill(args: argparse.Namespace) -> None:
    """Distil a teacher directory."""
    from cdfkd_strategy.offline import distill_directory, plan

    overrides = list(args.overrides)
    overrides += [f"method.name={args.method}"] if args.method else []
    overrides += [f"student.backbone={args.student}"] if args.student else []
    work = plan(Path(args.teachers), overrides)
    out = check_out(args.out, resume=args.resume)
    if not is_finished(out, work.config):
        distill_directory(work, out, resume=args.resume)
    show_run(out)


def check_out(path: str, *, resume: bool) -> Path:
    """The output directory, absolute.

    Raises:
        ConfigError: it is not empty without ``resume``, or missing with it.
    """
    out = Path(path).resolve()
    if resume and not out.is_dir():
        raise ConfigError(f"--resume, but there is no run directory {out}; start the run without --resume")
    if not resume and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} is not empty; continue that run with --resume, or name another directory")
    return out


def is_finished(out: Path, config: RunConfig) -> bool:
    """Is there a finished run of this configuration?

    A run that ``engine.max_seconds`` stopped is not finished any more once that is raised: its last distillation goes on.

    Raises:
        CheckpointError: there is a run of another configuration.
    """
    if not (out / FILE_NAME).exists():
        return False
    summary = read_summary(out)
    check_same_config(summary["config"], config)
    if not summary["finished"]:
        return False
    limit = (summary["config"].get("engine") or {}).get("max_seconds") if summary["stopped_by"] == "max_seconds" else None
    if limit is not None and not config.engine.is_over(limit):
        logger.info("the run in %s was stopped by engine.max_seconds=%s, which is raised: going on", out, limit)
        return False
    logger.info("the run in %s is finished%s", out, "" if limit is None else f": engine.max_seconds={limit} stopped it, raise that to go on")
    return True
