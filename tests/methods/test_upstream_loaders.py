"""The upstream trainers' own code loads what `hvp convert` writes, and the result converts back. Needs clones.

HVP_UPSTREAMS names a folder of clones at the commits of the methods' READMEs, each with the name of its method or
repository. SimCLR's is the branch simclr of automl/hvp, as `hvp-simclr`, because `simclr` may be another trainer.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hvp.common.convert.training_checkpoints import from_upstream, to_upstream
from hvp.common.evaluation.checkpoints import load_encoder, read_content
from hvp.common.training.checkpoint import save_checkpoint
from hvp.methods import METHODS, get_method
from tests.methods.test_every_method import config_of, leaves
from tests.methods.test_every_upstream import checkpoint_of
from tests.methods.upstream_loaders import K, images
from tests.upstreams import clone_in

CLONES = {"mocov3": ("moco-v3", "mocov3"), "simclr": ("hvp-simclr",)}
VIT = {"model.arch": "vit_small", "model.patch_size": 16, "views.global_crops_size": 224, "views.local_crops_size": 96}
HEADS = {"model.head_hidden_dim": 2048, "model.head_bottleneck_dim": 256, "model.out_dim": K}
REAL: dict[str, dict[str, Any]] = {
    "dino": {**VIT, **HEADS, "model.norm_last_layer": False, "model.use_bn_in_head": False},
    "ibot": {
        **VIT,
        **HEADS,
        "model.patch_out_dim": K,
        "model.norm_last_layer": False,
        "model.shared_head": True,
        "model.norm_in_head": None,
    },
    "simsiam": {
        "model.arch": "resnet50",
        "model.dim": 64,
        "model.pred_dim": 32,
        "optim.fix_pred_lr": True,
        "model.projector_layers": 3,
        "model.projector_bias": True,
    },
    "simclr": {
        "model.arch": "resnet50",
        "model.proj_hidden_dim": 48,
        "model.out_dim": 24,
        "optim.optimizer": "lars",
        "model.num_proj_layers": 2,
        "model.use_bn_in_head": True,
    },
    "mocov3": {"model.arch": "resnet50", "model.dim": 64, "model.mlp_dim": 32, "optim.optimizer": "lars"},
    "dinov2": {**VIT, "model.layerscale": 1e-5, "dino.head_hidden_dim": 64, "dino.head_n_prototypes": K},
}
"""Values over the tiny preset: networks that the upstream has, with small heads."""


@pytest.mark.parametrize("name", METHODS)
def test_upstreams_own_loader(name: str, tmp_path: Path) -> None:
    clone = clone_in(*CLONES.get(name, (name,)))
    checkpoint = checkpoint_of(name, REAL[name], 0)
    save_checkpoint(tmp_path / "last.pt", checkpoint)
    layout = get_method(name).upstream_layout(config_of(name, REAL[name]))
    torch.save(to_upstream(checkpoint, layout, "last.pt").content, tmp_path / "up.pth")
    program = [sys.executable, str(Path(__file__).with_name("upstream_loaders.py")), name, str(clone)]
    ran = subprocess.run(
        [*program, "up.pth", "out.pth"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr

    out = read_content(tmp_path / "out.pth")
    encoder, _ = load_encoder(tmp_path / "last.pt")
    with torch.no_grad():
        expected = encoder(images())
    assert expected.std() > 1e-3
    torch.testing.assert_close(out["features"], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())

    if layout.optimizer is None:
        return
    back = from_upstream(out["saved"], layout, "out.pth", fp16=False).content
    assert back["epoch"] == checkpoint["epoch"]
    for part in ("optimizer", *(part.ours for part in layout.parts)):
        ours = checkpoint[part]["state"] if part == "optimizer" else checkpoint[part]
        found = dict(leaves(back[part]["state"] if part == "optimizer" else back[part]))
        for where, value in leaves(ours):
            assert torch.equal(found.pop(where), value), (part, where)
        assert not found
