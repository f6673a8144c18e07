"""What an evaluation reads its labels from, and what it leaves: one JSON file with every setting."""

import json
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvp.common.data import ImageSource
from hvp.common.engine.checkpoint import write_atomically
from hvp.common.errors import UserError

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


def claim_result(path: Path) -> None:
    """Makes sure that a result can be written, before hours are spent on it.

    Raises:
        UserError: the folder cannot be made or written, or `path` is a folder.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}). Name another file with --out") from error


def write_result(result: Mapping[str, Any] | list[dict[str, Any]], path: Path) -> None:
    """Writes a result as JSON; the file is complete or not there.

    Raises:
        UserError: the file cannot be written.
    """
    claim_result(path)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
