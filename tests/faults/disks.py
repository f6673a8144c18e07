"""Simulated disks under Python's own files: slow ones, ones that fill up, and ones whose process dies in a write."""

import builtins
import errno
import io
import os
import signal
import time
from pathlib import Path
from typing import Any


def install(folder: str, *, delay: float = 0.0, full_after: int | None = None, dies_after: int | None = None) -> None:
    """Put a simulated disk under every file that this process opens for writing in a folder.

    Args:
        folder: the folder.
        delay: seconds that each write and each fsync takes.
        full_after: bytes that fit on the disk.
        dies_after: bytes after which SIGKILL ends this process, with half of a write done.
    """
    written = 0

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal written
            size = memoryview(data).nbytes
            time.sleep(delay)
            if full_after is not None and written + size > full_after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.name))
            if dies_after is not None and written + size > dies_after:
                super().write(memoryview(data).cast("B")[: size // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            written += size
            return super().write(data)

    open_file, sync = builtins.open, os.fsync

    def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        writes = set(mode) & set("wax+")
        if not writes or isinstance(file, int) or Path(folder) not in Path(os.fspath(file)).absolute().parents:
            return open_file(file, mode, buffering, *args, **kwargs)
        raw = File(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, *args, **kwargs)
        text.reconfigure(line_buffering=buffering == 1)
        return text

    def slow_sync(fd: Any) -> None:
        time.sleep(delay)
        sync(fd)

    builtins.open = io.open = opened
    os.fsync = slow_sync
