"""What became of every tensor of a converted file, and how a conversion is written."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torchvision
from safetensors.torch import save as to_safetensors
from torch import Tensor

from hvp.common.errors import UserError
from hvp.common.evaluation.descriptions import described_in, sha256
from hvp.common.training.checkpoint import write_atomically

Became = Literal["kept", "renamed", "changed", "left out"]

Where = tuple[Any, ...]
"""The keys and positions that lead to a tensor in nested containers."""


@dataclass(frozen=True)
class Fate:
    """What became of tensors that belong together."""

    group: str
    """Where they stand in the source: its entry and, of a network, the module."""
    tensors: int
    numbers: int
    """In all these tensors."""
    became: Became
    """`kept` and `renamed` tensors are equal bit for bit."""
    to: str = ""
    """Where they stand in the result."""
    why: str = ""
    """Why they were left out or changed."""


@dataclass
class Account:
    """The tensors of a file, and what became of them; `close()` finds those of which nothing was said.

    Args:
        content: a checkpoint, or a state dict.
        source: what messages call it.
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
        """Says what became of tensors that nothing was said of yet.

        Args:
            became, to, why: as in Fate.
            under: those below this place; all by default.
            only: of these, those which are one of `only`, as objects.
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
        """The fates, of all tensors.

        Raises:
            UserError: the file holds tensors that have no place in the result.
        """
        if self._open:
            names = [".".join(map(str, where)) for where in self._open]
            raise UserError(
                f"{self.source}: {len(names)} tensors are left over, for which there is no place: "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
        return self.fates


def tensors_in(content: Any, where: Where = ()) -> Iterator[tuple[Where, Tensor]]:
    """The tensors in nested dicts, lists and tuples, and where they are."""
    if isinstance(content, Tensor):
        yield where, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from tensors_in(value, (*where, key))
    elif isinstance(content, list | tuple):
        for position, value in enumerate(content):
            yield from tensors_in(value, (*where, position))


def _group(where: Where) -> str:
    """A name for the tensors that are reported together: an entry of the checkpoint, and a module in a network."""
    if len(where) == 1:
        return "weights"
    name = str(where[1]).removeprefix("module.")
    return f"{where[0]}.{name.partition('.')[0]}" if "." in name else str(where[0])


@dataclass(frozen=True)
class Converted:
    """A conversion's result, before it is written."""

    content: dict[str, Any]
    """What the file holds."""
    fates: Sequence[Fate]
    """What became of every tensor of the source."""
    about: Mapping[str, Any]
    """What else `meta.json` says: method, network, epoch, step, config, how to load it."""
    notes: Sequence[str] = ()
    """What the user should know of the result."""


Save = Callable[[Mapping[str, Any], Any], object]
"""save(content, file) writes to an open binary file."""

PICKLED = (".pth", ".pt", ".bin", ".tar")


def saver(out: Path, *, state_dict: bool, only_safetensors: bool = False) -> Save:
    """How a file of that name is written.

    Args:
        out: the file.
        state_dict: what goes into it holds tensors alone, which is all that safetensors takes.
        only_safetensors: it must be that.

    Raises:
        UserError: the name does not end as such a file's does.
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
    """Sees to it that a result may be written, before anything is computed.

    Raises:
        UserError: `out` is the source, its folder is not there, or it or its description exists already.
    """
    if out.resolve() == source.resolve():
        raise UserError(f"{out}: is the file to convert. Name another file with --out")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}. Make it first, or name another file with --out")
    for path in (out, described_in(out)):
        if path.is_dir():
            raise UserError(f"{path}: is a folder. Name a file with --out")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists. Name another file with --out, or replace it with --overwrite")


def write(converted: Converted, source: Path, out: Path, save: Save) -> None:
    """Writes a result and its description, each whole or not at all.

    Args:
        converted: the result.
        source: the file it was made of.
        out: where it goes; replaced if it exists, see `claim()`.
        save: as `saver()` gives it.
    """
    write_atomically(out, lambda file: save(converted.content, file))
    meta = described_in(out)
    about = describe(converted, source, out)
    write_atomically(meta, lambda file: file.write(json.dumps(about, indent=1, default=str).encode()))


def describe(converted: Converted, source: Path, out: Path) -> dict[str, Any]:
    """What `meta.json` holds: both files with their SHA-256, what the result is, and what became of every tensor."""
    return {
        "format": "hvp-conversion",
        "version": 1,
        "file": {"name": out.name, "sha256": sha256(out)},
        "source": {"path": str(source.resolve()), "sha256": sha256(source)},
        **converted.about,
        "tensors": [asdict(fate) for fate in converted.fates],
        "notes": list(converted.notes),
        "versions": {
            "hvp": version("hvp"),
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
    }
