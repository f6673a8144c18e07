"""A run's log: its rows, TensorBoard events and one line per epoch, also when the run is resumed."""

import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

from hvp.common.training.log import Events, RunLog
from hvp.common.training.precision import Precision
from hvp.common.training.progress import Progress
from hvp.common.training.run import Run
from hvp.methods.dino.config import DinoConfig
from hvp.methods.dino.main_dino import train_dino
from tests.runs import killed_at, rows_of

STEPS, STEPS_PER_EPOCH, BATCH = 15, 5, 4
CONFIG: dict[str, dict[str, Any]] = {
    "data": {"path": "shapes", "shapes": {"size": 32, "train": 20, "val": 10}, "workers": 0},
    "model": {"arch": "vit_micro", "patch_size": 8, "out_dim": 16, "head_hidden_dim": 16},
    "optim": {"warmup_epochs": 0},
    "views": {"global_crops_size": 16, "local_crops_size": 8, "local_crops_number": 2},
    "selection": {"local_candidates": 4},
    "rescue": {"enabled": True, "k": 2},
    "train": {"epochs": 3, "batch_size": BATCH, "precision": "fp32", "device": "cpu", "log_every": 2},
}


def train(out: Path, *, resume: bool = False, **train_changes: Any) -> str:
    """Train for 15 steps with hard views and Rescue, and return the output."""
    config = DinoConfig.model_validate({**CONFIG, "train": {**CONFIG["train"], **train_changes}})
    said = io.StringIO()
    train_dino(config, out, console=Console(file=said, width=200), resume=resume)
    return said.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A run that logs every step, and its output."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train(out, log_every=1)


def epoch_lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if re.match(r"epoch \d+/", line)]


def test_a_run_starts_with_a_summary(whole):
    out, said = whole
    assert said.splitlines()[:5] == [
        f"output:     {out}",
        "device:     cpu, fp32, 1 process",
        said.splitlines()[2],
        "images:     shapes (train, 20 images)",
        "steps:      15: 3 epochs of 5, 4 images each",
    ]
    trained, everything = map(float, re.findall(r"[\d.]+", said.splitlines()[2]))
    # student and teacher are alike, but some of the prototypes are fixed
    assert 0 < trained <= everything / 2


def test_one_line_per_epoch_stays(whole):
    out, said = whole
    losses = [row["loss"] for row in rows_of(out)]
    lines = epoch_lines(said)
    for number, line in enumerate(lines):
        mean = sum(losses[number * STEPS_PER_EPOCH : (number + 1) * STEPS_PER_EPOCH]) / STEPS_PER_EPOCH
        assert re.fullmatch(rf"epoch {number + 1}/3: loss {mean:.4f}, 5 steps in 0:00:\d\d, \d+(\.\d)? images/s", line)
    assert len(lines) == 3


def test_the_progress_line_and_the_rows_agree_on_the_epoch(whole):
    out, said = whole
    last = rows_of(out)[-1]
    assert (last["step"], last["epoch"]) == (STEPS, 3)
    assert re.search(rf"^step {STEPS}/{STEPS}  left 0:00:00  loss {last['loss']:.4f}  epoch 3/3 ", said, re.MULTILINE)


def test_a_resumed_run_continues_its_clock_and_its_epoch(whole, tmp_path):
    """Stopped after step 7, in the middle of an epoch and between two rows."""
    with killed_at(8):
        train(tmp_path / "run", save_every=7)
    before = rows_of(tmp_path / "run")
    assert [row["step"] for row in before] == [2, 4, 6]
    lines = epoch_lines(train(tmp_path / "run", resume=True))
    rows = rows_of(tmp_path / "run")
    assert rows[:3] == before
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert [row["epoch"] for row in rows] == [1, 1, 2, 2, 2, 3, 3, 3]
    # the epoch's mean covers all of its steps, its time only those since the resume
    expected = epoch_lines(whole[1])
    assert [line.partition(",")[0] for line in lines] == [line.partition(",")[0] for line in expected[1:]]
    assert "3 steps in" in lines[0]
    # the clock continues from the last row, and the next row's seconds cover step 8 alone
    seconds = rows[3]["seconds"] - before[-1]["seconds"]
    assert rows[3]["images_per_s"] * seconds == pytest.approx(BATCH)
    assert all(earlier["seconds"] < later["seconds"] for earlier, later in pairwise(rows))


def test_rows_of_an_earlier_version_get_the_later_epoch_numbers(tmp_path):
    old: list[dict[str, float]] = [{"step": 5, "epoch": 0, "loss": 3.0}, {"step": 10, "epoch": 1, "loss": 2.0}]
    new = [{"step": 15, "epoch": 3, "loss": 1.5, "seconds": 4.0}, {"step": 16, "epoch": 4, "loss": 1.0, "seconds": 5.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in old + new))
    for _ in range(2):  # resumed twice
        progress = Progress(Console(), total_steps=20, epochs=4, first_step=15, selecting_steps=lambda step: 0)
        with RunLog(tmp_path, progress, config="", steps_per_epoch=5, first_step=15) as log:
            assert log.seconds == 4.0
        assert [(row["step"], row["epoch"]) for row in rows_of(tmp_path)] == [(5, 1), (10, 2), (15, 3)]


def test_a_row_has_the_gradient_norm_before_clipping(tmp_path, monkeypatch):
    unscale, norms = Precision.unscale, []

    def unscaled(precision: Precision, optimizer: torch.optim.Optimizer) -> None:
        unscale(precision, optimizer)
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())

    monkeypatch.setattr(Precision, "unscale", unscaled)
    train(tmp_path / "run", log_every=1, epochs=1)
    assert [row["grad_norm"] for row in rows_of(tmp_path / "run")] == pytest.approx(norms, rel=1e-5)


def test_a_step_skipped_by_fp16_has_no_gradient_norm(tmp_path, monkeypatch):
    check = Run._check

    def checked(run: Run, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
        mean = check(run, loss, optimizer)
        run.grad_norm = None if run.step == 1 else run.grad_norm
        return mean

    monkeypatch.setattr(Run, "_check", checked)
    train(tmp_path / "run", log_every=1, epochs=1)
    assert ["grad_norm" in row for row in rows_of(tmp_path / "run")] == [True, False, True, True, True]


def events(folder: Path) -> list[Any]:
    return [event for file in sorted(folder.iterdir()) for event in EventFileLoader(str(file)).Load()]


def test_tensorboard_groups_the_values_of_the_rows(whole):
    out, _ = whole
    written = events(out / "tensorboard")
    tags = {value.tag for event in written for value in event.summary.value}
    assert tags == {
        "config",
        *(f"train/{name}" for name in ("epoch", "loss", "lr", "weight_decay", "momentum", "spread")),
        *(f"time/{name}" for name in ("seconds", "images_per_s", "wait_share", "select_share")),
        *(f"select/{name}" for name in ("kept_hist", "kept_loss", "no_finite_loss")),
        *(f"rescue/{name}" for name in ("easy_similarity", "strong_similarity")),
        "memory/peak_memory",
    } | ({"train/grad_norm"} & tags)
    losses = [tensor_util.make_ndarray(v.tensor) for e in written for v in e.summary.value if v.tag == "train/loss"]
    assert losses == pytest.approx([row["loss"] for row in rows_of(out)])
    (text,) = (v for e in written for v in e.summary.value if v.tag == "config")
    assert text.metadata.plugin_data.plugin_name == "text"
    shown = tensor_util.make_ndarray(text.tensor).item().decode()
    assert re.sub("(?m)^    ", "", shown) == (out / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("shares", "buckets"),
    [
        ([0.5, 0.25, 1.0, 0.25], [(-0.5, 0.5, 0.5), (0.5, 1.5, 0.25), (1.5, 2.5, 1.0), (2.5, 3.5, 0.25)]),
        ([0.0, 0.75, 0.0, 1.25, 0.0], [(0.5, 1.5, 0.75), (1.5, 2.5, 0.0), (2.5, 3.5, 1.25)]),
    ],
)
def test_kept_views_become_a_histogram(tmp_path, shares, buckets):
    log = Events(tmp_path / "tensorboard", config="", first_step=0)
    log.add(1, {"kept_hist": shares})
    log.close()
    (value,) = events(tmp_path / "tensorboard")[-1].summary.value
    assert value.metadata.plugin_data.plugin_name == "histograms"
    read = tensor_util.make_ndarray(value.tensor)
    filled = [row for row in read.tolist() if row[0] < row[1]]  # TensorBoard pads to a fixed number of buckets
    assert [tuple(row) for row in filled] == buckets
