"""`hvp pretrain --devices 2` against the same run in one process. For torchrun see test_every_method.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from hvp.common.training.checkpoint import load_checkpoint

HVP = str(Path(sys.executable).with_name("hvp"))
QUICK = [
    *("pretrain", "dino", "--preset", "tiny", "--epochs", "2", "--batch-size", "8", "--workers", "1"),
    *("--set", "data.shapes.train=40", "--set", "data.shapes.size=32", "--set", "optim.warmup_epochs=1"),
    *("--set", "model.use_bn_in_head=false", "--set", "train.log_every=1", "--set", "selection.start=0"),
]


def command(*arguments: object, code: int = 0) -> str:
    """Run the command and return its stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([HVP, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    return done.stderr


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_close_runs(one: Path, two: Path) -> None:
    """Check that losses, selections and centres of 10 steps are close.

    Tolerance: a loss is a mean of float32 numbers near 4 that are summed in another order, a few units of rounding,
    1.2e-7 each, relative. The optimiser carries such differences on, and AdamW divides by gradients, so those of 10
    steps pile up: 1e-5 relative leaves room for that, and no room for another batch, view or combination, which move
    the third digit. The selection compares sums of losses, so it is equal unless two combinations tie within rounding.
    """
    assert len(rows(one)) == len(rows(two)) == 10
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["kept_loss"] == pytest.approx(b["kept_loss"], rel=1e-5)
        assert a["kept_hist"] == b["kept_hist"]
        assert a["lr"] == b["lr"]
    centers = [load_checkpoint(out / "last.pt")["dino_loss"]["center"] for out in (one, two)]
    # logits near 1 whose signs differ, so absolute; AdamW's first steps are of size lr whatever the gradient's
    torch.testing.assert_close(*centers, rtol=1e-4, atol=1e-5)


def test_two_devices_train_like_one_and_one_can_resume(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    command(*QUICK, "--out", one)
    stderr = command(*QUICK, "--out", two, "--devices", "2", "--set", "train.keep_every=1")
    assert stderr.count("going on") == 0
    assert_close_runs(one, two)
    state = load_checkpoint(two / "last.pt")
    assert len(state["processes"]) == 2
    assert not torch.equal(state["processes"][0]["torch"], state["processes"][1]["torch"])
    # the first epoch alone, as a run that was stopped there leaves it; the order of the images stays
    (two / "epoch0001.pt").replace(two / "last.pt")
    assert "continuing after step 5 of 10" in command("resume", two)
    assert_close_runs(one, two)


def test_an_error_in_one_process_stops_all_with_one_message(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(16):
        Image.new("RGB", (40, 40), (i * 10, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "7.png").write_bytes(b"no picture")
    arguments = [*QUICK, "--data", tmp_path / "images", "--out", tmp_path / "run", "--devices", "2"]
    stderr = command(*arguments, code=2)
    assert stderr.count("hvp:") == 1
    assert "Traceback" not in stderr
    assert "7.png" in stderr
    assert "--on-bad-image skip" in stderr
    # an error of every process is reported once, too, before any work
    stderr = command(*QUICK, "--batch-size", "9", "--out", tmp_path / "b", "--devices", "2", code=2)
    assert stderr.count("hvp:") == 1
    assert "Set a multiple of 2" in stderr
    assert not (tmp_path / "b").exists()
