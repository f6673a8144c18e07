"""DINOv2 in bfloat16 on two processes: the gradients of sharded networks (FSDP2) against those of DDP, and the bytes
that sharding moves."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hvp.common.config.resolving import read_yaml, resolve
from hvp.common.training.precision import Precision
from hvp.methods import get_preset
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.main_dinov2 import build_networks, train_dinov2

# Ten runs of two processes each.
pytestmark = pytest.mark.slow

SMALL = {
    "data.workers": 0,
    "data.shapes.train": 16,
    "data.shapes.size": 32,
    "train.batch_size": 8,
    "train.epochs": 1,
    "train.precision": "bf16",
    "selection.start": 0.0,
    # Combinations are scored as ever, but rounding does not choose among them; of images, all are rescued.
    "selection.policy": "random",
    "rescue.k": 8,
    "optim.warmup_epochs": 0,
}
CASES: dict[str, dict[str, Any]] = {
    "hard views": {"selection.hard_views": "hvp"},
    "rescue": {"selection.hard_views": "none", "rescue.enabled": True},
    "both": {"selection.hard_views": "hvp", "rescue.enabled": True},
    "both, in parts": {"selection.hard_views": "hvp", "rescue.enabled": True, "train.accumulate": 2},
    "float32": {"selection.hard_views": "hvp", "train.precision": "fp32"},
}
SHARDINGS = ("ddp", "fsdp")


def config_of(changes: dict[str, Any]) -> DINOv2Config:
    layers = [("preset", read_yaml(get_preset("dinov2", "tiny"))), ("small", SMALL), ("test", changes)]
    config: DINOv2Config = resolve(DINOv2Config, layers).config
    return config


def whole(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()  # clipping changes it


class Traffic(TorchDispatchMode):
    """Bytes of the whole tensors that this process takes part in gathering and reducing while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes
        elif function is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduced += args[1].nbytes
        return function(*args, **(kwargs or {}))


def process(rank: int, ports: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    runs = [(case, sharding) for case in CASES for sharding in SHARDINGS]
    found = {run: watched(rank, port, Path(folder), *run) for port, run in zip(ports, runs, strict=True)}
    torch.save(found, f"{folder}/{rank}.pt")


def watched(rank: int, port: int, folder: Path, case: str, sharding: str) -> tuple[list[list[Any]], list[Any]]:
    """The gradients of every step of a run, and the bytes gathered and reduced in it."""
    gradients: list[list[Tensor | None]] = []
    moved: list[tuple[int, int]] = []
    unscale = Precision.unscale
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch, Traffic() as traffic:
        for key, value in {**place, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
            patch.setenv(key, str(value))

        def seen(precision: Precision, optimizer: torch.optim.Optimizer) -> Any:
            moved.append((traffic.gathered, traffic.reduced))
            gradients.append([whole(p.grad) for group in optimizer.param_groups for p in group["params"]])
            traffic.gathered = traffic.reduced = 0
            return unscale(precision, optimizer)

        patch.setattr(Precision, "unscale", seen)
        config = config_of({**CASES[case], "train.sharding": sharding})
        train_dinov2(config, folder / f"{case}-{sharding}", console=Console(quiet=True))
    return gradients, moved


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[str, str], Any]:
    """Of the first process: the gradients of every step, and the bytes that it moved."""
    folder = tmp_path_factory.mktemp("runs")
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in CASES for _ in SHARDINGS]
    mp.spawn(process, ([store.port for store in stores], str(folder)), nprocs=2)
    loaded: dict[tuple[str, str], Any] = torch.load(folder / "0.pt")
    return loaded


@pytest.mark.parametrize("case", CASES)
def test_sharded_gradients_are_those_of_ddp(found, case):
    (ours, _), (theirs, _) = found[case, "fsdp"], found[case, "ddp"]
    assert len(ours) == len(theirs) == 2, "steps"
    # Sharding rounds positions and gains to bfloat16, too: at most 5 % were seen here. A gradient that is missing or of
    # another step is off by 100 % and more.
    bound = 1e-5 if case == "float32" else 0.1
    for step, pairs in enumerate(zip(ours, theirs, strict=True)):
        for number, (sharded, replicated) in enumerate(zip(*pairs, strict=True)):
            assert sharded is not None, f"step {step}: parameter {number} has no gradient"
            assert sharded.dtype == torch.float32
            off = ((sharded - replicated).norm() / replicated.norm()).item()
            assert off <= bound, f"step {step}: parameter {number}"


@pytest.mark.parametrize("case", CASES)
def test_parameters_travel_once_a_step(found, case):
    _, moved = found[case, "fsdp"]
    student, teacher = build_networks(config_of(CASES[case]), torch.device("cpu"))
    numbers = sum(p.numel() for network in (student, teacher) for p in network.parameters())
    trained = sum(p.numel() for p in student.parameters())
    bytes_each = 4 if case == "float32" else 2
    for gathered, reduced in moved:
        # a unit whose parameters do not divide among the processes is padded
        assert numbers * bytes_each <= gathered <= 1.02 * numbers * bytes_each
        # FSDP hands on what the parts before the last have left when the first of a unit's backward passes ends
        assert 4 * trained <= reduced <= 1.02 * 4 * trained * (2 if "parts" in case else 1)
