"""`--dry-run --measure`, and the advice when memory runs out."""

import errno
import os
import re
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hvp.cli.measure import _how_many, measure
from hvp.common.training import signals
from hvp.common.training.run import Run
from hvp.common.training.selecting import ViewSelector, selecting_steps
from hvp.methods import get_method
from hvp.methods.dino.config import DinoConfig

TINY = ["pretrain", "dino", "--preset", "tiny", "--workers", "0", "--device", "cpu"]
QUICK = [
    *("--set", "data.shapes.train=130", "--set", "data.shapes.val=20", "--set", "data.shapes.size=32"),
    *("--set", "optim.warmup_epochs=1", "--epochs", "3", "--batch-size", "8"),
]


def config_of(**changes: dict[str, object]) -> DinoConfig:
    """Return the configuration of a network that takes milliseconds, on 40 shapes."""
    tree: dict[str, dict[str, object]] = {
        "data": {"path": "shapes", "shapes": {"size": 32, "train": 40, "val": 10}, "workers": 0},
        "model": {"arch": "vit_micro", "patch_size": 8, "out_dim": 16, "head_hidden_dim": 16},
        "optim": {"warmup_epochs": 0},
        "views": {"global_crops_size": 16, "local_crops_size": 8, "local_crops_number": 2},
        "selection": {"local_candidates": 4},
        "train": {"epochs": 3, "batch_size": 8, "precision": "fp32", "device": "cpu"},
    }
    return DinoConfig.model_validate({key: {**tree.get(key, {}), **changes.get(key, {})} for key in tree})


def test_measuring_reports_both_kinds_of_step_and_leaves_nothing(hvp, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    ran = hvp(*TINY, *QUICK, "--out", "run", "--dry-run", "--measure")
    assert ran.code == 0, ran.err
    assert "Measured over 10 steps after 2 of warm-up, on cpu, no loader workers" in ran.out
    rows = {line[: line.index("  ", 3)].strip(): line.split() for line in ran.out.splitlines() if "  " in line[3:]}
    assert float(rows["images/s"][-2]) > 0
    assert rows["selecting"][-2] == "0%"
    assert rows["selecting"][-1] != "0%"
    assert re.fullmatch(r"\d+\.\d\d", rows["peak memory, this process"][-2])
    assert "whole run, 3 epochs" in rows
    assert "Of the run's 48 steps, 33 select" in ran.out
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert not any((tmp_path / "tmp").iterdir())


def test_an_interrupt_while_measuring_does_not_mention_the_deleted_folder(hvp, tmp_path, monkeypatch):
    record = Run.record
    acknowledged: list[str] = []

    def interrupted(self: Run, **values: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        record(self, **values)

    monkeypatch.setattr(Run, "record", interrupted)
    monkeypatch.setattr(Run, "save", None)
    monkeypatch.setattr(signals, "_write", acknowledged.append)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ran = hvp(*TINY, *QUICK, "--dry-run", "--measure")
    assert ran.code == 130
    assert ran.err.splitlines()[-1] == "hvp: SIGINT: stopped after step 1 of 48."
    assert "".join(acknowledged).strip() == "SIGINT: stopping after this step; press again to stop at once"
    assert not any(tmp_path.iterdir())


def test_the_cost_of_a_run_whose_every_step_selects(monkeypatch):
    stages: list[str] = []
    found = measure(get_method("dino").train, config_of(), on_stage=stages.append)
    assert (found.warmup_steps, found.steps, found.steps_per_epoch) == (2, 3, 5)  # no more than an epoch has
    assert stages == ["5 steps without hard views", "5 steps with hard views"]
    assert found.hard is not None
    assert found.hard_run_seconds == pytest.approx(15 * found.hard.seconds)
    assert found.selecting_steps == 15
    assert found.vanilla.images_per_s == pytest.approx(8 / found.vanilla.seconds)
    assert 0 <= found.hard.wait_share + found.hard.select_share <= 1
    assert found.hard.peak_memory > 2**20


def test_hard_views_that_cannot_be_sampled_are_left_out():
    config = config_of(selection={"hard_views": "none", "local_candidates": 1})
    found = measure(get_method("dino").train, config)
    assert found.hard is None
    assert "selection.local_candidates = 1" in found.reason


def test_steps_are_whole_bursts_of_the_loader():
    assert _how_many(1000, 0) == (2, 10)
    assert _how_many(1000, 4) == (4, 12)
    assert _how_many(1000, 16) == (16, 16)
    assert _how_many(10, 16) == (5, 5)
    assert _how_many(1, 1) == (0, 1)


@pytest.mark.parametrize(("start", "every"), [(0.0, 1), (0.3, 1), (0.25, 3), (1.0, 2)])
def test_selecting_steps_are_those_of_the_trainer(start, every):
    config = config_of(selection={"start": start, "every": every})
    selector, count = ViewSelector(config, 101), selecting_steps(config.selection, 101)
    for done in range(102):
        assert count(done) == sum(selector.acts_on(step) for step in range(done, 101))


def test_measuring_needs_a_dry_run(hvp, tmp_path):
    ran = hvp(*TINY, *QUICK, "--measure")
    assert ran.code == 2
    assert "--measure needs --dry-run" in ran.err
    assert not any(tmp_path.iterdir())


def test_measuring_needs_images(hvp):
    ran = hvp("pretrain", "dino", "--dry-run", "--measure")
    assert ran.code == 2
    assert "nothing to measure without images" in ran.err


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.58 GiB of which 17 MiB is free. "
    "Of the allocated memory 14.16 GiB is allocated by PyTorch, and more advice."
)
CPU = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (
            torch.OutOfMemoryError(CUDA),
            "out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.58 GiB"
            " of which 17 MiB is free.\n",
            ["train.accumulate=2 ", "--precision bf16 ", "--batch-size 4 "],
        ),
        (
            RuntimeError("CUDA error: out of memory"),
            "out of GPU memory",
            ["train.accumulate=2 ", "--precision bf16 ", "--batch-size 4 "],
        ),
        (RuntimeError(CPU), "out of host memory", ["train.accumulate=2 ", "--workers 3 ", "--batch-size 4 "]),
        (MemoryError(), "out of host memory.\n", ["train.accumulate=2 ", "--workers 3 ", "--batch-size 4 "]),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of host memory", ["--workers 3 "]),
    ],
)
def test_running_out_of_memory_names_the_settings_to_lower(hvp, monkeypatch, error, message, settings):
    def train(*_: object, **__: object) -> Path:
        raise error

    monkeypatch.setattr("hvp.methods.dino.METHOD", replace(get_method("dino"), train=train))
    ran = hvp(*TINY, *QUICK, "--workers", "6", "--out", "run")
    assert ran.code == 2
    assert ran.err.startswith(f"hvp: {message}")
    places = [ran.err.index(setting) for setting in settings]
    assert places == sorted(places)
    assert "(now 8; also changes the learning rate" in ran.err


def test_other_errors_are_not_reported_as_memory_errors(hvp, monkeypatch):
    def train(*_: object, **__: object) -> Path:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("hvp.methods.dino.METHOD", replace(get_method("dino"), train=train))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        hvp(*TINY, *QUICK, "--out", "run")
