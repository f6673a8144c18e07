"""Descriptions of the values that a field takes."""

from typing import Annotated, Literal

from pydantic import Field

from hvp.common.config.allowed import allowed_values
from hvp.common.config.resolving import FractionRange, Section, leaf_keys
from hvp.methods import METHODS, get_method


class Fields(Section):
    """One field of every kind."""

    count: int = Field(1, ge=1, le=256)
    seed: int | None = Field(None, ge=0, lt=2**64)
    rate: float = Field(0.1, gt=0, le=1)
    width: Annotated[int, Field(ge=1, le=8)] | None = None
    pair: FractionRange = (0.0, 1.0)
    several: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1, max_length=4)] = (0.5,)
    on: bool = True
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    only: Literal["a"] | None = None


def test_every_kind_of_field_is_described():
    assert {name: allowed_values(field) for name, field in Fields.model_fields.items()} == {
        "count": "whole number from 1 to 256",
        "seed": "whole number from 0 to below 2^64, or null",
        "rate": "number above 0 to 1",
        "width": "whole number from 1 to 8, or null",
        "pair": "two numbers from 0 to 1, the smaller one first",
        "several": "a list of 1 to 4 numbers from 0 to 1",
        "on": "true or false",
        "name": "text, or null",
        "kind": "one of a, b",
        "only": "a, or null",
    }


def test_every_number_of_every_method_has_a_range():
    """`allowed_values` raises KeyError for a number without a bound on one side."""
    for method in METHODS:
        assert all(allowed_values(field) for field in leaf_keys(get_method(method).config).values())
