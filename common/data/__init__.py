"""Datasets: the embedded `shapes` and image folders, behind one small protocol."""

import os
from typing import Literal

from hvp.common.data.folder import open_folder
from hvp.common.data.shapes import Shapes, ShapesOptions
from hvp.common.data.source import BadImage, ImageSource

__all__ = ["BadImage", "ImageSource", "ShapesOptions", "absolute_dataset", "open_dataset", "same_dataset"]


def open_dataset(
    spec: str, split: Literal["train", "val"], *, shapes: ShapesOptions = ShapesOptions(), labels: bool = False
) -> ImageSource:
    """Open the dataset that `--data` names.

    Args:
        spec: `shapes` for the embedded dataset (a folder of that name is `./shapes`), or a folder of images in one of
            the layouts of `hvp.common.data.folder`.
        split: the part to open.
        shapes: options of the embedded dataset; folders ignore them.
        labels: whether every image must have a label, as evaluation needs.

    Returns:
        A source with at least one image.

    Raises:
        UserError: the folder is missing, is empty, cannot be read, or lacks the split or the labels asked for.
    """
    if spec == "shapes":
        return Shapes(shapes, split)
    return open_folder(spec, split, labels=labels)


def absolute_dataset(spec: str | None) -> str | None:
    """Turn the value of `--data` into one that holds in any working directory."""
    # an empty name is refused when it is opened
    return os.path.abspath(os.path.expanduser(spec)) if spec and spec != "shapes" else spec


def same_dataset(one: object, other: object) -> bool:
    """Whether two values of `--data` name the same dataset, seen from this working directory."""
    if not (isinstance(one, str) and isinstance(other, str)) or "shapes" in (one, other):
        return one == other
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))
