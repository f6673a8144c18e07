"""The tests of checkpoint keys also work for networks that are not among our fixtures, and read all of them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet18

from hvp.common.networks.register_vision_transformer import build_register_vit
from tests.parity.fixtures import CHECKPOINT_KEYS, folder
from tests.parity.reference_models import described

pytestmark = pytest.mark.skipif("HVP_PARITY" in os.environ, reason="other networks are derived from our own fixtures")

Facts = dict[str, Any]
Entries = list[list[Any]]


@pytest.mark.slow
def test_other_networks_are_tested_as_well(tmp_path: Path) -> None:
    """ViT-Ti, ViT-B, ViT-g and both kinds of ResNet-18 are not among our fixtures."""
    ours = json.loads(gzip.decompress((folder() / f"{CHECKPOINT_KEYS}.json.gz").read_bytes()))
    others = other_models(ours["models"])
    assert not set(others) & set(ours["models"])
    data = tmp_path / "data"
    data.mkdir()
    content = json.dumps({**ours, "models": others}).encode()
    (data / f"{CHECKPOINT_KEYS}.json.gz").write_bytes(gzip.compress(content))
    tests = tmp_path / "tests" / "parity"
    tests.mkdir(parents=True)
    (tests.parent / "__init__.py").touch()
    for file in Path(__file__).parent.glob("*.py"):
        if file.name not in (Path(__file__).name, "test_unread_fixtures.py"):
            shutil.copy(file, tests)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-rA"],
        cwd=tmp_path,
        env=os.environ | {"HVP_PARITY": str(data)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "read by no test" not in run.stdout
    for model in others:
        assert f"PASSED tests/parity/test_parity_{family(model)}.py::test_" in run.stdout
        assert f"[{model}]" in run.stdout or f"-{model}]" in run.stdout, model


def other_models(models: dict[str, Facts]) -> dict[str, Facts]:
    """Facts of other networks as in `checkpoint_keys.json.gz`, by name."""
    found = {}
    for name, arch, factor in (("dino", "vit_base", 2), ("dino", "vit_tiny", 0.5), ("mocov3", "vit_base", 2)):
        found[f"{name}_{arch}"] = with_shapes(models[f"{name}_vit_small"], scaled(factor))
    for head in ("shared", "separate"):
        found[f"ibot_vit_base_{head}_head"] = with_shapes(models[f"ibot_vit_small_{head}_head"], scaled(2))
    found["dino_released_backbone_vit_base8"] = with_shapes(models["dino_released_backbone_vit_small16"], small_patches)
    found["simsiam_resnet18"] = on_resnet18(models["simsiam_resnet50"], "state_dict", "encoder")
    found["mocov3_resnet18"] = on_resnet18(models["mocov3_resnet50"], "state_dict", "base_encoder", "momentum_encoder")
    found["hvp_simclr_resnet18"] = on_resnet18(models["hvp_simclr_resnet50"], "model", "backbone")
    cifar = deepcopy(models["hvp_simsiam_resnet18_cifar"])
    found["hvp_simsiam_cifar_narrow"] = with_shapes(cifar, lambda name, shape: [256 if n == 2048 else n for n in shape])
    found["dinov2_released_vitg14"] = released_giant(models["dinov2_released_vitl14"])
    return found


def with_shapes(facts: Facts, change: Callable[[str, list[int]], list[int]]) -> Facts:
    """Change the shapes, keep the names."""
    facts = deepcopy(facts)
    for part, entries in facts["entries"].items():
        facts["entries"][part] = [[name, change(name, shape), dtype] for name, shape, dtype in entries]
    return facts


def scaled(factor: float) -> Callable[[str, list[int]], list[int]]:
    """Scale the widths of a ViT-S: 384, 3 x 384 and 4 x 384, which no head has."""
    return lambda name, shape: [int(n * factor) if n in (384, 1152, 1536) else n for n in shape]


def small_patches(name: str, shape: list[int]) -> list[int]:
    """Turn a ViT-S/16 into a ViT-B/8, at the same 224 pixels."""
    shape = scaled(2)(name, shape)
    if name == "pos_embed":
        return [1, 1 + 28 * 28, shape[2]]
    return [*shape[:2], 8, 8] if name == "patch_embed.proj.weight" else shape


def on_resnet18(facts: Facts, entry: str, *parts: str) -> Facts:
    """Put the same heads on torchvision's ResNet-18, which has 512 features instead of 2048."""
    facts = deepcopy(facts)
    entries: Entries = []
    for part in parts:
        with torch.device("meta"):
            backbone = [e for e in described(resnet18()) if not e[0].startswith("fc.")]
        entries += [[f"module.{part}.{name}", *rest] for name, *rest in backbone]
        head = [e for e in facts["entries"][entry] if e[0].startswith(f"module.{part}.fc.")]
        entries += [[name, narrowed(name, shape), dtype] for name, shape, dtype in head]
    others = [e for e in facts["entries"][entry] if not e[0].startswith(tuple(f"module.{part}." for part in parts))]
    entries += [[name, narrowed(name, shape), dtype] for name, shape, dtype in others]
    facts["entries"][entry] = entries
    return facts


def narrowed(name: str, shape: list[int]) -> list[int]:
    """Shape of a head's tensor for 512 features. SimSiam's hidden layers are as wide as the feature."""
    hidden = ("encoder.fc.0", "encoder.fc.1.", "encoder.fc.3", "encoder.fc.4.")
    if name.removeprefix("module.").startswith(hidden):
        return [512 if n == 2048 else n for n in shape]
    reads_feature = ("base_encoder.fc.0", "momentum_encoder.fc.0", "projector.layers.0", "encoder.fc.6")
    if name.removeprefix("module.").startswith(reads_feature) and len(shape) == 2:
        return [shape[0], 512]
    return shape


def released_giant(facts: Facts) -> Facts:
    """DINOv2's released ViT-g/14, which is wider and deeper and has gated feed-forward layers."""
    with torch.device("meta"):
        network = build_register_vit("vit_giant2", patch_size=14, img_size=518, swiglu=True)
    return {**facts, "entries": {"(file)": described(network)}}


def family(model: str) -> str:
    """Part of a test file's name that names the method of a model."""
    return model.removeprefix("hvp_").partition("_")[0]
