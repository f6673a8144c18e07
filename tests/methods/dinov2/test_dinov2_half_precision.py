"""DINOv2 in bfloat16 on two processes: gradients of sharded networks (FSDP2) against those of DDP, and the traffic of
sharding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hvp.common.training.precision import Precision
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.main_dinov2 import build_networks, train_dinov2
from tests import runs
from tests.processes import as_rank, start_two
from tests.runs import CPU, tiny

# Ten runs of two processes each.
pytestmark = pytest.mark.slow

SMALL = {
    **runs.SMALL,
    "data.shapes.train": 16,
    "train.epochs": 1,
    "train.precision": "bf16",
    # Combinations are scored but drawn at random, and all images are rescued, so rounding chooses nothing.
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


def whole(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()  # clipping changes it


class Traffic(TorchDispatchMode):
    """Bytes of the whole tensors that this process helps to gather and to reduce while this is active."""

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
    """Return the gradients of every step of a run, and the bytes gathered and reduced in each."""
    gradients: list[list[Tensor | None]] = []
    moved: list[tuple[int, int]] = []
    unscale = Precision.unscale
    with as_rank(rank, port) as patch, Traffic() as traffic:

        def seen(precision: Precision, optimizer: torch.optim.Optimizer) -> Any:
            moved.append((traffic.gathered, traffic.reduced))
            gradients.append([whole(p.grad) for group in optimizer.param_groups for p in group["params"]])
            traffic.gathered = traffic.reduced = 0
            return unscale(precision, optimizer)

        patch.setattr(Precision, "unscale", seen)
        config = tiny(DINOv2Config, "dinov2", SMALL, CASES[case], train__sharding=sharding)
        train_dinov2(config, folder / f"{case}-{sharding}", console=Console(quiet=True))
    return gradients, moved


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[str, str], Any]:
    """Gradients of every step and bytes moved, of the first process, by case and sharding."""
    folder = tmp_path_factory.mktemp("runs")
    start_two(process, len(CASES) * len(SHARDINGS), str(folder))
    loaded: dict[tuple[str, str], Any] = torch.load(folder / "0.pt")
    return loaded


@pytest.mark.parametrize("case", CASES)
def test_sharded_gradients_are_those_of_ddp(found, case):
    (ours, _), (theirs, _) = found[case, "fsdp"], found[case, "ddp"]
    assert len(ours) == len(theirs) == 2, "steps"
    # Sharding also rounds positions and gains to bfloat16; at most 5 % were seen here. A missing gradient, or one of
    # another step, is off by 100 % and more.
    bound = 1e-5 if case == "float32" else 0.1
    for step, pairs in enumerate(zip(ours, theirs, strict=True)):
        for number, (sharded, replicated) in enumerate(zip(*pairs, strict=True)):
            assert sharded is not None, f"step {step}: parameter {number} has no gradient"
            assert sharded.dtype == torch.float32
            off = ((sharded - replicated).norm() / replicated.norm()).item()
            assert off <= bound, f"step {step}: parameter {number}"


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_gathered_once_a_step(found, case):
    _, moved = found[case, "fsdp"]
    student, teacher = build_networks(tiny(DINOv2Config, "dinov2", SMALL, CASES[case]), CPU)
    numbers = sum(p.numel() for network in (student, teacher) for p in network.parameters())
    trained = sum(p.numel() for p in student.parameters())
    bytes_each = 4 if case == "float32" else 2
    for gathered, reduced in moved:
        # a unit whose parameters do not divide evenly is padded
        assert numbers * bytes_each <= gathered <= 1.02 * numbers * bytes_each
        # FSDP reduces what the earlier parts left when the first of a unit's backward passes ends
        assert 4 * trained <= reduced <= 1.02 * 4 * trained * (2 if "parts" in case else 1)
