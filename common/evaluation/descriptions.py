"""FILE.meta.json: what `hvp convert` says of a file that cannot say it of itself."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import pydantic

META = ".meta.json"
"""Suffix that makes a converted file's name that of its description."""


class DescribedFile(pydantic.BaseModel):
    """The file that is described."""

    sha256: str


class Description(pydantic.BaseModel):
    """The parts of a description that an evaluation reads."""

    format: Literal["hvp-conversion"]
    version: Literal[1]
    file: DescribedFile
    method: str | None = None
    which: Literal["teacher", "student", "base_encoder", "momentum_encoder", "model", "bare"] | None = None
    epoch: int | None = None
    step: int | None = None
    config: dict[str, Any] | None = None


def described_in(path: Path) -> Path:
    """The file that describes a converted one."""
    return path.with_name(path.name + META)


def read_description(path: Path) -> tuple[Description | None, str]:
    """The description of a file, where it has one.

    Returns:
        The description, and an empty string; or None, and why the one that is there is not used: it cannot be read, or
        it describes another file, which once had this name.
    """
    meta = described_in(path)
    if not meta.is_file():
        return None, ""
    try:
        found = Description.model_validate(json.loads(meta.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no description as hvp convert writes it"
        return None, f"{meta.name} is not used: {reason}"
    if found.file.sha256 != sha256(path):
        return None, f"{meta.name} is not used: it describes another file of this name"
    return found, ""


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
