"""Entries required in a checkpoint."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hvp.common.errors import UserError
from hvp.common.evaluation.checkpoints import read_backbone_state
from hvp.common.training import checkpoint
from hvp.common.training.checkpoint import DamagedCheckpoint, load_checkpoint, save_checkpoint, write_atomically

MISSING = object()


def whole() -> dict[str, Any]:
    """Return a checkpoint's entries as a run writes them."""
    moments = {"step": torch.tensor(7.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    return {
        "method": "simsiam",
        "config": {"views": {"crop_size": 32}, "data": {"path": "shapes", "shapes": {"train": 40}}},
        "step": 7,
        "epoch": 1,
        "steps_per_epoch": 5,
        "log": {"loss_sum": 1.5, "loss_count": 2},
        "processes": [{"torch": torch.get_rng_state(), "cuda": None, "skipped": ["a.jpg"]}],
        "data": {"name": "shapes (train, 40 images)", "images": 40},
        "versions": {"hvp": "0.1.0"},
        "precision": {"scaler": torch.amp.GradScaler("cpu").state_dict(), "skipped_steps": 0},
        "optimizer": {
            "state": {0: moments, 1: dict(moments)},
            "param_groups": [{"params": [0, 1, 2], "lr": 0.1, "weight_decay": 0.0}],
        },
        "model": {"backbone.conv1.weight": torch.zeros(2)},
    }


def changed(place: str, value: object) -> dict[str, Any]:
    content: Any = copy.deepcopy(whole())
    *above, key = [int(part) if part.isdecimal() else part for part in place.split("/")]
    inner = content
    for part in above:
        inner = inner[part]
    if value is MISSING:
        del inner[key]
    else:
        inner[key] = value
    return content


def test_a_whole_checkpoint_is_read(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [{}, {"precision": {"scaler": {}, "skipped_steps": 0}}, {"processes": []}]
    for changes in variants:
        save_checkpoint(tmp_path / "last.pt", {**whole(), **changes})
        assert load_checkpoint(tmp_path / "last.pt")["step"] == 7


def test_a_checkpoint_of_an_early_version_is_read(tmp_path: Path) -> None:
    """Early versions wrote no seal and no entry for the images."""
    content = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **changed("data", MISSING)}
    torch.save(content, tmp_path / "last.pt")
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 7


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        *[(key, MISSING, f"{key} is missing") for key in whole() if key not in ("data", "model")],
        *[(key, 1.5, key) for key in whole() if key != "model"],
        *[(key, torch.zeros(2), key) for key in whole() if key != "model"],
        ("version", None, "version is missing"),
        ("version", "1", "version is str"),
        ("step", float("nan"), "step: "),
        ("step", -1, "step: "),
        ("step", True, "step: "),
        ("step", 12, "epoch 1 at step 12, with 5 steps per epoch"),
        ("steps_per_epoch", 0, "steps_per_epoch: "),
        ("config/views", 3, "config.views: "),
        ("config/views/crop_size", "32", "config.views.crop_size: "),
        ("config/data/shapes", {"train": "many"}, "config.data.shapes.train: "),
        ("config/model", 3, "config.model: "),
        ("log/loss_sum", float("inf"), "log.loss_sum: "),
        ("log/loss_count", MISSING, "log.loss_count is missing"),
        ("log/epoch_loss_sum", "1.5", "log.epoch_loss_sum: "),
        ("log/epoch_loss_count", -1, "log.epoch_loss_count: "),
        ("processes/0/torch", torch.zeros(3), "processes.0.torch: is not a random generator's state"),
        ("processes/0/skipped", [1], "processes.0.skipped.0: "),
        ("precision/scaler", {"scale": 2.0}, "precision.scaler"),
        ("precision/scaler/_growth_tracker", "0", "precision.scaler"),
        ("precision/skipped_steps", MISSING, "precision.skipped_steps is missing"),
        ("optimizer/state", [], "optimizer.state: "),
        ("optimizer/state/9", {}, "has state for parameter 9, which is in no group"),
        ("optimizer/state/1/exp_avg", MISSING, "has a state without exp_avg"),
        ("optimizer/param_groups", {}, "optimizer.param_groups: "),
        ("optimizer/param_groups/0/params", MISSING, "optimizer.param_groups.0.params is missing"),
        ("optimizer/param_groups/0/lr", float("nan"), "optimizer.param_groups.0.lr: "),
        ("data/images", 0, "data.images: "),
    ],
)
def test_missing_entries_and_wrong_types_are_named(tmp_path: Path, place: str, value: object, said: str) -> None:
    save_checkpoint(tmp_path / "last.pt", changed(place, value))
    with pytest.raises(DamagedCheckpoint, match=r"last\.pt: is damaged: ") as caught:
        load_checkpoint(tmp_path / "last.pt")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["version", "method", "config", "step", "epoch"])
def test_an_evaluation_names_the_entry_it_cannot_use(tmp_path: Path, key: str) -> None:
    for value in (None, torch.zeros(2)):
        save_checkpoint(tmp_path / "last.pt", changed(key, value))
        with pytest.raises(DamagedCheckpoint, match=rf"last\.pt: is damaged: {key}"):
            read_backbone_state(tmp_path / "last.pt")


def test_a_folder_replaced_during_a_write(tmp_path: Path) -> None:
    """The other run's file is neither replaced nor deleted."""
    out = tmp_path / "run"
    out.mkdir()

    def replace(file: Any) -> None:
        file.write(b"ours")
        out.rename(tmp_path / "removed")
        out.mkdir()
        (out / ".last.pt.part").write_bytes(b"theirs")

    with pytest.raises(UserError, match=r"last\.pt: cannot be written: .*another folder has replaced .*run"):
        write_atomically(out / "last.pt", replace)
    assert os.listdir(out) == [".last.pt.part"]
    assert (out / ".last.pt.part").read_bytes() == b"theirs"
