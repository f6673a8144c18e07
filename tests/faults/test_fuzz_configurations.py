"""Configurations of any text and any value: each is resolved or refused with a message, fast and in little memory."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hvp.common.config.resolving import leaf_keys, read_yaml, resolve
from hvp.methods import METHODS, get_method
from tests.faults.fuzzing import examples, hvp, named

MEMORY = 2 << 30
"""Bytes that a check may allocate on top of the process's own."""


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """Make a check that allocates gigabytes fail, rather than the machine."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def bomb(levels: int, width: int) -> str:
    """Return aliases of aliases: a few lines that expand to `width ** levels` values."""
    lines = [f"a0: &a0 [{', '.join(['1'] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


KEYS = st.sampled_from(
    ["train", "seed", "epochs", "optim", "base_lr", "views", "<<", "?", "~", "1", "a.b", "train.seed"]
)
SCALARS = st.one_of(
    st.sampled_from(
        ["", "~", "null", ".nan", "-.inf", "1e400", "0x10", "0o7", "1_000", "yes", "2001-01-01", "=", "<<"]
    ),
    st.sampled_from(
        ["!!python/object/apply:os.getcwd []", "!!binary aGk=", "!!set {a}", "!x y", "*x", "&x 1", "&x [*x]"]
    ),
    st.sampled_from(["|\n  text", '"\\ud800"', "'", "{a: {b: [", "[[[[", "%YAML 9.9", "---", "\t", "9" * 5000]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8),
)
LINES = st.builds(lambda indent, key, value: f"{'  ' * indent}{key}: {value}", st.integers(0, 3), KEYS, SCALARS)
TEXTS = st.one_of(
    st.lists(LINES, max_size=8).map("\n".join),
    st.text(max_size=60),
    st.builds(bomb, st.integers(1, 12), st.integers(1, 9)),
    st.builds(lambda depth, mark: f"a: {mark * depth}", st.integers(1, 5000), st.sampled_from(["[", "{a: ", "- "])),
    st.sampled_from(["a: &a [*a]", "a: &a {b: *a}", "train: &t {seed: *t}", "train: &t\n  <<: *t", "&a [*a]"]),
    st.integers(1, 10**6).map(lambda n: "a: " + "x" * n),
)

MAGNITUDES = st.integers(0, 308)
NUMBERS = st.one_of(
    st.builds(
        lambda sign, power, more: sign * (2**power) + more, st.sampled_from([1, -1]), MAGNITUDES, st.integers(-1, 1)
    ),
    st.builds(lambda digits, power: float(f"{digits}e{power}"), st.integers(-9, 9), st.integers(-320, 308)),
    st.sampled_from([0, 0.0, -0.0, 1, 0.5, float("nan"), float("inf"), -float("inf"), 5e-324]),
)
VALUES = st.one_of(
    NUMBERS,
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.lists(NUMBERS, max_size=3),
    st.dictionaries(st.text(max_size=4), NUMBERS, max_size=2),
)


@examples(100)
@given(text=TEXTS, method=st.sampled_from(METHODS))
def test_any_text_is_a_configuration_or_refused(tmp_path: Path, text: str, method: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with named(path):
        resolve(get_method(method).config, [(str(path), read_yaml(path))])


@examples(100)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with named(path):
        read_yaml(path)


@examples(25)
@given(data=st.data(), method=st.sampled_from(METHODS))
def test_any_value_is_shown_or_refused(tmp_path: Path, data: st.DataObject, method: str) -> None:
    """Up to three keys have any value of any size; the dry run prints the consequences."""
    keys = data.draw(st.lists(st.sampled_from(sorted(leaf_keys(get_method(method).config))), min_size=1, max_size=3))
    values: dict[str, Any] = {key: data.draw(VALUES, label=key) for key in keys}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    code, said = hvp("pretrain", method, "--preset", "tiny", "--config", path, "--dry-run")
    assert code in (0, 2), said
    assert code == 2 or "views:" in said
