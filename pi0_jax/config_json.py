"""Configurations as JSON, and checks that their values are of the declared types.

A field that may hold one of several dataclasses (a tagged union) is written with the name of its class:
`{"type": "Gaussian", "draws": 1, ...}`. Unions are found in the type hints; nothing here knows a configuration.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from typing import Any, Literal, TypeVar

import cattrs
from cattrs.strategies import configure_tagged_union

from pi0_jax.errors import UserError, did_you_mean

Config = TypeVar("Config")
_NUMBERS = {int: numbers.Integral, float: numbers.Real}


def dump(config: Any) -> dict[str, Any]:
    """A configuration as a JSON object."""
    return _converter(type(config)).unstructure(config)


def load(content: dict[str, Any], cls: type[Config], name: str) -> Config:
    """The inverse of `dump`.

    Args:
        content: JSON object.
        cls: class of the configuration.
        name: what messages call it.

    Raises:
        UserError: a field is unknown, missing, or of another type; the message names each.
    """
    try:
        config = _converter(cls).structure(content, cls)
    except cattrs.BaseValidationError as error:
        raise UserError("; ".join(cattrs.transform_error(error, path=name))) from error
    check(config, cls, name)
    return config


def check(value: Any, kind: Any, name: str) -> None:
    """Raises UserError where a value, or a field of it, is not of its declared type.

    Args:
        value: a configuration or the value of a field.
        kind: its type hint.
        name: dotted path for the message, such as "config.data.frames".
    """
    fitting = [k for k in _members(kind) if _fits(value, k)]
    if not fitting:
        words = [word for k in _members(kind) if typing.get_origin(k) is Literal for word in typing.get_args(k)]
        expected = " or ".join(map(_describe, _members(kind)))
        raise UserError(f"{name} is {value!r}; expected {expected}.{did_you_mean(value, words)}")
    entries = typing.get_args(fitting[0])
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            check(getattr(value, field.name), hints[field.name], f"{name}.{field.name}")
    elif isinstance(value, tuple) and entries:
        entries = entries[:1] * len(value) if entries[1:] == (...,) else entries
        if len(entries) != len(value):
            raise UserError(f"{name} is {value!r}; expected {len(entries)} values.")
        for i, (entry, of) in enumerate(zip(value, entries, strict=True)):
            check(entry, of, f"{name}[{i}]")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, its fields and entries aside; whole numbers are floats, truth values no numbers."""
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    kind = typing.get_origin(kind) or kind
    return isinstance(value, kind) if isinstance(kind, type) else True


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {list(typing.get_args(kind))}"
    name = {type(None): "None"}.get(kind, getattr(kind, "__name__", str(kind)))
    return f"{name}(...)" if _is_dataclass(kind) else name


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union; of any other type hint, itself."""
    if typing.get_origin(kind) is typing.Annotated:
        return _members(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(member for k in typing.get_args(kind) for member in _members(k))
    return (kind,)


def _is_dataclass(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _hints(kind: Any) -> list[Any]:
    """All type hints inside a type hint, fields of dataclasses included, each after those inside it."""
    inner = typing.get_args(kind) if typing.get_origin(kind) is not Literal else ()
    inner = (*inner, *typing.get_type_hints(kind).values()) if _is_dataclass(kind) else inner
    return [*(hint for i in inner for hint in _hints(i)), kind]


@functools.cache
def _converter(cls: type) -> cattrs.Converter:
    """Knows the tagged unions among the fields of a configuration's class."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    for union in dict.fromkeys(_hints(cls)):
        classes = [k for k in _members(union) if _is_dataclass(k)]
        if len(classes) < 2:
            continue
        tagged: Any = typing.Union[tuple(classes)]  # noqa: UP007
        configure_tagged_union(tagged, converter, tag_name="type")
        if type(None) in _members(union):
            converter.register_structure_hook(
                union, lambda value, _, tagged=tagged: None if value is None else converter.structure(value, tagged)
            )
            converter.register_unstructure_hook(
                union, lambda value, tagged=tagged: None if value is None else converter.unstructure(value, tagged)
            )
    return converter
