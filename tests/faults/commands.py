"""Commands of hvp as the campaign starts them: forked from a zygote, or as processes of their own."""

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
"""The `hvp` command. It says when Python is up: until then a signal is Python's to answer, not ours."""


SAID_BY_PYTHON = ("Traceback", "Exception ignored", "Fatal Python error", "terminate called", "Segmentation fault")
"""What no command may ever say."""


class Failure(Exception):
    """What the campaign looks for: a hang, a traceback, a wrong exit code, or a run that went on as another."""


class Command(Protocol):
    """A command that was started."""

    pid: int
    log: Path

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if the process has not ended by then."""


class Anew:
    """A Python process of its own, with the imports still to come."""

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
    """A process that the zygote forked."""

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
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a command's goes to its log
            bufsize=0,  # so that `select()` sees every line that was not read
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
        """Forks a command.

        Args:
            arguments: of `hvp`.
            log: where its output goes.
            disk: the arguments of `disks.install()`; None for the machine's own.
            limits: by the names of `setrlimit()`: FSIZE, bytes that a file may have; AS, bytes of memory beyond what
                the process begins with.
        """
        request = {"arguments": list(arguments), "log": str(log), "disk": disk, "limits": limits or {}}
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(request)}\n".encode())
        answer = self.answer(60)
        if answer is None:
            raise Failure("the zygote does not answer")
        return Forked(answer["pid"], log, self)

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next line from the zygote; None if there is none by then."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], max(0.0, seconds))[0]:
            return None
        line = self._process.stdout.readline()
        if not line:
            raise Failure("the zygote has died")
        answer: dict[str, Any] = json.loads(line)
        return answer


def check_said(log: Path) -> None:
    """Sees to it that a command has said nothing that only Python says.

    Raises:
        Failure: it has.
    """
    said = log.read_text(errors="replace")
    if found := [word for word in SAID_BY_PYTHON if word in said]:
        raise Failure(f"{log.name}: says {found[0]!r}")


def send(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def children(pid: int) -> list[int]:
    """Processes that a process has started and that have not been waited for; none where it has ended."""
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def end_all(pid: int) -> None:
    """Ends what is left of a command: its process and its workers, stopped ones, too."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether anything is left of a command's session that is not a zombie."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = status.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pid and state not in "ZX":
                return True
    return False


def until(condition: Any, seconds: float) -> bool:
    """Waits for a condition; whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True
