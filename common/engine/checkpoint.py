"""Checkpoints: written whole or not at all, read without executing anything."""

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvp.common.errors import UserError

FORMAT = "hvp-checkpoint"
VERSION = 1


class DamagedCheckpoint(UserError):
    """A file that is truncated, or no checkpoint of hvp."""


def write_atomically(path: Path, write: Any, previous: Path | None = None) -> None:
    """Calls `write(file)` on a file beside `path`, then renames it: readers see the old content or the new one.

    Args:
        path: the file.
        write: writes to an open binary file.
        previous: where the old content goes. At every moment one of the two names stands for a whole file.

    Raises:
        UserError: the folder cannot be written, or the disk is full; what stood at `path` is still there.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        kept = f" The previous {path.name} is intact." if path.exists() else ""
        raise UserError(f"{path}: cannot be written: {_reason(error)}.{kept}") from error


def _reason(error: BaseException) -> str:
    """What the operating system said. torch.save raises a RuntimeError of its own after the OSError of a full disk."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)


def save_checkpoint(path: Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """Writes tensors, numbers, text and containers of these, atomically, with the format's name and version; the
    checkpoint that stood there becomes `previous`."""
    whole = {"format": FORMAT, "version": VERSION, **content}
    write_atomically(path, lambda file: torch.save(whole, file), previous)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads one of our checkpoints to the CPU, with `weights_only=True`.

    Raises:
        DamagedCheckpoint: truncated, or not a checkpoint of hvp.
        UserError: missing, or of a version that this release does not know.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise DamagedCheckpoint(f"{path}: is truncated, or no checkpoint: {str(error).splitlines()[0]:.200}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path}: is not a checkpoint written by hvp")
    if content["version"] != VERSION:
        raise UserError(f"{path}: has format version {content['version']}, but this hvp reads version {VERSION}")
    return content


MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}
"""Numbers that an optimiser keeps for each that it trains."""


def checkpoint_bytes(config: Any, build_modules: Callable[[Any, torch.device], Sequence[nn.Module]]) -> int:
    """Bytes of the tensors in a checkpoint of a configuration, without the memory to train it: those of the modules,
    and the optimiser's moments of what has a gradient in them.

    Args:
        config: a method's, whose `optim.optimizer` is one of MOMENTS.
        build_modules: the method's, as in `hvp.methods.Method`.
    """
    meta = torch.device("meta")
    with meta:
        modules = build_modules(config, meta)
    trained = sum(p.numel() * p.element_size() for m in modules for p in m.parameters() if p.requires_grad)
    states = sum(t.numel() * t.element_size() for m in modules for t in m.state_dict().values())
    return states + MOMENTS[config.optim.optimizer] * trained
