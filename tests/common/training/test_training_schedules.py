"""Schedules: their ends, their seams, and the reference's numpy arrays written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvp.common.training.schedules import cosine, linear_then_constant, warmup_cosine

values = st.floats(-10, 10, allow_nan=False)


@given(base=values, final=values, start=values, warmup=st.integers(0, 20), rest=st.integers(0, 30))
def test_warmup_cosine_equals_the_reference_array(
    base: float, final: float, start: float, warmup: int, rest: int
) -> None:
    ramp = np.linspace(start, base, warmup)
    decay = [final + (base - final) * (1 + math.cos(math.pi * i / rest)) / 2 for i in range(rest)]
    ours = [
        warmup_cosine(i, base=base, final=final, total_steps=warmup + rest, warmup_steps=warmup, start=start)
        for i in range(warmup + rest)
    ]
    np.testing.assert_allclose(ours, [*ramp, *decay], rtol=1e-12, atol=1e-12)


def test_the_seams_of_warmup_cosine() -> None:
    def lr(step: int) -> float:
        return warmup_cosine(step, base=1.0, final=0.25, total_steps=10, warmup_steps=4)

    assert (lr(0), lr(3), lr(4)) == (0.0, 1.0, 1.0)
    assert lr(9) > 0.25
    assert lr(10) == lr(1000) == 0.25


def test_a_warmup_of_one_step_uses_the_start_value_and_one_of_none_does_not() -> None:
    assert warmup_cosine(0, base=1.0, final=0.0, total_steps=5, warmup_steps=1, start=0.5) == 0.5
    assert warmup_cosine(0, base=1.0, final=0.0, total_steps=5, start=0.5) == 1.0
    assert linear_then_constant(0, 0.04, 0.07, 1) == 0.04
    assert linear_then_constant(0, 0.04, 0.07, 0) == 0.07


@given(base=values, final=values, total=st.integers(1, 50), step=st.integers(0, 60))
def test_cosine_stays_between_its_ends(base: float, final: float, total: int, step: int) -> None:
    value = cosine(step, base=base, final=final, total_steps=total)
    assert min(base, final) - 1e-12 <= value <= max(base, final) + 1e-12


@given(start=values, end=values, warmup=st.integers(0, 20), step=st.integers(0, 40))
def test_linear_then_constant_equals_the_reference_array(start: float, end: float, warmup: int, step: int) -> None:
    expected = [*np.linspace(start, end, warmup), *[end] * 41][step]
    assert linear_then_constant(step, start, end, warmup) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_impossible_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="step -1"):
        cosine(-1, base=1.0, final=0.0, total_steps=5)
    with pytest.raises(ValueError, match="warm-up of 6 in 5 steps"):
        warmup_cosine(0, base=1.0, final=0.0, total_steps=5, warmup_steps=6)
    with pytest.raises(ValueError, match="step -1"):
        linear_then_constant(-1, 0.0, 1.0, 3)
