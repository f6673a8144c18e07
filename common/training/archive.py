"""Files of `torch.save`, of which every byte is checked before anything in them is used.

PyTorch writes a CRC-32 for every record of its archive, and never compares it. A file written here ends with the CRC-32
of all that stands before, as the comment of the zip archive: to `torch.load` and to other programs it is a file like
any other. A file without it, older or of another program, is held against the records' own CRC-32s instead; these say
nothing of the archive's directory, so a few flipped bits there go unnoticed.
"""

import re
import stat
import struct
import warnings
import zipfile
import zlib
from argparse import Namespace
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

from hvp.common.errors import UserError

SEAL = b"hvp-crc32:"
SEAL_BYTES = len(SEAL) + 8
"""The seal is followed by the CRC-32 in hexadecimal digits."""

END_RECORD = 22
"""Bytes of a zip archive's last record, which ends with the length of the comment that follows it."""

MOST_LEVELS, MOST_ENTRIES = 32, 10_000_000
"""Limits on nested containers in a file. A checkpoint has 5 levels and an entry for each tensor, number and text."""

OTHER_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class DamagedCheckpoint(UserError):
    """A file that is truncated, changed, or no checkpoint."""


class _Summed:
    """A file that is written from its beginning, the CRC-32 of its bytes, and the last of them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc = 0
        self.end = b""

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        self.end = (self.end + bytes(data[-END_RECORD:]))[-END_RECORD:]
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save_sealed(content: Any, file: BinaryIO) -> None:
    """Writes content to an open, empty, seekable file by `torch.save`, and seals it.

    Args:
        content: tensors, numbers, text and containers of these.
        file: the file.
    """
    summed = _Summed(file)
    torch.save(content, cast(IO[bytes], summed))
    if not (summed.end.startswith(b"PK\x05\x06") and summed.end.endswith(b"\0\0")):
        return  # an archive with a comment, which no PyTorch writes yet: left as it is
    file.seek(-2, 2)
    file.write(struct.pack("<H", SEAL_BYTES) + SEAL + b"%08x" % summed.crc)


def read_archive(path: Path) -> Any:
    """The content of a file of `torch.save`, on the CPU, without running anything the file holds.

    Raises:
        DamagedCheckpoint: the file is empty, truncated, changed since it was written, no file of `torch.save`, holds
            other things than plain data and whole tensors, or is a folder, pipe or device.
        UserError: the file cannot be read, or memory does not suffice for it.
    """
    try:
        require_file(path)
        with open(path, "rb") as file:
            _check_bytes(path, file)
        with warnings.catch_warnings(action="ignore"):  # what PyTorch says of old formats helps nobody here
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what damaged bytes raise in the unpickler is not a closed list
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{path}: memory does not suffice to read it") from error
        if refused := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise DamagedCheckpoint(
                f"{path}: holds Python objects besides weights ({refused[1]}), and hvp runs nothing from a file. Save "
                "its state dict alone, where you trust it"
            ) from error
        raise DamagedCheckpoint(f"{path}: is truncated, or no checkpoint") from error
    if problem := _problem(content):
        raise DamagedCheckpoint(f"{path}: is damaged: {problem}")
    return content


def require_file(path: Path) -> None:
    """Raises DamagedCheckpoint where a folder, a pipe, which would be waited for, or a device is in a file's place."""
    if kind := OTHER_KINDS.get(stat.S_IFMT(path.stat().st_mode)):
        raise DamagedCheckpoint(f"{path}: is {kind}, no checkpoint")


def _check_bytes(path: Path, file: BinaryIO) -> None:
    """Holds a file's bytes against the seal, or the archive's own sums where there is none."""
    size = file.seek(0, 2)
    if size == 0:
        raise DamagedCheckpoint(f"{path}: is empty, no checkpoint")
    before = max(0, size - SEAL_BYTES - 2)
    file.seek(before)
    end = file.read()
    file.seek(0)
    changed = DamagedCheckpoint(f"{path}: is damaged: its bytes are not those that were written (CRC-32)")
    if end[2:].startswith(SEAL):
        crc = 0
        while before and (data := file.read(min(before, 2**22))):
            crc, before = zlib.crc32(data, crc), before - len(data)
        if end != struct.pack("<H", SEAL_BYTES) + SEAL + b"%08x" % zlib.crc32(b"\0\0", crc):
            raise changed
    elif file.read(4) == b"PK\x03\x04":  # else a file as PyTorch wrote them until 1.5, which has no sums
        with zipfile.ZipFile(file) as archive:
            if archive.comment.startswith(SEAL):  # cut off within the seal
                raise changed
            written = any(record.CRC for record in archive.infolist())  # PyTorch can be told to write none
            try:
                wrong = archive.testzip() if written else None
            except zipfile.BadZipFile:
                raise changed from None
        if wrong is not None:
            raise changed


def _problem(content: Any) -> str:
    """Says why content cannot be used: containers that hold themselves, or tensors without values of their own."""
    sizes: dict[int, tuple[int, int]] = {}

    def measure(value: Any, place: str, level: int) -> tuple[int, int]:
        """Entries, all told, and levels of a value; containers that stand in several places count in each."""
        if isinstance(value, Tensor):
            if value.is_meta or value.layout is not torch.strided or value.is_quantized or value.is_nested:
                kind = "without values" if value.is_meta else "that is sparse, nested or quantized"
                raise ValueError(f"{place} is a tensor {kind}")
            return 1, 0
        value = vars(value) if isinstance(value, Namespace) else value
        if not isinstance(value, dict | list | tuple | set):
            return 1, 0
        if id(value) not in sizes:
            if level > MOST_LEVELS:
                raise ValueError(f"{place:.80} contains itself, or is nested too deeply")
            entries, levels = 1, 0
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                found = measure(inner, f"{place}.{key!s:.80}" if place else f"{key!s:.80}", level + 1)
                entries, levels = entries + found[0], max(levels, found[1] + 1)
            sizes[id(value)] = entries, levels
        entries, levels = sizes[id(value)]
        if level + levels > MOST_LEVELS or entries > MOST_ENTRIES:
            raise ValueError(f"{place:.80} is nested too deeply, or holds too much")
        return entries, levels

    try:
        measure(content, "", 0)
    except ValueError as error:
        return str(error)
    return ""
