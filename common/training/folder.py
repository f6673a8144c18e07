"""A run's folder: who may write into it, and what identifies the run."""

import fcntl
import json
import logging
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch

from hvp.common.config.resolving import to_yaml
from hvp.common.config.sections import RunConfig
from hvp.common.errors import UserError
from hvp.common.training.archive import DamagedCheckpoint, require_file
from hvp.common.training.checkpoint import write_atomically
from hvp.common.training.distributed import World

logger = logging.getLogger(__name__)

CONFIG, RUN, LAST, PREVIOUS, LOCK = "config.yaml", "run.json", "last.pt", "previous.pt", ".lock"
"""Names in a run's folder."""


class Claim:
    """A run's hold on its folder.

    Args:
        out: the folder.
        lock: its lock file, open and locked; None in a process that writes nothing there.
    """

    def __init__(self, out: Path, lock: TextIO | None = None):
        self._out = out
        self._lock = lock

    def check(self) -> None:
        """Check, before something is written, that the folder is still the one that was claimed.

        Raises:
            UserError: it was removed; perhaps another run has begun in a new folder of the same name.
        """
        if self._lock is None:
            return
        try:
            if os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self._out / LOCK)):
                return
            now = "another run has begun in a new folder of that name"
        except (FileNotFoundError, NotADirectoryError):
            now = f"its {LOCK} is gone"
        raise UserError(
            f"{self._out}: was removed while this run was writing into it: {now}. The run stops here and has written "
            "nothing more. Start it again with another --out"
        )


@contextmanager
def claimed(out: Path, world: World, *, resume: bool, overwrite: bool) -> Iterator[Claim]:
    """Create the run's folder and hold it: an earlier run is not lost by accident, and no second run writes here.

    The lock belongs to the leader's process and is released with it, however it ends. It is a record lock: loader
    workers would inherit the one of `flock()` and keep it for the seconds by which they outlive a killed run.

    Raises:
        UserError: the folder is not empty and neither `resume` nor `overwrite` is given; `overwrite` would delete
            something other than a run; another run is writing here; or the folder cannot be written.
    """
    with ExitStack() as held:
        claim = Claim(out)
        with world.agreeing():
            if world.leader:
                claim = held.enter_context(_claim(out, resume=resume, overwrite=overwrite))
        yield claim


@contextmanager
def _claim(out: Path, *, resume: bool, overwrite: bool) -> Iterator[Claim]:
    try:
        occupied = out.exists() and any(path.name != LOCK for path in out.iterdir())
        if occupied and overwrite and not (out / CONFIG).is_file():
            raise UserError(f"{out}: holds files but no run (no {CONFIG}), so --overwrite leaves it alone")
        if occupied and not overwrite and not resume:
            raise UserError(
                f"{out}: is not empty. Continue with --resume, start over with --overwrite, or give another --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{out}: cannot be used as output folder: {error.strerror}") from error
    with lock:
        _lock(out, lock)
        if overwrite:
            _empty(out)
        yield Claim(out, lock)


def _empty(out: Path) -> None:
    try:
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be deleted: {error.strerror}") from error


def _lock(out: Path, lock: TextIO) -> None:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.seek(0)
        raise UserError(
            f"{out}: another run is writing here: {lock.read().strip() or 'it has just started'}. Wait for it to end, "
            "or give another --out"
        ) from error
    except OSError as error:
        logger.warning("%s: is on a file system without locks (%s): make sure that only one run uses it", out, error)
    try:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
    except OSError as error:
        raise UserError(f"{out}: cannot be used as output folder: {error.strerror}") from error


def read_run(out: Path) -> tuple[str, Path]:
    """Return the method of a run and the file of its configuration.

    Raises:
        UserError: the folder holds no run.
    """
    try:
        require_file(out / RUN)
        method = json.loads((out / RUN).read_text(encoding="utf-8"))["method"]
    except (OSError, ValueError, KeyError, TypeError, DamagedCheckpoint) as error:
        raise UserError(
            f"{out}: holds no run that can be resumed: {RUN} is missing or damaged. Give the folder that "
            "`hvp pretrain --out` named"
        ) from error
    return method, out / CONFIG


def describe_run(out: Path, method: str, config: RunConfig) -> None:
    """Write the files that identify a run, for `read_run()`, into a folder that is `claimed()`."""
    about = {"method": method, "versions": versions()}
    write_atomically(out / RUN, lambda file: file.write(json.dumps(about).encode()))
    write_atomically(out / CONFIG, lambda file: file.write(to_yaml(config).encode()))


def versions() -> dict[str, str]:
    """Return the versions of the software that makes a run."""
    return {"hvp": version("hvp"), "torch": str(torch.__version__), "python": platform.python_version()}
