"""The one error tree. A message says what came, what is accepted, and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class CDFKDError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(CDFKDError, ValueError):
    """A configuration value or key is not accepted."""


class UnknownNameError(ConfigError):
    """A name is not registered.

    Args:
        kind: what was looked up ("method", "architecture", ...).
        name: what came.
        accepted: the registered names.
    """

    def __init__(self, kind: str, name: object, accepted: Iterable[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}; accepted: {', '.join(sorted(accepted))}")


class DataError(CDFKDError):
    """A data set is missing, broken, or too small for what was asked of it."""


class ArchitectureError(CDFKDError):
    """A network does not fit: no stages, no classifier, wrong input or output shape."""


class UploadError(CDFKDError):
    """A client's upload is not usable; the message is the reason for its quarantine."""


class NeedsError(CDFKDError):
    """A method needs something of the teachers (or of the clients) that they do not give."""


class TooFewTeachersError(CDFKDError):
    """Fewer usable teachers than ``min_teachers``, or fewer nodes than the deadline allowed for."""


class CheckpointError(CDFKDError):
    """A checkpoint is missing, broken, or belongs to another configuration."""


class MissingExtraError(CDFKDError, ImportError):
    """An optional dependency is not installed.

    Args:
        what: the feature that needs it.
        extra: the extra of this distribution that brings it.
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs an optional dependency; run: pip install "cdfkd-strategy[{extra}]"')
