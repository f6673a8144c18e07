"""The patched originals train on their own loaders and transforms, with the features of the patch on: two steps on the
CPU. Needs clones, in the folder that HVP_UPSTREAMS names."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hvp.common.config.resolving import resolve
from hvp.methods import get_method
from hvp.patches import get_adapter
from hvp.patches.patching import apply_patch, load_patch
from tests.upstreams import clone_of

MULTI_CROP = {
    "model.arch": "vit_tiny",
    "model.out_dim": 64,
    "views.local_crops_number": 2,
    "selection.local_candidates": 3,
    "loss.warmup_teacher_temp_epochs": 0,
    "optim.warmup_epochs": 0,
}
SMALL = {
    "dino": MULTI_CROP,
    "ibot": {**MULTI_CROP, "model.patch_out_dim": 64},
    "simsiam": {},
    "mocov3": {
        "optim.warmup_epochs": 0,
        "model.arch": "vit_small",
        "model.mlp_dim": 64,
        "optim.optimizer": "lars",
        "selection.hard_views": "none",
        "rescue.enabled": True,
        "rescue.k": 2,
    },
}
SHARED = {
    "data.workers": 0,
    "train.epochs": 1,
    "train.batch_size": 4,
    "train.precision": "fp32",
    "selection.hard_views": "hvp",
}
ADAMW = ("dino", "ibot")
"""Methods whose optimiser counts its steps."""

RUN = "from hvp.benchmarks.originals.on_cpu import main; main()"
PRETEND_CUDA = """import torch
torch.cuda.is_available = lambda: True
torch.Tensor.pin_memory = lambda tensor, *_: tensor
"""
"""Without CUDA, MoCo v3's original does not prepare its network, and then fails."""


@pytest.mark.slow
@pytest.mark.parametrize("method", SMALL)
def test_the_patched_original_trains_on_its_own_loader(method, tmp_path):
    patch = load_patch(method)
    clone = clone_of(patch)
    for package in patch.needs:
        pytest.importorskip({"scikit-learn": "sklearn"}.get(package, package))
    apply_patch(patch, clone, tmp_path / "patched")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3), np.uint8)
    (tmp_path / "data" / "train" / "class").mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "data" / "train" / "class" / f"{number}.png")
    config = resolve(get_method(method).config, [("test", {**SHARED, **SMALL[method]})]).config
    flags = get_adapter(method).flags(config, str(tmp_path / "data"), 1)
    (tmp_path / "run").mkdir()
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{PRETEND_CUDA if method == 'mocov3' else ''}{RUN}",
            str(tmp_path / "patched" / patch.trainer),
            *flags,
        ],
        cwd=tmp_path / "run",
        env={**os.environ, **launched},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    checkpoint = next(path for path in Path(tmp_path / "run").iterdir() if path.name.startswith("checkpoint"))
    content = torch.load(checkpoint, weights_only=False)
    weights = content.get("student") or content["state_dict"]
    assert all(tensor.isfinite().all() for tensor in weights.values())
    moments = content["optimizer"]["state"].values()
    assert moments  # or no step was taken
    assert {int(moment["step"]) for moment in moments if "step" in moment} == ({2} if method in ADAMW else set())
