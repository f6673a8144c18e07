"""The `hvp` command, which dies by SIGKILL: `mortal.py AFTER MOMENT ARGUMENTS...`.

It dies once AFTER steps are logged: MOMENT seconds later, be it after its own end, or, where MOMENT is `writing`, in
the middle of the next checkpoint. A process that is to be killed from outside may be through by then.
"""

import io
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hvp.cli.main import main
from hvp.common.training import checkpoint, run
from hvp.common.training.run import Run

AFTER, MOMENT = int(sys.argv[1]), sys.argv[2]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    def write(file: BinaryIO) -> None:
        whole = io.BytesIO()
        torch.save(content, whole)
        file.write(whole.getbuffer()[: len(whole.getbuffer()) // 2])
        file.flush()
        die()

    checkpoint.write_atomically(path, write, previous)


def prepare() -> None:
    if MOMENT == "writing":
        run.save_checkpoint = write_half
    else:
        threading.Timer(float(MOMENT), die).start()


def recording(self: Run, **values: Any) -> None:
    record(self, **values)
    if self.step + 1 == AFTER:
        prepare()


if __name__ == "__main__":
    record, Run.record = Run.record, recording  # type: ignore[method-assign]
    if AFTER == 0:
        prepare()
    sys.argv = ["hvp", *sys.argv[3:]]
    main()
