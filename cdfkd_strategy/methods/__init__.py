"""One file per method. Importing this package registers them all, and those of other distributions.

Another distribution adds a method with an entry point in the group ``cdfkd_strategy.methods`` that names its
`Distiller` class.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points

from cdfkd_strategy.distiller import METHODS, Distiller

ENTRY_POINT_GROUP = "cdfkd_strategy.methods"


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        METHODS.add(entry.name, entry.load())


def get_method(name: str) -> type[Distiller]:
    """The class of a method by name; an unknown name is an error that lists the known ones."""
    return METHODS[name]


_discover()

__all__ = ["ENTRY_POINT_GROUP", "METHODS", "get_method"]
