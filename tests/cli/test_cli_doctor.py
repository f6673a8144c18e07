"""`hvp doctor`: its findings and its advice."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from hvp.cli import checks as doctor
from hvp.cli.checks import check_cores, check_disk, check_packages, check_shared_memory
from hvp.common.config.resolving import read_yaml, resolve
from hvp.common.training.checkpoint import checkpoint_bytes, load_checkpoint
from hvp.methods import get_method, get_preset

Usage = namedtuple("Usage", "total used free")
TINY = ["doctor", "dino", "--preset", "tiny", "--set", "train.device=cpu"]
GIB = 2**30


@pytest.fixture
def pictures(tmp_path) -> Path:
    """40 images in one folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


def lines_of(report: str) -> dict[str, str]:
    """Return the status of each check in a printed report."""
    words = [line.split() for line in report.splitlines()]
    statuses = ("ok", "warning", "failure")
    # a check's name may have two words, of which the first tells them apart
    return {line[1]: line[0] for line in words if len(line) > 2 and line[0] in statuses}


def test_a_machine_without_a_run(hvp, tmp_path):
    ran = hvp("doctor")
    assert ran.code == 0
    assert lines_of(ran.out)["packages"] == "ok"
    assert f"PyTorch {torch.__version__}" in ran.out
    assert "free for runs" in ran.out
    assert not any(tmp_path.iterdir())


def test_a_run_that_fits(hvp, pictures, tmp_path):
    ran = hvp(*TINY, "--data", pictures, "--out", "there/run", "--json", "report.json")
    assert ran.code == 0, ran.out
    lines = lines_of(ran.out)
    assert lines.keys() >= {"packages", "precision", "cores", "shared", "dataset", "decoding", "bad", "disk"}
    assert "failure" not in lines.values()
    assert "no failures" in ran.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"]
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["dataset"]["images"] == checks["decoding"]["sample"] == 40
    assert checks["decoding"]["images_per_s_per_core"] > 0
    assert checks["bad files"]["bad"] == []
    assert not (tmp_path / "there").exists()


def test_bad_files_are_named(hvp, pictures):
    (pictures / "7.png").write_bytes((pictures / "7.png").read_bytes()[:40])
    (pictures / "x.jpg").write_text("no image")
    ran = hvp(*TINY, "--data", pictures)
    assert ran.code == 1
    assert lines_of(ran.out)["bad"] == "failure"
    assert "2 of 41" in ran.out
    assert str(pictures / "7.png") in ran.out
    assert f"{pictures / 'x.jpg'}: not an image" in ran.out
    assert "--on-bad-image skip" in ran.out
    ran = hvp(*TINY, "--data", pictures, "--set", "data.on_bad_image=skip")
    assert ran.code == 0
    assert lines_of(ran.out)["bad"] == "warning"


@pytest.mark.parametrize(
    ("arguments", "name", "message"),
    [
        (["--data", "nowhere"], "dataset", "nowhere: no such folder"),
        (["--data", "pictures", "--set", "train.batch_size=64"], "dataset", "A batch takes 64"),
        (["--data", "pictures", "--set", "train.precision=fp16"], "precision", "fp16 needs a GPU"),
        (["--data", "pictures", "--out", "file.txt"], "disk", "file.txt is a file"),
        (["--data", "pictures", "--out", "file.txt/run"], "disk", "file.txt is a file"),
    ],
)
def test_anything_that_would_stop_a_run_is_a_failure(hvp, pictures, tmp_path, arguments, name, message):
    (tmp_path / "file.txt").write_text("text")
    ran = hvp(*TINY, *arguments)
    assert ran.code == 1
    assert lines_of(ran.out)[name] == "failure"
    assert message in ran.out


def test_configuration_errors_are_those_of_pretrain(hvp):
    ran = hvp("doctor", "dino", "--preset", "tiney")
    assert ran.code == 2
    assert "Did you mean tiny?" in ran.err
    ran = hvp("doctor", "--preset", "tiny")
    assert ran.code == 2
    assert "hvp doctor dino" in ran.err


def test_the_report_stops_at_a_package_that_cannot_be_imported(hvp, monkeypatch):
    monkeypatch.setitem(doctor.PACKAGES, "hvp_has_no_such_module", "Nothing")
    assert check_packages().status == "failure"
    ran = hvp("doctor")
    assert ran.code == 1
    assert lines_of(ran.out) == {"packages": "failure"}
    assert "Nothing cannot be imported: No module named" in ran.out


def test_shared_memory_must_suffice_for_the_loader(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(64, 0, 64 * 2**20))
    small = check_shared_memory(tmp_path, 65 * 2**20, workers=8)
    assert small.status == "failure"
    assert "the loader needs up to 65 MiB" in small.found
    assert "(now 8)" in small.advice
    assert "--shm-size=1g" in small.advice
    assert check_shared_memory(tmp_path, 64 * 2**20, workers=8).status == "ok"
    assert check_shared_memory(tmp_path, None, workers=None).status == "ok"


def test_shared_memory_of_the_loader():
    config = resolve(get_method("dino").config, [("", {"data.workers": 4, "train.batch_size": 32})]).config
    image = 3 * (4 * 224**2 + 16 * 96**2)
    assert doctor._loader_bytes(config) == 9 * 32 * image  # 2 batches per worker and the current one
    parts = {"data.workers": 4, "train.batch_size": 32, "train.accumulate": 2}
    assert doctor._loader_bytes(resolve(get_method("dino").config, [("", parts)]).config) == 10 * 16 * image
    assert doctor._loader_bytes(resolve(get_method("dino").config, [("", {"data.workers": 0})]).config) == 0


@pytest.mark.parametrize(
    ("free", "kept", "status"),
    [(10, 0, "ok"), (3.5, 0, "warning"), (2.9, 0, "failure"), (10, 4, "ok"), (6.9, 4, "failure")],
)
def test_the_disk_must_suffice_for_the_checkpoints(monkeypatch, tmp_path, free, kept, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(100 * GIB, 0, int(free * GIB)))
    check = check_disk(tmp_path / "runs" / "new", GIB, kept=kept)
    assert check.status == status
    assert ("train.keep_every" in check.advice) == (status == "failure" and kept > 0)


def test_cores_respect_the_limit_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(32)), raising=False)
    monkeypatch.setattr(doctor, "CGROUP_QUOTA", tmp_path / "cpu.max")
    assert check_cores(16).found == "32 of 64 available, for 16 loader workers"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert check_cores(16).status == "ok"
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    check = check_cores(16)
    assert check.status == "warning"
    assert check.found.startswith("2.5 of 64")
    assert "--workers 2" in check.advice


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_size_of_a_checkpoint_is_known_before_it_is_written(tmp_path, optimizer):
    method = get_method("dino")
    changes: dict[str, object] = {"data.workers": 0, "data.shapes.train": 8, "train.batch_size": 8, "train.epochs": 1}
    changes |= {"optim.optimizer": optimizer, "optim.warmup_epochs": 0, "train.device": "cpu"}
    config = resolve(method.config, [("", read_yaml(get_preset("dino", "tiny"))), ("", changes)]).config
    with Console(quiet=True) as console:
        last = method.train(config, tmp_path / "run", console=console)
    content = load_checkpoint(last)
    # step counters of the optimiser, names and numbers come on top
    assert checkpoint_bytes(config, method.build_modules) == pytest.approx(last.stat().st_size, rel=0.02)
    assert content["step"] == 1
