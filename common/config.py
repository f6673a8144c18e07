"""Typed configuration: where values come from, and what is said when one is wrong.

A method's configuration is a tree of `Section`s. Values are merged in the order defaults < preset < configuration file
< flags and `--set`; every value remembers where it came from, so that `--dry-run` and error messages can say it.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hvp.common.errors import UserError


class Section(BaseModel):
    """A group of configuration values; the string below a field is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the minimum {bounds[0]} is above the maximum {bounds[1]}")
    return bounds


Fraction = Annotated[float, Field(ge=0, le=1)]
# YAML has lists only, so a tuple must accept one; its items stay strictly typed.
Range = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_ascending)]

ConfigT = TypeVar("ConfigT", bound=Section)


@dataclass(frozen=True)
class Value:
    """A configuration value and where it came from, for example `preset vits16-100ep` or `--epochs`."""

    value: Any
    source: str


@dataclass(frozen=True)
class Resolved:
    """A checked configuration."""

    config: Any
    """The method's configuration object."""

    sources: dict[str, str]
    """Where the value of each dotted key came from."""

    def values(self) -> Iterator[tuple[str, Any, str]]:
        """(dotted key, value, source) of every value."""
        for key, value in flatten(self.config.model_dump(mode="json")).items():
            yield key, value, self.sources.get(key, "default")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-6` is a number, and a key given twice is an error."""

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
    """The mapping in a YAML file.

    Raises:
        UserError: the file cannot be read, is not valid YAML, or holds no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: is not valid YAML: {_one_line(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold `key: value` lines, but holds {type(content).__name__} {content!r:.60}")
    return content


def parse_assignment(text: str) -> tuple[str, Any]:
    """`a.b=c` as a dotted key and a value, read as YAML.

    Raises:
        UserError: there is no `=`, or the value is not valid YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text}: must read key=value, for example --set selection.comparisons=64")
    try:
        return key.strip(), yaml.load(value, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"--set {text}: {value!r} is not valid YAML: {_one_line(error)}") from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}. Empty mappings vanish."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def resolve(config_class: type[ConfigT], layers: list[tuple[str, Mapping[str, Any]]]) -> Resolved:
    """Merges layers of values over the defaults and checks the result.

    Args:
        config_class: the method's configuration.
        layers: (source, nested or dotted values), the later ones win. The source stands in messages.

    Raises:
        UserError: an unknown key, a wrong type or a value that is not allowed; the message names every such key, where
            it came from, what is allowed, and the nearest match.
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
        problems += [_invalid(details, values) for details in error.errors()]
    if problems:
        raise UserError("\n".join(problems))
    return Resolved(config, {key: value.source for key, value in values.items()})


def leaf_keys(config_class: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a configuration with its pydantic field."""
    keys: dict[str, Any] = {}
    for name, field in config_class.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= leaf_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field
    return keys


def to_yaml(config: Section) -> str:
    """The whole configuration as YAML, readable by `--config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def nearest(word: str, known: Mapping[str, Any] | list[str]) -> str:
    """` Did you mean X?`, or nothing when nothing is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    if not matches and "." not in word:
        # `epochs` for `train.epochs`
        matches = [key for key in known if key.rpartition(".")[2] == word][:1]
    return f" Did you mean {matches[0]}?" if matches else ""


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
    hint = nearest(key, known)
    if not hint:
        section = key.rpartition(".")[0]
        inside_keys = [name for name in known if name.rpartition(".")[0] == section]
        hint = f" Known there: {', '.join(inside_keys)}." if inside_keys else f" Sections: {', '.join(sections)}."
    return f"{source}: unknown key {key}.{hint}"


def _invalid(details: Any, values: Mapping[str, Value]) -> str:
    """One sentence for one of pydantic's errors."""
    location = [str(part) for part in details["loc"]]
    # a location goes on inside a list or a union; the key is its longest known beginning
    key = next((k for n in range(len(location), 0, -1) if (k := ".".join(location[:n])) in values), ".".join(location))
    if details["type"] == "value_error":
        message = str(details["ctx"]["error"])
    else:
        message = details["msg"][0].lower() + details["msg"][1:]
    if not key:
        return message
    given = values[key].value if key in values else details["input"]
    if details["type"] == "literal_error" and isinstance(given, str):
        message += "." + nearest(given, re.findall(r"'([^']*)'", details["ctx"]["expected"]))
    source = f"{values[key].source}: " if key in values else ""
    shown = "null" if given is None else given
    return (
        f"{source}{key} = {shown!r:.80}: {message}" if isinstance(given, str) else f"{source}{key} = {shown}: {message}"
    )


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()
