"""Merging and checking configuration."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from hvp.common.config.resolving import (
    FractionRange,
    Section,
    flatten,
    leaf_keys,
    parse_assignment,
    read_yaml,
    resolve,
    to_yaml,
)
from hvp.common.errors import UserError


class Inner(Section):
    """Some values."""

    rate: float = Field(0.1, gt=0)
    """A number."""

    scale: FractionRange = (0.2, 1.0)
    """A range."""


class Outer(Section):
    """A configuration."""

    inner: Inner = Inner()
    epochs: int = 3
    """Passes."""

    on: bool = False
    """A switch."""


def test_later_layers_win_and_sources_are_kept():
    resolved = resolve(
        Outer, [("preset p", {"inner": {"rate": 1, "scale": [0, 1]}, "epochs": 5}), ("--set", {"inner.rate": 2.5})]
    )
    assert resolved.config == Outer(inner=Inner(rate=2.5, scale=(0.0, 1.0)), epochs=5)
    assert list(resolved.values()) == [
        ("inner.rate", 2.5, "--set"),
        ("inner.scale", [0.0, 1.0], "preset p"),
        ("epochs", 5, "preset p"),
        ("on", False, "default"),
    ]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"inner": {"rat": 1}}, r"^f: unknown key inner\.rat\. Did you mean inner\.rate\?$"),
        ({"rate": 1}, r"^f: unknown key rate\. Did you mean inner\.rate\?$"),
        ({"zzz": 1}, r"^f: unknown key zzz\. Known there: epochs, on\.$"),
        ({"inner": 3}, r"^f: inner is a section and takes no value itself; its keys are rate, scale$"),
        ({"inner": {"rate": 0}}, r"^f: inner\.rate = 0: input should be greater than 0$"),
        ({"inner": {"rate": "fast"}}, r"^f: inner\.rate = 'fast': input should be a valid number$"),
        ({"inner": {"rate": float("nan")}}, r"^f: inner\.rate = nan: input should be a finite number$"),
        ({"epochs": "3"}, r"^f: epochs = '3': input should be a valid integer$"),
        ({"epochs": True}, r"^f: epochs = True: input should be a valid integer$"),
        ({"epochs": None}, r"^f: epochs = null: input should be a valid integer$"),
        ({"on": 1}, r"^f: on = 1: input should be a valid boolean$"),
        (
            {"inner": {"scale": [1, 0.5]}},
            r"^f: inner\.scale = \[1, 0\.5\]: the minimum 1\.0 is above the maximum 0\.5$",
        ),
        (
            {"inner": {"scale": [1]}},
            r"^f: inner\.scale = \[1\]: takes two numbers from 0 to 1, .* for example 'inner\.scale=\[0\.2, 1\.0\]'$",
        ),
        ({"inner": {"scale": ["a", 1]}}, r"^f: inner\.scale = \['a', 1\]: input should be a valid number$"),
    ],
)
def test_messages_name_the_error(layer, message):
    with pytest.raises(UserError, match=message):
        resolve(Outer, [("f", layer)])


def test_all_errors_are_listed_at_once():
    with pytest.raises(UserError) as caught:
        resolve(Outer, [("a.yaml", {"epoch": 1}), ("--set", {"inner.rate": -1})])
    assert str(caught.value).splitlines() == [
        "a.yaml: unknown key epoch. Did you mean epochs?",
        "--set: inner.rate = -1: input should be greater than 0",
    ]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(["inner", "inner.rate", "inner.scale", "epochs", "on", "x", "inner.", ".", ""]) | st.text(
    max_size=8
)


@given(st.dictionaries(keys, values, max_size=4))
def test_any_values_give_a_configuration_or_a_user_error(layer):
    with suppress(UserError):
        assert isinstance(resolve(Outer, [("--set", layer)]).config, Outer)


@given(st.text())
def test_any_assignment_gives_a_pair_or_a_user_error(text):
    with suppress(UserError):
        key, _ = parse_assignment(text)
        assert key


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("5e-4", 5e-4), ("3", 3), ("[0.1, 1]", [0.1, 1]), ("none", "none"), ("true", True)],
)
def test_values_are_read_as_people_write_them(text, value):
    key, read = parse_assignment(f"a.b={text}")
    assert (key, read, type(read)) == ("a.b", value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "key 'a' is given twice"),
        ("a: [1", "is not valid YAML"),
        ("- 1\n- 2\n", "must hold `key: value` lines"),
        ("1: 2\n", "key 1 is not text"),
        (
            "a: !!python/object:os.system {}\n",
            r"the tag tag:.*python/object:os\.system is not supported here",
        ),
        ("a: !!bool x\n", r"the tag .*bool is not supported here"),
        ("a: 1\nb: &b [x, x]\nc: [*b, *b]\n", r"the alias \*b is not supported here\. .* \(line 3, column 5\)$"),
        ("a: &a [*a]\n", r"the alias \*a is not supported here"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n", r"the alias \*a is not supported here"),
        ("a: " + 5000 * "[", "nested more than 16 levels deep"),
        (3000 * "- ", "nested more than 16 levels deep"),
        ("a: 1\n" * 20_001, "longer than 100000 characters"),
        ("a: " + 5000 * "9", "is not valid YAML: Exceeds the limit"),
        ("a: 2020-13-45", "is not valid YAML: month"),
    ],
)
def test_messages_name_the_bad_file(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(str(path))


def test_messages_name_a_missing_or_binary_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"b\.yaml: cannot be read"):
        read_yaml(tmp_path / "b.yaml")


def test_only_regular_files_are_read(tmp_path):
    """Reading a pipe without a writer would wait for ever, and /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{path}: is not a regular file"):
            read_yaml(path)


def test_a_value_that_contains_itself_is_refused():
    inside: dict = {}
    inside["inner"] = inside
    with pytest.raises(UserError, match="nested more than 16 levels deep"):
        resolve(Outer, [("f", inside)])


def test_a_number_too_long_to_print_is_refused_without_printing_it():
    with pytest.raises(UserError, match=r"^--set: inner\.rate = a number of thousands of digits: "):
        resolve(Outer, [("--set", dict([parse_assignment("inner.rate=-0x" + 9000 * "F")]))])


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "e.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "e.yaml") == {}


def test_written_yaml_reads_back_the_same():
    config = Outer(inner=Inner(rate=1e-6), epochs=7)
    assert resolve(Outer, [("file", yaml.safe_load(to_yaml(config)))]).config == config


def test_nested_keys_are_flattened():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": 3}) == {"a.b.c": 1, "a.d": [2], "e": 3}
    assert list(leaf_keys(Outer)) == ["inner.rate", "inner.scale", "epochs", "on"]
