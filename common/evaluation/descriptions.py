"""FILE.meta.json, which describes a converted file: its origin, and the training behind it."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import pydantic

META = ".meta.json"
"""Suffix that turns a converted file's name into that of its description."""

Which = Literal["teacher", "student", "base_encoder", "momentum_encoder", "model"]
"""A network of a checkpoint. `model` is the only network of methods without a teacher or a momentum encoder."""


class DescribedFile(pydantic.BaseModel):
    """Identity of the described file."""

    sha256: str


class Description(pydantic.BaseModel):
    """The parts of a description that an evaluation reads."""

    format: Literal["hvp-conversion"]
    version: Literal[1]
    file: DescribedFile
    method: str | None = None
    which: Which | Literal["bare"] | None = None
    epoch: int | None = None
    step: int | None = None
    config: dict[str, Any] | None = None


def described_in(path: Path) -> Path:
    """Path of the description of a converted file."""
    return path.with_name(path.name + META)


def read_description(path: Path) -> tuple[Description | None, str]:
    """Read the description of a file, if there is one.

    Returns:
        The description and an empty string; or None and the reason why an existing description is not used: it cannot
        be read, or describes another file that once had this name.
    """
    meta = described_in(path)
    if not meta.is_file():
        return None, ""
    try:
        found = Description.model_validate(json.loads(meta.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a description written by hvp convert"
        return None, f"{meta.name} is not used: {reason}"
    if found.file.sha256 != sha256(path):
        return None, f"{meta.name} is not used: it describes another file of this name"
    return found, ""


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
