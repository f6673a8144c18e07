"""What an evaluation reads its labels from, and what it leaves: one JSON file with every setting."""

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvp.common.data import ImageSource
from hvp.common.errors import UserError
from hvp.common.training.checkpoint import write_atomically

Result = dict[str, Any]
"""What an evaluation found and every setting it ran with; JSON can hold all of it."""


def labelled(train: ImageSource, val: ImageSource) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """The classes that both sources share, and the label of every image.

    Returns:
        classes: their names, in the order of the labels.
        train_labels: [len(train)] int64.
        val_labels: [len(val)] int64.

    Raises:
        UserError: a source has no images or no labels, or the two do not have the same classes.
    """
    (classes, train_labels), (val_classes, val_labels) = _labels(train), _labels(val)
    if classes != val_classes:
        raise UserError(
            f"{val.name} and {train.name} must have the same classes in the same order."
            f" Only in val: {_listed(set(val_classes) - set(classes))};"
            f" only in train: {_listed(set(classes) - set(val_classes))}."
        )
    return classes, train_labels, val_labels


def _labels(source: ImageSource) -> tuple[tuple[str, ...], Tensor]:
    labels = source.labels()
    if source.classes is None or labels is None:
        raise UserError(
            f"{source.name}: the images have no labels, and an evaluation needs them. Make a folder per class."
        )
    if len(source) == 0:
        raise UserError(f"{source.name}: there are no images.")
    return source.classes, torch.from_numpy(labels)


def _listed(names: set[str], most: int = 8) -> str:
    shown = ", ".join(sorted(names)[:most]) or "none"
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def describe_source(source: ImageSource) -> dict[str, Any]:
    """A source's name and size, for the result."""
    return {"name": source.name, "images": len(source), "classes": len(source.classes or ())}


def versions() -> dict[str, Any]:
    """Versions that a result may depend on."""
    packages = ("hvp", "torch", "torchvision", "timm", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


OWN_KEYS = {"checkpoint", "checks", "gain"}
"""Each result that is a JSON object has one of these: an evaluation's, the doctor's, the demo's."""

IRRELEVANT = ("device", "workers")
"""Settings that an evaluation's result does not depend on."""


def claim_result(path: Path) -> None:
    """Makes sure that a result can be written, before hours are spent on it.

    Raises:
        UserError: the folder cannot be made or written, or `path` is there and is no result.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the file to write")
    if path.exists() and (not path.is_file() or path.stat().st_size) and read_result(path) is None:
        raise UserError(f"{path}: exists and holds no result. Name another file with --out")
    try:
        claim_folder(path)
    except UserError as error:
        raise UserError(f"{error}. Name another file with --out") from error


def claim_folder(path: Path) -> None:
    """Makes sure that a file can be written in its folder, whether or not there is one of that name.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def write_result(result: Mapping[str, Any] | list[dict[str, Any]], path: Path) -> None:
    """Writes a result as JSON; the file is complete or not there.

    Raises:
        UserError: the file cannot be written, or is there and is no result.
    """
    claim_result(path)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_result(path: Path) -> Any:
    """Content of a file of `write_result()`; None for any other kind of file."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size < 2**28 else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, list) or (isinstance(content, dict) and OWN_KEYS & content.keys()) else None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In which checkpoint, images or settings two results differ; none where they are the same evaluation's."""
    (first, second) = (_conditions(result) for result in (one, other))
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


def _conditions(result: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a result, by the names that the user knows, as it is after a journey through JSON."""
    checkpoint, settings = (
        value if isinstance(value, Mapping) else {} for value in (result.get("checkpoint"), result.get("settings"))
    )
    found = {
        "evaluation": result.get("evaluation"),
        **{f"checkpoint's {key}": checkpoint.get(key) for key in ("which", "method", "epoch", "step", "weights")},
        **{key: result.get(key) for key in ("train", "val", "images")},
        **{key: value for key, value in settings.items() if key not in IRRELEVANT},
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def free_path(path: Path, result: Mapping[str, Any]) -> tuple[Path, list[str]]:
    """A path for a result that replaces no other evaluation's.

    Args:
        path: where it goes if nothing is there, or the result of the same evaluation.
        result: to be written.

    Returns:
        That path, or the first of `name-2.json`, `name-3.json`, ... of which the same holds; and in what the file at
        `path` differs, which is empty where that one is taken.
    """
    unlike: list[str] = []
    candidate, number = path, 1
    while os.path.lexists(candidate):
        there = read_result(candidate)
        differs = differences(there, result) if isinstance(there, dict) else ["what it is"]
        if not differs:
            break
        unlike = unlike or differs
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate, [] if candidate == path else unlike
