"""The smallest bench that has everything: two cells, two kinds of methods and students."""

from __future__ import annotations

import copy
from typing import Any

from cdfkd_strategy.bench.config import BenchConfig
from cdfkd_strategy.config import bind, override

SMALL_GENERATOR = {"latent_dim": 4, "width": 0.05}
VALUES: dict[str, Any] = {
    "study": "tiny",
    "config": {
        "data": {"name": "digits", "train_size": 200, "test_size": 60, "partition": {"name": "replicated"}, "local_test": 0.0},
        "clients": {"count": 1, "architectures": ["lenet"], "epochs": 1, "init": "own"},
        "server": {"weights": "uniform"},
        "student": {"backbone": "lenet_half", "heads": "plain", "init": "random"},
        "engine": {"device": "cpu", "threads": 1, "precision": "float32", "watch_images": 0, "progress": False, "evaluate_every": 1},
    },
    "seeds": [4],
    "cells": {"one": None, "two": {"clients": {"count": 2}}},
    "methods": {
        "rdskd": {
            "name": "rdskd",
            "generator_epochs": 2,
            "student_epochs": 2,
            "student_milestones": [],
            "iterations": 2,
            "batch_size": 8,
            "generator": SMALL_GENERATOR,
        },
        "mfs": {
            "name": "cdfkd_mfs",
            "published": [0.91, 0.92],
            "epochs": 2,
            "iterations": 2,
            "student_steps": 3,
            "batch_size": 8,
            "generator": SMALL_GENERATOR,
            "student": {"backbone": "lenet_bn", "heads": "per_teacher"},
            "cells": ["two"],
        },
    },
}


def tiny(*overrides: str, **values: Any) -> BenchConfig:
    return bind(BenchConfig, override({**copy.deepcopy(VALUES), **values}, overrides))
