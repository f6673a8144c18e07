"""Descriptions of the values that a configuration field takes."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo


def allowed_values(field: FieldInfo) -> str:
    """Describe the values that a field takes, for example `whole number from 1 to 256, or null`."""
    return _words(field.annotation, _bounds(field.metadata))


def is_list(field: FieldInfo) -> bool:
    """Whether a field takes several values, such as a pair of numbers."""
    return get_origin(field.annotation) is tuple


def _words(annotation: Any, bounds: dict[str, Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], bounds | _bounds(arguments[1:]))
    if origin in (Union, types.UnionType):
        inner = [_words(each, bounds) for each in arguments if each is not types.NoneType]
        return f"{' or '.join(inner)}, or null"
    if origin is Literal:
        return str(arguments[0]) if len(arguments) == 1 else f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        noun = _words(arguments[0], {}).replace("number", "numbers", 1)
        if arguments[-1] is not Ellipsis:
            return f"two {noun}, the smaller one first"
        return f"a list of {bounds['min_length']} to {bounds['max_length']} {noun}"
    if annotation in (int, float):
        return ("whole number" if annotation is int else "number") + _range(bounds)
    return {bool: "true or false", str: "text"}[annotation]


def _range(bounds: dict[str, Any]) -> str:
    low = f"from {_number(bounds['ge'])}" if "ge" in bounds else f"above {_number(bounds['gt'])}"
    high = f"to {_number(bounds['le'])}" if "le" in bounds else f"to below {_number(bounds['lt'])}"
    return f" {low} {high}"


def _number(number: float) -> str:
    power = int(number).bit_length() - 1
    if number == 2**power and power >= 20:
        return f"2^{power}"
    return str(number) if isinstance(number, int) else f"{number:g}"


def _bounds(metadata: Any) -> dict[str, Any]:
    """Limits of a number (ge, gt, le, lt) and of a list's length (min_length, max_length)."""
    names = ("ge", "gt", "le", "lt", "min_length", "max_length")
    return {name: getattr(limit, name) for limit in _flat(metadata) for name in names if hasattr(limit, name)}


def _flat(metadata: Any) -> Iterator[Any]:
    for each in metadata:
        if isinstance(each, FieldInfo):
            yield from _flat(each.metadata)
        else:
            yield each
