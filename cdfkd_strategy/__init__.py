"""Federated learning by data-free distillation: client teachers into one multi-header student, at a Flower server.

The public names are imported on first use, so that ``import cdfkd_strategy`` costs nothing and needs no Flower.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdfkd_strategy.distiller import Distiller as Distiller
    from cdfkd_strategy.engine import distill as distill
    from cdfkd_strategy.errors import CDFKDError as CDFKDError
    from cdfkd_strategy.flower.apps import make_client_app as make_client_app
    from cdfkd_strategy.flower.apps import make_server_app as make_server_app
    from cdfkd_strategy.flower.strategy import CDFKDStrategy as CDFKDStrategy
    from cdfkd_strategy.models.head_fusion import fuse as fuse
    from cdfkd_strategy.models.multi_header import MultiHeaderStudent as MultiHeaderStudent
    from cdfkd_strategy.run_config import resolve as resolve
    from cdfkd_strategy.student_io import load_student as load_student
    from cdfkd_strategy.teachers import TeacherEnsemble as TeacherEnsemble
    from cdfkd_strategy.types import ImageSpec as ImageSpec

__version__ = "0.1.0"

_HOME = {
    "CDFKDError": "errors",
    "CDFKDStrategy": "flower.strategy",
    "Distiller": "distiller",
    "ImageSpec": "types",
    "MultiHeaderStudent": "models.multi_header",
    "TeacherEnsemble": "teachers",
    "distill": "engine",
    "fuse": "models.head_fusion",
    "load_student": "student_io",
    "make_client_app": "flower.apps",
    "make_server_app": "flower.apps",
    "resolve": "run_config",
}

__all__ = sorted([*_HOME, "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(sorted(_HOME))}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
