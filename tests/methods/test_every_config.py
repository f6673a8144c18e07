"""Numbers of all magnitudes at every numeric key of every method: each is refused by name, or its costs are known at
once."""

import json
import re
from contextlib import suppress
from time import process_time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvp.cli.dry_run import consequences
from hvp.common.config.allowed import allowed_values
from hvp.common.config.resolving import leaf_keys, read_yaml, resolve
from hvp.common.errors import UserError
from hvp.common.training.footprint import check_fits
from hvp.methods import METHODS, get_method, get_preset

SECONDS = 5.0
"""Time limit for the check and the consequences of a configuration, which take a tenth of a second."""

POWERS = [sign * base**exponent for sign in (1, -1) for base in (2, 10) for exponent in (0, 1, 3, 7, 16, 25, 64, 400)]

magnitudes = st.one_of(
    st.sampled_from([*POWERS, 2**31, 2**32, 2**63 - 1, 2**64]),
    st.integers(-330, 308).map(lambda exponent: float(f"1e{exponent}")),
    st.integers(),
    st.integers(1, 2**24),
    st.floats(),
    st.floats(0, 1),
)


def numeric_keys(method: str) -> dict[str, str]:
    """Map the numeric keys of a method to their allowed values."""
    known = leaf_keys(get_method(method).config)
    return {key: values for key, field in known.items() if "number" in (values := allowed_values(field))}


def number_limits(allowed: str) -> list[float]:
    """Read the ends of a range from its description: 1 and 2^24 from `whole number from 1 to 2^24`."""
    ends = re.findall(r"(?:from|above|to|below) (2\^)?(\d[^\s,]*)", allowed)
    return [2 ** int(end) if power else json.loads(end) for power, end in ends]


def check_consequences(method: str, values: dict[str, Any]) -> None:
    """Do what `--dry-run` and the start of a run do with the values, within SECONDS."""
    started = process_time()
    with suppress(UserError):
        layers = [("preset tiny", read_yaml(get_preset(method, "tiny"))), ("--set", values)]
        config = resolve(get_method(method).config, layers).config
        assert consequences(method, config)
        check_fits(config, get_method(method).build_modules)
    assert process_time() - started < SECONDS, values


@pytest.mark.parametrize("method", METHODS)
def test_every_number_is_refused_or_its_costs_are_known_at_once(method):
    allowed = numeric_keys(method)
    numbers = {key: st.sampled_from(number_limits(values)) | magnitudes for key, values in allowed.items()}

    @settings(max_examples=40)
    @given(st.data())
    def run(data):
        values = {}
        for key in data.draw(st.lists(st.sampled_from(list(numbers)), min_size=1, max_size=4, unique=True)):
            several = "numbers" in allowed[key]
            values[key] = data.draw(st.lists(numbers[key], min_size=1, max_size=3) if several else numbers[key])
        check_consequences(method, values)

    run()


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("dino", "train.seed", 2**64),
        ("dino", "views.global_crops_size", 10**25),
        ("dino", "model.out_dim", 10**25),
        ("dino", "selection.local_candidates", 100_000),
        ("dino", "rescue.num_ops", 1_000_000),
        ("dino", "loss.teacher_temp", 1e-300),
        ("ibot", "loss.student_temp", 1e-300),
        ("dinov2", "teacher.teacher_temp", 1e-300),
        ("simclr", "loss.temperature", 1e-300),
        ("mocov3", "loss.temperature", 1e-300),
        ("simsiam", "views.crop_scale", [0.0, 1.0]),
        ("simsiam", "views.crop_scale", [0.5, 2.0]),
        ("dino", "data.workers", 100_000),
        ("dinov2", "model.num_register_tokens", 10**9),
        ("dinov2", "dino.head_nlayers", 10**6),
    ],
)
def test_hopeless_values_are_refused_by_name(method, key, value):
    with pytest.raises(UserError, match=f"^--set: {key} = .*: input should be (less|greater) than"):
        resolve(get_method(method).config, [("--set", {key: value})])


def test_too_many_patches_are_refused():
    values = {"model.patch_size": 8, "views.global_crops_size": 4096, "views.local_crops_size": 96}
    with pytest.raises(UserError, match="makes 262144 patches of 8 pixels, but a ViT takes at most 65536"):
        resolve(get_method("dino").config, [("--set", values)])
