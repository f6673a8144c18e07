"""Numbers of all magnitudes at every numeric key of every method: refused by name, or a run whose costs are known at
once."""

from contextlib import suppress
from time import process_time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvp.cli.dry_run import consequences
from hvp.common.config.allowed import allowed_values, number_limits
from hvp.common.config.resolving import leaf_keys, read_yaml, resolve
from hvp.common.errors import UserError
from hvp.common.training.footprint import check_fits
from hvp.methods import METHODS, get_method, get_preset

SECONDS = 5.0
"""That a configuration's check and consequences may take; they take a tenth of a second."""

POWERS = [sign * base**exponent for sign in (1, -1) for base in (2, 10) for exponent in (0, 1, 3, 7, 16, 25, 64, 400)]

magnitudes = st.one_of(
    st.sampled_from([*POWERS, 2**31, 2**32, 2**63 - 1, 2**64]),
    st.integers(-330, 308).map(lambda exponent: float(f"1e{exponent}")),
    st.integers(),
    st.integers(1, 2**24),
    st.floats(),
    st.floats(0, 1),
)


def numeric_keys(method: str) -> list[str]:
    known = leaf_keys(get_method(method).config)
    return [key for key, field in known.items() if "number" in allowed_values(field)]


def consequences_of(method: str, values: dict[str, Any]) -> None:
    """What `--dry-run` and the start of a run do with the values, within SECONDS."""
    started = process_time()
    with suppress(UserError):
        layers = [("preset tiny", read_yaml(get_preset(method, "tiny"))), ("--set", values)]
        config = resolve(get_method(method).config, layers).config
        assert consequences(method, config)
        check_fits(config, get_method(method).build_modules)
    assert process_time() - started < SECONDS, values


@pytest.mark.parametrize("method", METHODS)
def test_every_number_is_refused_by_name_or_has_consequences_at_once(method):
    known = leaf_keys(get_method(method).config)
    numbers = {key: st.sampled_from(number_limits(known[key])) | magnitudes for key in numeric_keys(method)}

    @settings(max_examples=40)
    @given(st.data())
    def run(data):
        values = {}
        for key in data.draw(st.lists(st.sampled_from(list(numbers)), min_size=1, max_size=4, unique=True)):
            several = "numbers" in allowed_values(known[key])
            values[key] = data.draw(st.lists(numbers[key], min_size=1, max_size=3) if several else numbers[key])
        consequences_of(method, values)

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
def test_what_cannot_work_is_refused_by_name(method, key, value):
    with pytest.raises(UserError, match=f"^--set: {key} = .*: input should be (less|greater) than"):
        resolve(get_method(method).config, [("--set", {key: value})])


def test_too_many_patches_are_refused():
    values = {"model.patch_size": 8, "views.global_crops_size": 4096, "views.local_crops_size": 96}
    with pytest.raises(UserError, match="makes 262144 patches of 8 pixels, but a ViT takes at most 65536"):
        resolve(get_method("dino").config, [("--set", values)])
