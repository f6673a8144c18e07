"""Labels and results of evaluations; a result is a JSON file with every setting."""

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
"""Findings and all settings of an evaluation, as values that JSON can hold."""


def labelled(train: ImageSource, val: ImageSource) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Return the classes shared by both sources, and the label of every image.

    Returns:
        classes: names of the classes, in the order of the labels.
        train_labels: [len(train)] int64.
        val_labels: [len(val)] int64.

    Raises:
        UserError: a source has no images or no labels, or the sources have different classes.
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
            f"{source.name}: the images have no labels, which an evaluation needs. Make one folder per class."
        )
    if len(source) == 0:
        raise UserError(f"{source.name}: there are no images.")
    return source.classes, torch.from_numpy(labels)


def _listed(names: set[str], limit: int = 8) -> str:
    shown = ", ".join(sorted(names)[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in total)"


def describe_source(source: ImageSource) -> dict[str, Any]:
    """Describe a source in the result: name and size."""
    return {"name": source.name, "images": len(source), "classes": len(source.classes or ())}


def versions() -> dict[str, Any]:
    """Versions of Python and of the packages that a result may depend on."""
    packages = ("hvp", "torch", "torchvision", "timm", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


OWN_KEYS = {"checkpoint", "checks", "gain"}
"""Keys that identify a JSON object as a result of an evaluation, the doctor or the demo."""

IRRELEVANT = ("device", "workers")
"""Settings that do not affect the result of an evaluation."""


def claim_result(path: Path) -> None:
    """Check that a result can be written, before hours are spent on it.

    Raises:
        UserError: the folder cannot be created or written, or `path` exists and is not a result.
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
    """Check that the folder of a file can be written, creating it if needed.

    Raises:
        UserError: the folder cannot be created or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def write_result(result: Mapping[str, Any] | list[dict[str, Any]], path: Path) -> None:
    """Write a result as JSON, completely or not at all.

    Raises:
        UserError: the file cannot be written, or exists and is not a result.
    """
    claim_result(path)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_result(path: Path) -> Any:
    """Read a file of `write_result()`; return None for any other kind of file."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size < 2**28 else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, list) or (isinstance(content, dict) and OWN_KEYS & content.keys()) else None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of inputs (checkpoint, images, settings) in which two results differ; empty for the same evaluation."""
    (first, second) = (_conditions(result) for result in (one, other))
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


def _conditions(result: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a result under names that the user knows, converted to JSON's types."""
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
    """Find a path for a result that does not replace another evaluation's.

    Args:
        path: preferred path; it is free if nothing exists there, or a result of the same evaluation.
        result: the result to write.

    Returns:
        The first free one of `path`, `name-2.json`, `name-3.json`, ...; and the inputs in which the file at `path`
        differs, empty if `path` itself is returned.
    """
    first_differs: list[str] = []
    candidate, number = path, 1
    while os.path.lexists(candidate):
        there = read_result(candidate)
        differs = differences(there, result) if isinstance(there, dict) else ["what it is"]
        if not differs:
            break
        first_differs = first_differs or differs
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate, first_differs
