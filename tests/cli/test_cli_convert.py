"""`hvp convert`: to an upstream's format, to libraries, and back to a run."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hvp.common.networks.resnet import CONVNETS
from hvp.common.training.checkpoint import load_checkpoint, save_checkpoint

SMALL = ("--data", "shapes", "--epochs", 2, "--batch-size", 8, "--workers", 0, "--set", "data.shapes.train=16")
SMALLER = (
    "--set",
    "data.shapes.val=8",
    "--set",
    "data.shapes.size=32",
    "--set",
    "train.keep_every=1",
    "--set",
    "model.drop_path_rate=0.0",
)


@pytest.fixture
def run(hvp: Callable[..., Any], tmp_path: Path) -> Path:
    """Two epochs of DINO's tiny preset, each of two steps."""
    ran = hvp(
        *("pretrain", "dino", "--preset", "tiny", *SMALL, *SMALLER, "--set", "optim.warmup_epochs=1", "--out", "run")
    )
    assert ran.code == 0, ran.err
    return tmp_path / "run"


def test_a_run_survives_conversion_to_upstream_and_back(run: Path, hvp: Callable[..., Any], tmp_path: Path) -> None:
    """Convert the first epoch's checkpoint; the run resumed from it ends like the uninterrupted one."""
    there = hvp("convert", run / "epoch0001.pt", "--to", "upstream", "--out", "up.pth")
    assert there.code == 0, there.err
    assert "random state: the upstream saves none" in " ".join(there.out.split())
    assert "wrote up.pth" in there.out
    about = json.loads((tmp_path / "up.pth.meta.json").read_text())
    assert (about["layout"], about["method"], about["epoch"], about["step"]) == ("facebookresearch/dino", "dino", 1, 2)
    content = torch.load("up.pth", weights_only=True)
    assert content["epoch"] == 1
    # as in a checkpoint of the upstream
    content["args"] = argparse.Namespace(arch="vit_small", epochs=2)
    for group in content["optimizer"]["param_groups"]:
        group["lr"] = np.float64(group["lr"])
    torch.save(content, "up.pth")

    back = hvp(
        "convert", "up.pth", "--from", "upstream", "--method", "dino", "--config", run / "config.yaml", "--out", "back"
    )
    assert back.code == 0, back.err
    assert "note: the upstream trained with arch = vit_small, the run continues with model.arch = vit_micro" in back.out
    assert hvp("eval", "knn", "back", "--data", "shapes", "--workers", 0, "--k", 1).code == 0
    resumed = hvp("resume", "back", "--workers", 0)
    assert resumed.code == 0, resumed.err
    whole, again = load_checkpoint(run / "last.pt"), load_checkpoint(tmp_path / "back" / "last.pt")
    assert whole["step"] == again["step"] == 4
    for part in ("student", "teacher", "dino_loss"):
        for key, value in whole[part].items():
            assert torch.equal(again[part][key], value), (part, key)


def test_a_backbone(run: Path, hvp: Callable[..., Any], tmp_path: Path) -> None:
    ran = hvp("convert", "run", "--to", "safetensors", "--which", "student", "--out", "b.safetensors")
    assert ran.code == 0, ran.err
    assert "load with: " in ran.out
    expected = load_checkpoint(run / "last.pt")["student"]
    for key, value in load_file("b.safetensors").items():
        assert torch.equal(expected[f"backbone.{key}"], value)
    refused = hvp("convert", "run", "--to", "timm", "--out", "b.pth")
    assert refused.code == 2
    assert "timm has no network like this one" in refused.err
    assert "--to safetensors" in refused.err
    assert not (tmp_path / "b.pth").exists()


@pytest.mark.parametrize(("to", "out"), [("upstream", "up.pth"), ("safetensors", "b.safetensors"), ("timm", "b.pth")])
def test_a_converted_network_scores_as_before(to: str, out: str, request: Any, hvp: Any, tmp_path: Path) -> None:
    """Same image size, same sampling, same probe."""
    if to == "timm":  # timm has no network like the demo's
        encoder = CONVNETS["resnet50"]()
        weights = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
        config = {"views": {"crop_size": 36}, "data": {"path": "shapes", "shapes": {"size": 32, "train": 8, "val": 4}}}
        content = {"method": "simsiam", "config": config, "epoch": 1, "step": 2, "model": weights}
        (tmp_path / "run").mkdir()
        save_checkpoint(tmp_path / "run" / "last.pt", content)
    else:
        request.getfixturevalue("run")
    assert hvp("convert", "run", "--to", to, "--out", out).code == 0
    common = ("--data", "shapes", "--workers", 0)
    results = []
    for file in ("run", out):
        for arguments in (("knn", file, "--k", 3), ("linear", file, "--no-augment", "--epochs", 1)):
            ran = hvp("eval", *arguments, *common, "--out", "result.json")
            assert ran.code == 0, ran.err
            results.append(json.loads(Path("result.json").read_text()))
    for before, after in zip(results[:2], results[2:], strict=True):
        assert before["settings"] == after["settings"]
        assert before["train"] == after["train"]
        for key in ("results", "last", "history"):
            assert before.get(key) == after.get(key)
        assert before["checkpoint"]["weights"] == after["checkpoint"]["weights"]
        assert after["checkpoint"]["described_in"] == f"{out}.meta.json"


def test_existing_files_are_kept(run: Path, hvp: Callable[..., Any], tmp_path: Path) -> None:
    convert = ("convert", "run", "--to", "safetensors", "--out", "b.safetensors")
    (tmp_path / "b.safetensors").write_text("mine")
    refused = hvp(*convert)
    assert refused.code == 2
    assert "b.safetensors: exists" in refused.err
    assert (tmp_path / "b.safetensors").read_text() == "mine"
    assert hvp(*convert, "--overwrite").code == 0
    assert load_file("b.safetensors")
    before = (run / "last.pt").read_bytes()
    same = hvp("convert", "run", "--to", "upstream", "--out", "run/last.pt", "--overwrite")
    assert same.code == 2
    assert "is the file to convert" in same.err
    assert (run / "last.pt").read_bytes() == before
    into = ("convert", "run/last.pt", "--from", "upstream", "--method", "dino", "--preset", "tiny", "--data", "shapes")
    assert "is not empty" in hvp(*into, "--out", "run").err


def test_files_that_do_not_match_are_refused(run: Path, hvp: Callable[..., Any], tmp_path: Path) -> None:
    assert hvp("convert", "run", "--to", "upstream", "--out", "up.pth").code == 0
    back = ("convert", "up.pth", "--from", "upstream", "--out", "back", "--data", "shapes")
    for arguments, message in [
        (("--method", "simsiam", "--preset", "tiny"), "up.pth: has no state_dict; it has: student, teacher"),
        (("--method", "dino", "--preset", "tiny", "--set", "model.out_dim=17"), "other shapes"),
        (("--method", "dino", "--preset", "vits16-100ep"), "Give the preset or the configuration"),
        (("--method", "dyno", "--preset", "tiny"), "unknown method dyno. Did you mean dino?"),
        (
            ("--method", "dino", "--preset", "tiny", "--set", "train.epochs=1"),
            "2 epochs are finished, but train.epochs = 1",
        ),
    ]:
        ran = hvp(*back, *arguments)
        assert ran.code == 2
        assert message in ran.err
        assert not (tmp_path / "back").exists()
    whole = (tmp_path / "up.pth").read_bytes()
    (tmp_path / "up.pth").write_bytes(whole[: len(whole) // 2])
    assert "is truncated, or not a checkpoint" in hvp(*back, "--method", "dino", "--preset", "tiny").err
    assert "is truncated, or not a checkpoint" in hvp("convert", "up.pth", "--to", "upstream", "--out", "b.pth").err
    assert "there is no such file" in hvp("convert", "nowhere.pth", "--to", "timm", "--out", "b.pth").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --to"),
        (("--to", "timm", "--from", "upstream"), "give either --to"),
        (("--to", "timm", "--preset", "tiny"), "--preset needs --from upstream"),
        (("--to", "upstream", "--which", "teacher"), "--which needs --to timm"),
        (("--from", "upstream"), "--from upstream needs --method"),
    ],
)
def test_options_that_do_not_combine(arguments: tuple[str, ...], message: str, hvp: Callable[..., Any]) -> None:
    ran = hvp("convert", "x.pth", "--out", "y.pth", *arguments)
    assert ran.code == 2
    assert message in ran.err


def test_file_names_must_have_the_right_suffix(run: Path, hvp: Callable[..., Any]) -> None:
    assert "must end in" in hvp("convert", "run", "--to", "safetensors", "--out", "b.pth").err
    assert "must end in" in hvp("convert", "run", "--to", "upstream", "--out", "b.safetensors").err
