"""Report of a conversion: the outcome for every tensor, and writing the result with its description."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from hvp.common.errors import UserError
from hvp.common.evaluation.descriptions import described_in, sha256
from hvp.common.evaluation.results import versions
from hvp.common.training.checkpoint import write_atomically

Became = Literal["kept", "renamed", "changed", "left out"]
"""Outcome for a tensor; kept and renamed tensors are equal bit for bit."""

Where = tuple[Any, ...]
"""Keys and positions that lead to a tensor in nested containers."""


@dataclass(frozen=True)
class Fate:
    """Outcome for a group of tensors."""

    group: str
    """Place in the source: the entry and, for a network, the module."""
    tensors: int
    """Number of tensors."""
    numbers: int
    """Number of elements in all of them."""
    became: Became
    to: str = ""
    """Place in the result."""
    why: str = ""
    """Reason for leaving them out or changing them."""


@dataclass
class Account:
    """Outcome for every tensor of a file; `close()` finds tensors that are not accounted for.

    Args:
        content: a checkpoint, or a state dict.
        source: name of the file in messages.
    """

    content: Mapping[str, Any]
    source: str
    fates: list[Fate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open = dict(tensors_in(self.content))

    def settle(
        self,
        became: Became,
        under: Where = (),
        *,
        only: Collection[Tensor] | None = None,
        to: str = "",
        why: str = "",
    ) -> None:
        """Record the outcome for tensors not yet accounted for.

        Args:
            became, to, why: as in Fate.
            under: restricts this to tensors below a place; by default all.
            only: restricts this to these tensors, compared by identity.
        """
        chosen = None if only is None else {id(tensor) for tensor in only}
        groups: dict[str, list[Tensor]] = {}
        for where, tensor in list(self._open.items()):
            if where[: len(under)] == under and (chosen is None or id(tensor) in chosen):
                groups.setdefault(_group(where), []).append(self._open.pop(where))
        for group, members in groups.items():
            numbers = sum(tensor.numel() for tensor in members)
            self.fates.append(Fate(group, len(members), numbers, became, to, why))

    def close(self) -> list[Fate]:
        """Return the fates of all tensors.

        Raises:
            UserError: the file holds tensors that are not accounted for.
        """
        if self._open:
            names = [".".join(map(str, where)) for where in self._open]
            raise UserError(
                f"{self.source}: {len(names)} tensors have no place in the result: "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
        return self.fates


def tensors_in(content: Any, where: Where = ()) -> Iterator[tuple[Where, Tensor]]:
    """Yield the tensors in nested dicts, lists and tuples, and their places."""
    if isinstance(content, Tensor):
        yield where, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from tensors_in(value, (*where, key))
    elif isinstance(content, list | tuple):
        for position, value in enumerate(content):
            yield from tensors_in(value, (*where, position))


def _group(where: Where) -> str:
    """Name of the group that a tensor is reported in: an entry of the checkpoint and, in a network, the module."""
    if len(where) == 1:
        return "weights"
    name = str(where[1]).removeprefix("module.")
    return f"{where[0]}.{name.partition('.')[0]}" if "." in name else str(where[0])


@dataclass(frozen=True)
class Converted:
    """Result of a conversion, before it is written."""

    content: dict[str, Any]
    """Content of the file."""
    fates: Sequence[Fate]
    """Outcome for every tensor of the source."""
    about: Mapping[str, Any]
    """Further entries of `meta.json`: method, network, epoch, step, config, how to load the file."""
    notes: Sequence[str] = ()
    """Notes for the user."""


Save = Callable[[Mapping[str, Any], Any], object]
"""save(content, file) writes to an open binary file."""

PICKLED = (".pth", ".pt", ".bin", ".tar")


def saver(out: Path, *, state_dict: bool, only_safetensors: bool = False) -> Save:
    """Choose the function that writes a file, by the suffix of its name.

    Args:
        out: the file.
        state_dict: whether the content is tensors only, as safetensors requires.
        only_safetensors: whether the file must be safetensors.

    Raises:
        UserError: the suffix does not fit.
    """
    if out.suffix == ".safetensors" and state_dict:
        return _save_safetensors
    allowed = [*([".safetensors"] if state_dict else []), *(PICKLED if not only_safetensors else ())]
    if out.suffix not in allowed:
        raise UserError(f"{out}: the name of this file must end in {' or '.join(allowed)}")
    return torch.save


def _save_safetensors(content: Mapping[str, Any], file: Any) -> None:
    file.write(to_safetensors({key: value.contiguous() for key, value in content.items()}))


def claim(out: Path, source: Path, *, overwrite: bool) -> None:
    """Check that a result may be written, before anything is computed.

    Raises:
        UserError: `out` is the source, its folder does not exist, or it or its description exists already.
    """
    if out.resolve() == source.resolve():
        raise UserError(f"{out}: is the file to convert. Name another file with --out")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}. Create it first, or name another file with --out")
    for path in (out, described_in(out)):
        if path.is_dir():
            raise UserError(f"{path}: is a folder. Name a file with --out")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists. Name another file with --out, or replace it with --overwrite")


def write(converted: Converted, source: Path, out: Path, save: Save) -> None:
    """Write a result and its description, each completely or not at all.

    The description, `FILE.meta.json`, has the SHA-256 of both files, the result's origin, and every tensor's outcome.

    Args:
        converted: the result.
        source: the converted file.
        out: the file to write; replaced if it exists, see `claim()`.
        save: see `saver()`.
    """
    write_atomically(out, lambda file: save(converted.content, file))
    about = {
        "format": "hvp-conversion",
        "version": 1,
        "file": {"name": out.name, "sha256": sha256(out)},
        "source": {"path": str(source.resolve()), "sha256": sha256(source)},
        **converted.about,
        "tensors": [asdict(fate) for fate in converted.fates],
        "notes": list(converted.notes),
        "versions": versions(),
    }
    text = json.dumps(about, indent=1, default=str)
    write_atomically(described_in(out), lambda file: file.write(text.encode()))
