"""Start `hvp` commands for the campaign: forked from a zygote, or as new processes."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "COLUMNS": "100"}

ANEW = """
import sys
print(flush=True)
from hvp.cli.main import main
main()
"""
"""The `hvp` command. It prints a line once Python is running; before that, Python itself handles signals."""


SAID_BY_PYTHON = ("Traceback", "Exception ignored", "Fatal Python error", "terminate called", "Segmentation fault")
"""Words that no command may ever print."""


class Failure(Exception):
    """A finding of the campaign: a hang, a traceback, a wrong exit code, or a resumed run that differs."""


class Command(Protocol):
    """A started command."""

    pid: int
    log: Path

    def wait(self, seconds: float) -> int | None:
        """Wait for up to `seconds` and return the exit code, or None if the process is still running."""


class Starter(Protocol):
    """Anything that starts commands: a `Zygote`, or a stand-in in the tests of the campaign itself."""

    def start(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        disk: dict[str, Any] | None = None,
        limits: dict[str, int] | None = None,
    ) -> Command:
        """Start a command; the arguments are those of `Zygote.start()`."""


class Anew:
    """A new Python process, which has its imports still to do."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", ANEW, *arguments],
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def wait(self, seconds: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            said, _ = self._process.communicate(timeout=seconds)
            with self.log.open("ab") as file:
                file.write(said)
            return self._process.returncode
        return None


class Forked:
    """A process forked from the zygote."""

    def __init__(self, pid: int, log: Path, zygote: "Zygote") -> None:
        self.pid, self.log, self._zygote = pid, log, zygote
        self._code: int | None = None

    def wait(self, seconds: float) -> int | None:
        if self._code is None and (answer := self._zygote.answer(seconds)):
            self._code = answer["code"]
        return self._code


class Zygote:
    """The process of zygote.py; a context manager."""

    def __enter__(self) -> "Zygote":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a command writes its own to its log
            bufsize=0,  # unbuffered, so `select()` sees every unread line
            start_new_session=True,
        )
        if self.answer(300) is None:
            raise Failure("the zygote does not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def start(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        disk: dict[str, Any] | None = None,
        limits: dict[str, int] | None = None,
    ) -> Forked:
        """Fork a command.

        Args:
            arguments: words after `hvp`.
            log: file for its output.
            disk: arguments of `disks.install()`; None for the real disk.
            limits: limits by the names of `setrlimit()`: FSIZE, the largest file in bytes; AS, bytes of memory beyond
                what the process starts with.
        """
        request = {"arguments": list(arguments), "log": str(log), "disk": disk, "limits": limits or {}}
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(request)}\n".encode())
        answer = self.answer(60)
        if answer is None:
            raise Failure("the zygote does not answer")
        return Forked(answer["pid"], log, self)

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """Return the zygote's next line, or None if there is none within `seconds`."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], max(0.0, seconds))[0]:
            return None
        line = self._process.stdout.readline()
        if not line:
            raise Failure("the zygote has died")
        answer: dict[str, Any] = json.loads(line)
        return answer


def check_said(log: Path) -> None:
    """Check that a command printed no message of Python's own.

    Raises:
        Failure: it did.
    """
    said = log.read_text(errors="replace")
    if found := [word for word in SAID_BY_PYTHON if word in said]:
        raise Failure(f"{log.name}: says {found[0]!r}")


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def children(pid: int) -> list[int]:
    """Return the child processes of a process that have not been waited for; none if it has ended."""
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def end_all(pid: int) -> None:
    """Kill what is left of a command: its process and its workers, including stopped ones."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Return whether a command's session has any process left that is not a zombie."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = status.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pid and state not in "ZX":
                return True
    return False


def until(condition: Any, seconds: float) -> bool:
    """Wait for a condition and return whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True
