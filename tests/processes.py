"""Run the body of a test in two processes."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hvp.common.training.distributed import World, joined

Report = Callable[[Any], None]
Body = Callable[[World, Report], None]

# Imports take most of the time of such a test, so the processes are forked from a server that has done them.
MODULES = ["pytest", "hypothesis", "hvp.cli.main", "hvp.common.training.session", "torch.utils.tensorboard"]
multiprocessing.get_context("forkserver").set_forkserver_preload(MODULES)


def in_two_processes(body: Body, tmp_path: Path) -> list[list[Any]]:
    """Run `body(world, report)` in two gloo processes and return what each reported, by rank.

    Args:
        body: a module-level function or a `partial` of one. Environment variables set by the test do not reach it.
        tmp_path: folder for the reports.
    """
    start_two(_process, 1, body, str(tmp_path))
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]


def start_two(process: Callable[..., None], num_groups: int, *arguments: object) -> None:
    """Run `process(rank, ports, *arguments)` in two processes, with a port for each process group they will form.

    The rendezvous stores exist before the processes start, as under torchrun: a port found free here and opened there
    might be taken in between.
    """
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in range(num_groups)]
    mp.start_processes(process, ([store.port for store in stores], *arguments), nprocs=2, start_method="forkserver")


@contextmanager
def as_rank(rank: int, port: int) -> Iterator[pytest.MonkeyPatch]:
    """Set torchrun's environment variables for one of two processes; the test may add patches of its own."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**place, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
            patch.setenv(name, str(value))
        yield patch


def _process(rank: int, ports: list[int], body: Body, folder: str) -> None:
    torch.set_num_threads(1)
    reported: list[Any] = []
    with as_rank(rank, ports[0]), joined() as world:
        body(world, reported.append)
    torch.save(reported, f"{folder}/{rank}.pt")
