"""DINOv2 with student, teacher and optimiser shared out among two processes (FSDP2), against one process with all."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

from hvp.common.config.resolving import read_yaml, resolve
from hvp.common.evaluation.checkpoints import load_encoder
from hvp.common.training import sharding
from hvp.common.training.checkpoint import load_checkpoint
from hvp.common.training.run import Run
from hvp.methods import get_preset
from hvp.methods.dinov2 import main_dinov2
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.main_dinov2 import train_dinov2

# tests/common/training/test_training_sharding.py has the mechanism; whole runs take a minute.
pytestmark = pytest.mark.slow

# What makes two processes do what one does: see test_every_method.py.
SMALL = {
    "data.workers": 0,
    "data.shapes.train": 16,
    "data.shapes.size": 32,
    "train.batch_size": 8,
    "train.epochs": 2,
    "train.log_every": 1,
    "train.save_every": 1,
    "train.sharding": "fsdp",
    "selection.start": 0.0,
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
"""Of the two processes: name, changes, and whether it ends in its third step; a run that is there is resumed."""


class Killed(Exception):
    pass


def train(out: Path, changes: dict[str, Any], *, stops: bool = False) -> None:
    layers = [("preset", read_yaml(get_preset("dinov2", "tiny"))), ("small", SMALL), ("test", changes)]
    config = resolve(DINOv2Config, layers).config
    record = Run.record

    def killed(run: Run, **values: Any) -> None:
        if stops and run.step == 2:
            raise Killed
        record(run, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "record", killed)
        train_dinov2(config, out, console=Console(quiet=True), resume=out.exists())


SHARED: list[float] = []


def sharing_half(units: Iterable[sharding.Unit], *place: Any) -> None:
    """`shard()`, which notes what share of the parameters is left here."""
    units = list(units)
    sharding.shard(units, *place)
    parameters = {p for module, _ in units for p in module.parameters()}
    SHARED.append(sum(p.numel() for p in sharding.local(parameters)) / sum(p.numel() for p in parameters))


def process(rank: int, ports: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost"}
    for port, (name, changes, stops) in zip(ports, RUNS, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            for key, value in {**place, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
                patch.setenv(key, str(value))
            patch.setattr(main_dinov2, "shard", sharing_half)
            try:
                train(Path(folder) / name, changes, stops=stops)
                assert not stops
            except Killed:
                dist.destroy_process_group()
            assert SHARED.pop() == SHARED.pop() < 0.6, "of student and teacher"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folders of a run in one process, and of those of RUNS."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "one", {})
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in RUNS]
    mp.spawn(process, ([store.port for store in stores], str(folder)), nprocs=2)
    return folder


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["whole", "parts"])
def test_two_processes_with_a_share_each_do_what_one_does(runs, name):
    for ours, theirs in zip(rows(runs / name), rows(runs / "one"), strict=True):
        for key in ("loss", "loss_patch", "strong_similarity"):
            # targets are balanced over the images of a part
            tolerance = 1e-5 if name == "whole" else 0.1
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), (ours["step"], key)
        if name == "whole":
            assert ours["kept_hist"] == theirs["kept_hist"]
            # of the images of a process each, so not the same number
            assert ours["spread"] == pytest.approx(theirs["spread"], rel=0.15)


def test_a_checkpoint_is_whole(runs):
    sharded, one = (load_checkpoint(runs / name / "last.pt") for name in ("whole", "one"))
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
    encoder, _ = load_encoder(runs / "whole")
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 96)


def test_a_resumed_run_is_the_uninterrupted_one(runs):
    a, b = (load_checkpoint(runs / name / "last.pt") for name in ("stopped", "whole"))
    for part in ("student", "teacher", "dinov2_loss"):
        for name, value in b[part].items():
            assert torch.equal(a[part][name], value), name
    for number, state in b["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(a["optimizer"]["state"][number][key], value)


def test_a_run_goes_on_with_another_number_of_processes(runs, monkeypatch):
    """Here alone, where nothing is shared out."""
    monkeypatch.setattr(sharding, "fully_shard", None)
    checkpoint = runs / "stopped" / "previous.pt"
    assert load_checkpoint(checkpoint)["step"] == 3
    (runs / "alone").mkdir()
    (runs / "alone" / "last.pt").write_bytes(checkpoint.read_bytes())
    train(runs / "alone", {"train.sharding": "ddp"})
    (last,) = rows(runs / "alone")
    assert last["loss"] == pytest.approx(rows(runs / "whole")[-1]["loss"], rel=1e-5)
