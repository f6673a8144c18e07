"""Checkpoints: written whole or not at all, read without executing anything."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hvp.common.errors import UserError

FORMAT = "hvp-checkpoint"
VERSION = 1


def write_atomically(path: Path, write: Any) -> None:
    """Calls `write(file)` on a file beside `path`, then renames it: readers see the old content or the new one.

    Raises:
        UserError: the folder cannot be written, or the disk is full; what stood at `path` is still there.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError
        beside.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        kept = f" The previous {path.name} is intact." if path.exists() else ""
        raise UserError(f"{path}: cannot be written: {reason}.{kept}") from error


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes tensors, numbers, text and containers of these, atomically, with the format's name and version."""
    whole = {"format": FORMAT, "version": VERSION, **content}
    write_atomically(path, lambda file: torch.save(whole, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads one of our checkpoints to the CPU, with `weights_only=True`.

    Raises:
        UserError: missing, truncated, not a checkpoint of hvp, or of a version that this release does not know.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: is truncated, or no checkpoint: {str(error).splitlines()[0]:.200}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: is not a checkpoint written by hvp")
    if content["version"] != VERSION:
        raise UserError(f"{path}: has format version {content['version']}, but this hvp reads version {VERSION}")
    return content
