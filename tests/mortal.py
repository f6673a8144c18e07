"""An `hvp` command that kills itself with SIGKILL; one killed from outside might finish before the signal arrives."""

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from hvp.cli.main import main
from hvp.common.training import checkpoint, run
from hvp.common.training.run import Run


def run_until_killed(arguments: list[str], after: int, moment: float | str, log: Path) -> None:
    """Run a command in a process of its own until it kills itself.

    Args:
        arguments: words after `hvp`.
        after: number of steps logged before its death.
        moment: seconds from then until its death, even if the run is done by then; or `writing`, to die in the middle
            of the next checkpoint.
        log: file for its output.
    """
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(arguments, after, moment, log))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()


def _run(arguments: list[str], after: int, moment: float | str, log: Path) -> None:
    record = Run.record

    def prepare() -> None:
        if isinstance(moment, float):
            threading.Timer(moment, _die).start()
        else:
            patch.setattr(run, "save_checkpoint", _write_half)

    def recording(self: Run, **values: Any) -> None:
        record(self, **values)
        if self.step + 1 == after:
            prepare()

    torch.set_num_threads(1)
    with log.open("a") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "record", recording)
        if after == 0:
            prepare()
        sys.argv = ["hvp", *arguments]
        main()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write_half(path: Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    def write(file: BinaryIO) -> None:
        whole = io.BytesIO()
        torch.save(content, whole)
        file.write(whole.getbuffer()[: len(whole.getbuffer()) // 2])
        file.flush()
        _die()

    checkpoint.write_atomically(path, write, previous)
