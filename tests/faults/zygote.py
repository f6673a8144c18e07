"""A Python process with PyTorch and hvp imported that forks a command for each line it reads.

A new process spends two to three seconds on imports. One forked from here starts at once and is an ordinary process
from then on: it reaches the end of this file, so Python shuts down in it as usual.

    line in                                             lines out
    {"arguments", "log", "disk", "limits"}              {"pid"}, then {"code"} when the process has ended

Only one command runs at a time.
"""

import gc
import json
import os
import resource
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from hvp.methods import METHODS
from tests.faults import disks

MODULES = (
    *(f"hvp.methods.{name}" for name in METHODS),
    *("hvp.cli.main", "hvp.cli.start", "hvp.common.evaluation.knn", "torch.utils.tensorboard"),
    "hvp.common.convert.runs",
)
"""Modules that the commands import."""


def serve() -> bool:
    """Fork a process for each request; return True in each, once it is set up, and False here, after the last."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    print(json.dumps({"ready": True}), file=answers)
    while line := sys.stdin.readline():
        ready, set_up = os.pipe()
        pid = os.fork()
        if pid == 0:
            answers.close()
            os.close(ready)
            become(json.loads(line))
            os.close(set_up)
            return True
        os.close(set_up)
        os.read(ready, 1)  # returns when the process has closed its side; signals reach a command from here on
        os.close(ready)
        print(json.dumps({"pid": pid}), file=answers)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=answers)
    return False


def become(request: dict[str, Any]) -> None:
    """Turn this process into a command with its own session, output, arguments and disk."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(number, target)
    sys.argv = ["hvp", *request["arguments"]]
    if request["disk"] is not None:
        disks.install(**request["disk"])
    for name, limit in request["limits"].items():
        number = getattr(resource, f"RLIMIT_{name}")
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if name == "AS" else 0
        resource.setrlimit(number, (has + limit,) * 2)


if __name__ == "__main__":
    for module in MODULES:
        import_module(module)
    gc.freeze()  # otherwise every process spends two seconds at its end collecting these imports
    if serve():
        from hvp.cli.main import main

        main()
