"""Typed configuration: reading, merging and checking values.

A method's configuration is a tree of `Section`s. Values are merged in the order defaults < preset < configuration file
< flags and `--set`. The source of every value is kept for `--dry-run` and error messages.
"""

import difflib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hvp.common.config.allowed import allowed_values, is_list
from hvp.common.errors import UserError


class Section(BaseModel):
    """A group of configuration values; the string below a field is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the minimum {bounds[0]} is above the maximum {bounds[1]}")
    return bounds


# Every number has a range. The bounds are generous: they stop mistyped or hopeless values, such as a crop of 10^25
# pixels, before anything is built from them. `hvp.common.training.footprint` checks their products.
Fraction = Annotated[float, Field(ge=0, le=1)]
# YAML has lists only, so a tuple must accept one; its items stay strictly typed.
FractionRange = Annotated[tuple[Fraction, Fraction], Field(strict=False), AfterValidator(_ascending)]
_Area = Annotated[float, Field(ge=1e-4, le=1)]
Scale = Annotated[tuple[_Area, _Area], Field(strict=False), AfterValidator(_ascending)]
"""Area of a crop as a fraction of the image's, (min, max)."""
CropSize = Annotated[int, Field(ge=8, le=4096)]
PatchSize = Annotated[int, Field(ge=1, le=512)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Prototypes = Annotated[int, Field(ge=2, le=2**24)]
Temperature = Annotated[float, Field(ge=1e-4, le=1e6)]
LearningRate = Annotated[float, Field(ge=1e-12, le=1e6)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Epochs = Annotated[int, Field(ge=0, le=1_000_000)]
Every = Annotated[int, Field(ge=1, le=10**9)]
"""Steps between two occurrences of an event."""

ConfigT = TypeVar("ConfigT", bound=Section)


@dataclass(frozen=True)
class Value:
    """A configuration value and its source, for example `preset vits16-100ep` or `--epochs`."""

    value: Any
    source: str


@dataclass(frozen=True)
class Resolved:
    """A checked configuration."""

    config: Any
    """The method's configuration object."""

    sources: dict[str, str]
    """Source of each dotted key's value; keys with their default value are missing."""

    def values(self) -> Iterator[tuple[str, Any, str]]:
        """Yield (dotted key, value, source) for every value."""
        for key, value in flatten(self.config.model_dump(mode="json")).items():
            yield key, value, self.sources.get(key, "default")


MAX_CHARACTERS = 100_000
"""Longest configuration file, characters; the longest presets have 4000."""

MAX_DEPTH = 16
"""Deepest nesting of a configuration, levels; its own keys have 3."""


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that no configuration needs."""


class _Loader(yaml.SafeLoader):
    """YAML loader that reads `1e-6` as a number and refuses duplicate keys.

    It also refuses aliases, tags and deep nesting, which no configuration needs: with them a short text can stand for
    a huge or endless value, or for something other than text, numbers, lists and mappings.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"the alias *{event.anchor:.40} is not supported here. Write the value out"
        elif event.tag is not None:
            problem = f"the tag {event.tag:.60} is not supported here. Write the value without it"
        elif self._depth == MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} levels deep, so it is not a configuration"
        if problem:
            raise _Refused(None, None, problem, event.start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path | Traversable) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        UserError: the file cannot be read, is not a regular file, is longer than MAX_CHARACTERS, is not valid YAML, or
            does not hold a mapping.
    """
    try:
        text = _read_regular(path) if isinstance(path, Path) else path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8, or a path that cannot be one
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{path}: is longer than {MAX_CHARACTERS} characters, so it is not a configuration")
    content = _load(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold `key: value` lines, but holds {type(content).__name__} {_shown(content)}")
    return content


def _read_regular(path: Path) -> str:
    """Read the beginning of a regular file, enough to see that it is too long. A pipe might never end, or begin."""
    # O_NONBLOCK: opening a pipe would wait for a writer
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{path}: is not a regular file. Write the values to a regular file")
        content = file.read(4 * MAX_CHARACTERS + 1)  # UTF-8 has at most 4 bytes a character
    return content.decode("utf-8", errors="ignore" if len(content) > 4 * MAX_CHARACTERS else "strict")


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split `a.b=c` into a dotted key and a value, which is read as YAML.

    Raises:
        UserError: there is no `=`, or the value is not valid YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text:.80}: must read key=value, for example --set selection.comparisons=64")
    return key.strip(), _load(value, f"--set {text:.80}")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn {"a": {"b": 1}} into {"a.b": 1}. Empty mappings vanish.

    Raises:
        UserError: the mapping is nested more than MAX_DEPTH levels deep, for example because it contains itself.
    """
    if prefix.count(".") > MAX_DEPTH:
        raise UserError(f"{prefix:.40}...: nested more than {MAX_DEPTH} levels deep, so it is not a configuration")
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def resolve(config_class: type[ConfigT], layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Resolved:
    """Merge layers of values over the defaults and check the result.

    Args:
        config_class: the method's configuration.
        layers: (source, nested or dotted values); later layers win. Messages name the source.

    Raises:
        UserError: a key is unknown, or a value has the wrong type or is not allowed. The message names every such key,
            its source, the allowed values, and the nearest match.
    """
    values: dict[str, Value] = {}
    for source, layer in layers:
        values |= {key: Value(value, source) for key, value in flatten(layer).items()}
    known = leaf_keys(config_class)
    problems = [_unknown(key, value.source, known) for key, value in values.items() if key not in known]
    tree = _nest({key: value.value for key, value in values.items() if key in known})
    try:
        config = config_class.model_validate(tree)
    except ValidationError as error:
        problems += dict.fromkeys(_invalid(details, values, known) for details in error.errors())  # no duplicates
    if problems:
        raise UserError("\n".join(problems))
    return Resolved(config, {key: value.source for key, value in values.items()})


def leaf_keys(config_class: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Map every dotted key of a configuration to its pydantic field."""
    keys: dict[str, Any] = {}
    for name, field in config_class.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= leaf_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field
    return keys


def to_yaml(config: Section) -> str:
    """Write the whole configuration as YAML, readable by `--config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def nearest(word: str, known: list[str]) -> str:
    """Return ` Did you mean X?`, or an empty string if no known word is close."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {matches[0]}?" if matches else ""


def chosen_keys(key: str | None, known: Mapping[str, Any]) -> list[str]:
    """Return the keys that a key or a section name selects; None selects all.

    Raises:
        UserError: there is no such key or section.
    """
    chosen = [name for name in known if key is None or name == key or name.startswith(f"{key}.")]
    if key is not None and not chosen:
        raise UserError(f"unknown key {key}.{_suggestion(key, known)}")
    return chosen


OTHER_NAMES = {
    "lr": "base_lr",
    "learning_rate": "base_lr",
    "wd": "weight_decay",
    "bs": "batch_size",
    "num_workers": "workers",
    "num_epochs": "epochs",
}
"""Common names elsewhere, and ours."""


def _suggestion(key: str, known: Mapping[str, Any]) -> str:
    """Suggest keys for an unknown one: the nearest, or else all keys of its section, or else all sections."""
    section, _, name = key.rpartition(".")
    inside = [each for each in known if each.rpartition(".")[0] == section]
    wanted = OTHER_NAMES.get(name, name)
    words = set(name.split("_"))
    candidates = (
        [each for each in inside if each.rpartition(".")[2] == wanted],  # a name from elsewhere
        difflib.get_close_matches(key, list(known), n=1, cutoff=0.85),  # a typing error
        [each for each in known if each.rpartition(".")[2] == wanted][:1],  # a key of another section
        [each for each in inside if words <= set(each.rpartition(".")[2].split("_"))][:3],  # part of a name
        difflib.get_close_matches(key, list(known), n=1, cutoff=0.6),
    )
    if found := next(filter(None, candidates), None):
        return f" Did you mean {' or '.join(found)}?"
    if inside:
        return f" Known there: {', '.join(inside)}."
    return f" Sections: {', '.join(sorted({each.rpartition('.')[0] for each in known}))}."


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _unknown(key: str, source: str, known: Mapping[str, Any]) -> str:
    sections = sorted({name.rpartition(".")[0] for name in known})
    if key in sections:
        inside = ", ".join(name.removeprefix(f"{key}.") for name in known if name.startswith(f"{key}."))
        return f"{source}: {key} is a section and takes no value itself; its keys are {inside}"
    return f"{source}: unknown key {key}.{_suggestion(key, known)}"


def _invalid(details: Any, values: Mapping[str, Value], known: Mapping[str, Any]) -> str:
    """Turn one of pydantic's errors into one sentence."""
    location = [str(part) for part in details["loc"]]
    # a location continues inside a list or a union; the key is its longest known prefix
    key = next((k for n in range(len(location), 0, -1) if (k := ".".join(location[:n])) in values), ".".join(location))
    if details["type"] == "value_error":
        message = str(details["ctx"]["error"])
    else:
        message = details["msg"][0].lower() + details["msg"][1:]
    if not key:
        return message
    given = values[key].value if key in values else details["input"]
    if details["type"] in ("tuple_type", "too_short", "too_long", "missing") and key in known and is_list(known[key]):
        example = [*known[key].default]
        message = f"takes {allowed_values(known[key])}, for example '{key}={example}'"
    if details["type"] == "literal_error" and isinstance(given, str):
        message += "." + nearest(given, re.findall(r"'([^']*)'", details["ctx"]["expected"]))
    source = f"{values[key].source}: " if key in values else ""
    return f"{source}{key} = {_shown(given)}: {message}"


def _load(text: str, where: str) -> Any:
    """Read the value in a YAML text; `where` begins the message of a UserError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, error.problem or error.context
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        invalid = "" if isinstance(error, _Refused) else "is not valid YAML: "
        raise UserError(f"{where}: {invalid}{problem}{place}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a date, or a number of 5000 digits
        reason = re.sub(r"\s+", " ", str(error)).strip()
        raise UserError(f"{where}: is not valid YAML: {reason:.200}") from error


def _shown(value: Any) -> str:
    """Format a value for a message, in at most 80 characters."""
    try:
        text = "null" if value is None else repr(value)
    except ValueError:  # Python does not print an integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
