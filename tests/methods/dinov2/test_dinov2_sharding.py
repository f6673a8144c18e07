"""DINOv2 with student, teacher and optimiser sharded over two processes (FSDP2), against one process with all."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from hvp.common.evaluation.checkpoints import load_encoder
from hvp.common.training import sharding
from hvp.common.training.checkpoint import load_checkpoint
from hvp.methods.dinov2 import main_dinov2
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.main_dinov2 import train_dinov2
from tests import runs
from tests.processes import as_rank, start_two
from tests.runs import killed_at, rows_of, tiny

# tests/common/training/test_training_sharding.py tests the mechanism; whole runs take a minute.
pytestmark = pytest.mark.slow

# For the values that make two processes compute what one does, see test_every_method.py.
SMALL = {
    **runs.SMALL,
    "data.shapes.train": 16,
    "train.epochs": 2,
    "train.save_every": 1,
    "train.sharding": "fsdp",
    "optim.warmup_epochs": 0,
    "optim.layerwise_decay": 0.7,
    "optim.clip_grad": 0.3,
    "ibot.mask_sample_probability": 1.0,
    "ibot.mask_ratio_min_max": [0.3, 0.3],
    "dino.koleo_loss_weight": 0.0,
    "rescue.enabled": True,
    "rescue.k": 8,
}
RUNS: list[tuple[str, dict[str, Any], bool]] = [
    ("whole", {}, False),
    ("parts", {"train.accumulate": 2}, False),
    ("stopped", {}, True),
    ("stopped", {}, False),
]
"""Runs of the two processes: name, changes, and whether it is killed in its third step. An existing run is resumed."""


def train(out: Path, changes: dict[str, Any]) -> None:
    config = tiny(DINOv2Config, "dinov2", SMALL, changes)
    train_dinov2(config, out, console=Console(quiet=True), resume=out.exists())


SHARED: list[float] = []


def sharing_half(units: Iterable[sharding.Unit], *place: Any) -> None:
    """Call `shard()`, and note the share of the parameters left in this process."""
    units = list(units)
    sharding.shard(units, *place)
    parameters = {p for module, _ in units for p in module.parameters()}
    SHARED.append(sum(p.numel() for p in sharding.local(parameters)) / sum(p.numel() for p in parameters))


def process(rank: int, ports: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    for port, (name, changes, killed) in zip(ports, RUNS, strict=True):
        with as_rank(rank, port) as patch:
            patch.setattr(main_dinov2, "shard", sharing_half)
            with killed_at(3) if killed else nullcontext():
                train(Path(folder) / name, changes)
            if killed:
                dist.destroy_process_group()
            assert SHARED.pop() == SHARED.pop() < 0.6, "of student and teacher"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder with a run in one process, `one`, and with those of RUNS."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "one", {})
    start_two(process, len(RUNS), str(folder))
    return folder


@pytest.mark.parametrize("name", ["whole", "parts"])
def test_two_processes_with_a_share_each_compute_what_one_does(folder, name):
    for ours, theirs in zip(rows_of(folder / name), rows_of(folder / "one"), strict=True):
        for key in ("loss", "loss_patch", "strong_similarity"):
            # Sinkhorn-Knopp balances targets over the images of a part
            tolerance = 1e-5 if name == "whole" else 0.1
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), (ours["step"], key)
        if name == "whole":
            assert ours["kept_hist"] == theirs["kept_hist"]
            # measured over the images of one process, so not equal
            assert ours["spread"] == pytest.approx(theirs["spread"], rel=0.15)


def test_a_checkpoint_holds_the_whole_state(folder):
    sharded, one = (load_checkpoint(folder / name / "last.pt") for name in ("whole", "one"))
    for network in ("student", "teacher"):
        assert sharded[network].keys() == one[network].keys()
        for name, value in one[network].items():
            # Adam's first steps are signs of gradients, of which some are rounding
            torch.testing.assert_close(sharded[network][name], value, rtol=0, atol=2e-3, msg=name)
    groups = [
        [{key: len(value) if key == "params" else value for key, value in group.items()} for group in content]
        for content in (sharded["optimizer"]["param_groups"], one["optimizer"]["param_groups"])
    ]
    assert groups[0] == groups[1]
    for number, state in one["optimizer"]["state"].items():
        assert sharded["optimizer"]["state"][number]["exp_avg_sq"].shape == state["exp_avg_sq"].shape
    encoder, _ = load_encoder(folder / "whole")
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 96)


def test_a_resumed_run_equals_the_uninterrupted_one(folder):
    a, b = (load_checkpoint(folder / name / "last.pt") for name in ("stopped", "whole"))
    for part in ("student", "teacher", "dinov2_loss"):
        for name, value in b[part].items():
            assert torch.equal(a[part][name], value), name
    for number, state in b["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(a["optimizer"]["state"][number][key], value)


def test_a_run_resumes_with_another_number_of_processes(folder, monkeypatch):
    """One process, where nothing is sharded."""
    monkeypatch.setattr(sharding, "fully_shard", None)
    checkpoint = folder / "stopped" / "previous.pt"
    assert load_checkpoint(checkpoint)["step"] == 3
    (folder / "alone").mkdir()
    (folder / "alone" / "last.pt").write_bytes(checkpoint.read_bytes())
    train(folder / "alone", {"train.sharding": "ddp"})
    (last,) = rows_of(folder / "alone")
    assert last["loss"] == pytest.approx(rows_of(folder / "whole")[-1]["loss"], rel=1e-5)
