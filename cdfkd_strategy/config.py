"""Frozen dataclasses <-> plain mappings: bind, override, dump. An unknown key is an error that lists the accepted ones."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from cdfkd_strategy.errors import ConfigError

T = TypeVar("T")


def bind(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the frozen dataclass ``cls`` from a mapping, recursively.

    Args:
        cls: a dataclass type; nested dataclass fields are bound from nested mappings.
        values: keys are field names; missing ones take the field's default. So do keys that are missing in the mapping for a nested dataclass: what the
            field's own default has there.
        where: dotted prefix for error messages.

    Raises:
        ConfigError: an unknown or missing key, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__} is {values!r}; accepted: a mapping with the keys {_names(cls)}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    unknown = [str(key) for key in values if key not in fields]
    if unknown:
        keys = ", ".join(f"{where}.{key}" if where else key for key in unknown)
        raise ConfigError(f"unknown key {keys}; accepted under {where or 'the top level'}: {_names(cls)}")
    hints = get_type_hints(cls)
    complete = {key: _completed(value, _default(fields[key])) for key, value in values.items()}
    bound = {key: _coerce(hints[key], value, f"{where}.{key}" if where else key) for key, value in complete.items()}
    try:
        return cls(**bound)
    except TypeError as error:
        raise ConfigError(f"{where or cls.__name__}: {error}; fields: {_names(cls)}") from error


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _completed(value: Any, default: Any) -> Any:
    """A mapping with what a default dataclass has beside it; anything else as it is."""
    if not isinstance(value, Mapping) or not dataclasses.is_dataclass(default):
        return value
    known = {field.name: getattr(default, field.name) for field in dataclasses.fields(default) if field.init}
    return {**known, **{key: _completed(item, known.get(key)) for key, item in value.items()}}


def _names(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls) if field.init) or "none"


def _coerce(hint: Any, value: Any, where: str) -> Any:  # noqa: PLR0911 - one return per kind of type
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(hint, value, where)
    if origin is typing.Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{where} is {value!r}; accepted: {', '.join(map(repr, get_args(hint)))}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else bind(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list | tuple):
        inner = get_args(hint)[0]
        return tuple(_coerce(inner, item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is Any or (hint is bool and isinstance(value, bool)):
        return value
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is str and isinstance(value, str):
        return value
    raise ConfigError(f"{where} is {value!r} ({type(value).__name__}); accepted: {getattr(hint, '__name__', hint)}")


def _coerce_union(hint: Any, value: Any, where: str) -> Any:
    if value is None and type(None) in get_args(hint):
        return None
    errors = []
    for option in get_args(hint):
        if option is not type(None):
            try:
                return _coerce(option, value, where)
            except ConfigError as error:
                errors.append(str(error))
    raise ConfigError("; or ".join(errors))


def require(
    config: Any,
    where: str,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    why: str = "",
) -> None:
    """Check the numbers of a configuration: finite, and within the bounds. None passes, and a tuple whose numbers all do.

    Args:
        config: has the fields ``names``.
        where: dotted prefix for error messages, or "".
        names: fields that share the bounds.
        least: what a number has to reach.
        above: what a number has to be above.
        most: what a number may reach.
        below: what a number has to be below.
        why: the reason for the bounds, for error messages.

    Raises:
        ConfigError: a number outside the bounds, NaN, or infinite, or something else than a number.
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    accepted = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None) + (f" ({why})" if why else "")
    prefix = f"{where}." if where else ""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else [value]:
            if number is None:
                continue
            a_number = isinstance(number, numbers.Real)  # numpy's too
            if not a_number:
                raise ConfigError(f"{prefix}{name} is {value!r}; accepted: a number, {accepted}")
            too_small = (least is not None and number < least) or (above is not None and number <= above)
            too_large = (most is not None and number > most) or (below is not None and number >= below)
            if not math.isfinite(number):
                raise ConfigError(f"{prefix}{name} is {value}; accepted: a finite number, {accepted}")
            if too_small or too_large:
                raise ConfigError(f"{prefix}{name} is {value}; accepted: {accepted}")


def to_dict(config: Any) -> Any:
    """The plain, JSON-able form of a dataclass (tuples become lists)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    return config


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; accepted: a mapping of configuration keys")
    return values


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply ``a.b=value`` strings (the value is read as YAML) to a nested mapping and return the new mapping.

    Raises:
        ConfigError: a string has no ``=``, a parent key holds a plain value, or the value is not YAML.
    """
    result = json.loads(json.dumps(to_dict(values)))
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise ConfigError(f"override {item!r}; accepted: key=value with a dotted key, such as method.epochs=6")
        *parents, last = path.strip().split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {item!r}: {parent} holds a plain value, not a mapping")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {item!r}: {text!r} is not YAML; quote it, as in name='\"...\"'") from error
    return dict(result)
