"""Bodies of tests that need two processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hvp.common.training.distributed import World, joined

Body = Callable[[World, Callable[[Any], None]], None]


def in_two_processes(body: Body, tmp_path: Path) -> list[list[Any]]:
    """Runs `body(world, say)` in two gloo processes; what each said, by rank. `body` is a function of a module."""
    # The store stands before the processes start, as it does under torchrun: a port that is looked for here and opened
    # by one of them there may be taken by then.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    mp.spawn(_process, (body, store.port, str(tmp_path)), nprocs=2)
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]


def _process(rank: int, body: Body, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**place, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
            patch.setenv(name, str(value))
        said: list[Any] = []
        with joined() as world:
            body(world, said.append)
    torch.save(said, f"{folder}/{rank}.pt")
