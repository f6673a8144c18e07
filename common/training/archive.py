"""Files of `torch.save`, every byte of which is checked before any content is used.

PyTorch writes a CRC-32 for every record of its archive but never checks it. A file written here ends with the CRC-32 of
all preceding bytes, stored as the comment of the zip archive, so `torch.load` and other programs read it as usual. A
file without this seal, from an older version or another program, is checked against the records' own CRC-32s. These do
not cover the archive's directory, so a few flipped bits there go unnoticed.
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
"""Length of the seal with the CRC-32 that follows it, in hexadecimal digits."""

END_RECORD = 22
"""Bytes of a zip archive's last record. It ends with the length of the comment that follows it."""

MOST_LEVELS, MOST_ENTRIES = 32, 10_000_000
"""Limits on nested containers in a file. A checkpoint has 5 levels and one entry per tensor, number and string."""

OTHER_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class DamagedCheckpoint(UserError):
    """A file that is truncated, altered, or not a checkpoint."""


class _ChecksummedFile:
    """A file open for writing that keeps the CRC-32 of its bytes and the last few of them."""

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
    """Write content to an open, empty, seekable file with `torch.save`, and seal it.

    Args:
        content: tensors, numbers, strings and containers of these.
        file: the file.
    """
    checksummed = _ChecksummedFile(file)
    torch.save(content, cast(IO[bytes], checksummed))
    if not (checksummed.end.startswith(b"PK\x05\x06") and checksummed.end.endswith(b"\0\0")):
        return  # the archive already has a comment, which no PyTorch version writes yet: leave it unsealed
    file.seek(-2, 2)
    file.write(struct.pack("<H", SEAL_BYTES) + SEAL + b"%08x" % checksummed.crc)


def read_archive(path: Path) -> Any:
    """Read a file of `torch.save` to the CPU without executing anything in it.

    Raises:
        DamagedCheckpoint: the file is empty, truncated, altered since it was written, or not a file of `torch.save`; it
            holds anything but plain data and whole tensors; or it is a folder, pipe or device.
        UserError: the file cannot be read, or does not fit in memory.
    """
    try:
        require_file(path)
        with open(path, "rb") as file:
            _check_bytes(path, file)
        with warnings.catch_warnings(action="ignore"):  # PyTorch's warnings about old formats help nobody here
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes can raise anything in the unpickler
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{path}: not enough memory to read it") from error
        if refused := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise DamagedCheckpoint(
                f"{path}: holds Python objects besides weights ({refused[1]}), and hvp executes nothing from a file. "
                "If you trust it, save its state dict alone"
            ) from error
        raise DamagedCheckpoint(f"{path}: is truncated, or not a checkpoint") from error
    if problem := _problem(content):
        raise DamagedCheckpoint(f"{path}: is damaged: {problem}")
    return content


def require_file(path: Path) -> None:
    """Raise DamagedCheckpoint if the path is a folder, a device, or a pipe, which a read would wait for."""
    if kind := OTHER_KINDS.get(stat.S_IFMT(path.stat().st_mode)):
        raise DamagedCheckpoint(f"{path}: is {kind}, not a checkpoint")


def _check_bytes(path: Path, file: BinaryIO) -> None:
    """Check a file's bytes against its seal or, without one, against the archive's own checksums."""
    size = file.seek(0, 2)
    if size == 0:
        raise DamagedCheckpoint(f"{path}: is empty, not a checkpoint")
    before = max(0, size - SEAL_BYTES - 2)
    file.seek(before)
    end = file.read()
    file.seek(0)
    changed = DamagedCheckpoint(f"{path}: is damaged: its bytes changed after it was written (CRC-32)")
    if end[2:].startswith(SEAL):
        crc = 0
        while before and (data := file.read(min(before, 2**22))):
            crc, before = zlib.crc32(data, crc), before - len(data)
        if end != struct.pack("<H", SEAL_BYTES) + SEAL + b"%08x" % zlib.crc32(b"\0\0", crc):
            raise changed
    elif file.read(4) == b"PK\x03\x04":  # otherwise PyTorch's format before 1.6, which has no checksums
        with zipfile.ZipFile(file) as archive:
            if archive.comment.startswith(SEAL):  # cut off within the seal
                raise changed
            written = any(record.CRC for record in archive.infolist())  # PyTorch can be configured to write none
            try:
                wrong = archive.testzip() if written else None
            except zipfile.BadZipFile:
                raise changed from None
        if wrong is not None:
            raise changed


def _problem(content: Any) -> str:
    """Return why content cannot be used, or "": a container that contains itself, or a tensor without values."""
    sizes: dict[int, tuple[int, int]] = {}

    def measure(value: Any, place: str, level: int) -> tuple[int, int]:
        """Count a value's entries, nested ones included, and its levels; a shared container counts in each place."""
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
            raise ValueError(f"{place:.80} is nested too deeply, or has too many entries")
        return entries, levels

    try:
        measure(content, "", 0)
    except ValueError as error:
        return str(error)
    return ""
