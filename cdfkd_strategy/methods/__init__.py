"""One file per method. Importing this package registers them all, and those of other distributions.

Another distribution adds a method with an entry point in the group ``cdfkd_strategy.methods`` that names its
`Distiller` class. One that cannot be imported, or that names something else, is left out with a warning.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.errors import ConfigError

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "cdfkd_strategy.methods"


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            METHODS.add(entry.name, _checked(entry.name, entry.load()))
        except Exception as error:  # anybody's package: what is broken in it must not take the other methods away
            where = f"{entry.value} of {entry.dist.name}" if entry.dist else entry.value
            logger.warning("method %r is left out, since %s cannot be used: %s: %s", entry.name, where, type(error).__name__, error)


def _checked(name: str, found: Any) -> type[Distiller]:
    if not (isinstance(found, type) and issubclass(found, Distiller)):
        raise ConfigError(f"it names {found!r}; accepted: a subclass of Distiller")
    if getattr(found, "name", None) != name:
        raise ConfigError(f"its class says name = {getattr(found, 'name', None)!r}; accepted: the name of the entry point")
    if not dataclasses.is_dataclass(getattr(found, "Config", None)):
        raise ConfigError("its class has no Config; accepted: a frozen dataclass")
    return found


def get_method(name: str) -> type[Distiller]:
    """The class of a method by name; an unknown name is an error that lists the known ones."""
    return METHODS[name]


_discover()

__all__ = ["ENTRY_POINT_GROUP", "METHODS", "get_method"]
