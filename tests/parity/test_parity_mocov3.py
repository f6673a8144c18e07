"""MoCo v3 compared with facebookresearch/moco-v3's numbers, at the fixtures' tolerances."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvp.common.evaluation.checkpoints import load_encoder
from hvp.common.hardviews import Slots
from hvp.common.networks.resnet import ResNet
from hvp.common.networks.vision_transformer import VisionTransformer, sincos_positions
from hvp.common.training.optimizers import LARS
from hvp.methods.mocov3.builder import MoCo, MoCo_ResNet, MoCo_ViT
from hvp.methods.mocov3.contrastive_loss import contrastive_loss
from hvp.methods.mocov3.main_mocov3 import adjust_learning_rate, adjust_moco_momentum
from hvp.methods.mocov3.score import pair_info_nce
from hvp.methods.mocov3.vits import VITS, VisionTransformerMoCo, vit_small
from tests.parity.dino_steps import formula_images
from tests.parity.fixtures import assert_close, cases, checkpoint_models, load, load_checkpoint_keys
from tests.parity.reference_models import arch_of, build_convnet, described, linear_layers, renamed, shapes_of, vit_of


@pytest.mark.parametrize("case", cases("mocov3_loss"))
def test_loss_and_gradients(case: str) -> None:
    f = load(case)
    q1, q2, k1, k2 = (f.tensors[name].clone() for name in ("q1", "q2", "k1", "k2"))
    one = contrastive_loss(q1.requires_grad_(), k2, f.config["T"])
    two = contrastive_loss(q2.requires_grad_(), k1, f.config["T"])
    (one + two).backward()
    assert_close(one, f.tensors["loss_q1_k2"], f, "q1 against k2")
    assert_close(two, f.tensors["loss_q2_k1"], f, "q2 against k1")
    assert_close(one + two, f.tensors["loss"], f, "loss")
    assert_close(q1.grad, f.tensors["grad_q1"], f, "gradient of q1")
    assert_close(q2.grad, f.tensors["grad_q2"], f, "gradient of q2")


@pytest.mark.parametrize("case", cases("mocov3_loss"))
def test_pair_losses_are_the_loss_of_each_image(case: str) -> None:
    f = load(case)
    q, k = (torch.stack([f.tensors[f"{name}1"], f.tensors[f"{name}2"]]) for name in ("q", "k"))
    means = pair_info_nce(q, k, Slots.from_counts((1, 1), (1, 1)), f.config["T"]).mean(dim=0)
    assert_close(means[1, 0], f.tensors["loss_q1_k2"], f, "target 2, online 1")
    assert_close(means[0, 1], f.tensors["loss_q2_k1"], f, "target 1, online 2")


class NoBackbone(nn.Module):
    """Encoder for images that are features already."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.fc = self.head = nn.Identity()

    def pooled(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x))


@pytest.mark.parametrize("case", cases("mocov3_model"))
def test_one_step_of_the_model(case: str) -> None:
    """Compare queries, keys, the momentum encoder's step, both encoders' batch statistics, and the gradients."""
    f = load(case)
    c = f.config
    kind: Any = {"MoCo_ViT": MoCo_ViT, "MoCo_ResNet": MoCo_ResNet}[c["kind"]]
    model: MoCo = kind(NoBackbone(c["feat"]), c["dim"], c["mlp_dim"])
    model.load_state_dict(f.group("state"))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == c["requires_grad"]

    out = model(f.tensors["x1"], f.tensors["x2"], c["m"])
    loss = contrastive_loss(out.q1, out.k2, c["T"]) + contrastive_loss(out.q2, out.k1, c["T"])
    loss.backward()
    for name in ("q1", "q2", "k1", "k2"):
        assert_close(getattr(out, name), f.tensors[name], f, name)
    assert_close(loss, f.tensors["loss"], f, "loss")
    state, gradients = model.state_dict(), f.group("grad")
    for name, expected in f.group("state_after").items():
        assert_close(state[name], expected, f, name)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert_close(parameter.grad, gradients[name], f, f"gradient of {name}")


@pytest.mark.parametrize("case", cases("mocov3_schedule"))
def test_schedules(case: str) -> None:
    f = load(case)
    c = f.config
    total_steps, warmup_steps = c["epochs"] * c["niter"], c["warmup_epochs"] * c["niter"]
    steps = range(total_steps)
    rates = [adjust_learning_rate(step, c["lr"], warmup_steps, total_steps) for step in steps]
    momenta = [adjust_moco_momentum(step, c["moco_m"], total_steps) for step in steps]
    assert_close(torch.tensor(rates, dtype=torch.float64), f.tensors["lr"], f, "learning rate")
    assert_close(torch.tensor(momenta, dtype=torch.float64), f.tensors["momentum"], f, "momentum")


@pytest.mark.parametrize("case", cases("mocov3_posembed"))
def test_positions(case: str) -> None:
    f = load(case)
    side = f.config["grid"][0]
    assert f.config["grid"] == [side, side]
    assert f.config["temperature"] == 10000
    assert_close(sincos_positions(side, f.config["embed_dim"]), f.tensors["pos_embed"], f, "positions")


@pytest.mark.parametrize("case", cases("mocov3_vit"))
def test_vit(case: str) -> None:
    f = load(case)
    c = f.config
    sizes = {name: c[name] for name in ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio")}
    vit = VisionTransformerMoCo(stop_grad_conv1=True, **sizes).eval()
    assert {name: p.requires_grad for name, p in vit.named_parameters()} == c["requires_grad"]
    assert_close(vit.pos_embed, f.tensors["state.pos_embed"], f, "positions of a fresh network")
    vit.load_state_dict(f.group("state"))
    with torch.no_grad():
        features = vit(formula_images(c["batch"], 224, 224, c["input_shift"]))
    assert_close(features, f.tensors["features"], f, "features")


@pytest.mark.parametrize("case", cases("mocov3_vit_init"))
def test_initial_weights(case: str) -> None:
    """Weights follow the stated distributions: equal standard deviation, extremes near the same bound."""
    f = load(case)
    assert f.tolerance == {"std": "relative 2%", "absmax": "below the stated bound and above 0.98 of it"}
    weights = dict(vit_small().named_parameters())
    embed_dim = 384
    fans = {
        "patch_embed.proj.weight": 3 * 16 * 16 + embed_dim,
        "blocks.0.attn.qkv.weight": 2 * embed_dim,
        "blocks.0.attn.proj.weight": 2 * embed_dim,
        "blocks.0.mlp.fc1.weight": 5 * embed_dim,
        "blocks.0.mlp.fc2.weight": 5 * embed_dim,
    }
    for name, expected in f.scalars.items():
        weight = weights[name].detach()
        assert list(weight.shape) == expected["shape"], name
        if expected["std"] == 0:
            assert (weight == expected["mean"]).all(), name
        elif name == "cls_token":
            # 384 numbers: the standard deviation is known to 3.6 %, for theirs and ours
            assert weight.std().item() == pytest.approx(1e-6, rel=0.15), name
        else:
            assert weight.std().item() == pytest.approx(expected["std"], rel=0.02), name
            bound = math.sqrt(6 / fans[name])
            for largest in (expected["absmax"], weight.abs().max().item()):
                assert 0.98 * bound < largest < bound * (1 + 1e-6), name


@pytest.mark.parametrize("case", cases("lars"))
def test_lars(case: str) -> None:
    """Upstream exempts scalar tensors, which ours decays and scales; they are left out, as no network here has one."""
    f = load(case)
    c = f.config
    parameters = {name: nn.Parameter(p.clone()) for name, p in f.group("param").items() if p.ndim > 0}
    optimizer = LARS(parameters.values(), weight_decay=c["weight_decay"], momentum=c["momentum"], eta=c["trust"])
    for step, lr in enumerate(c["lrs"]):
        optimizer.param_groups[0]["lr"] = lr
        gradients = f.group(f"grad{step}")
        for name, parameter in parameters.items():
            parameter.grad = gradients.get(name)
        optimizer.step()
        expected = {name: p for name, p in f.group(f"moco.step{step + 1}").items() if p.ndim > 0}
        assert expected.keys() == parameters.keys()
        for name, value in expected.items():
            assert_close(parameters[name], value, f, f"{name} after step {step + 1}")


MODELS = checkpoint_models("mocov3_")


@pytest.mark.parametrize("model", MODELS)
def test_checkpoint_keys_shapes_and_frozen_parameters(model: str) -> None:
    facts = load_checkpoint_keys(model)
    ours = real_size(facts)
    assert described(ours) == renamed(facts["entries"]["state_dict"])
    frozen = [f"module.{name}" for name, p in ours.named_parameters() if not p.requires_grad]
    assert [name for name in frozen if ".base_encoder." in name] == facts["frozen_base_encoder"]
    assert all(p.ndim > 0 for p in ours.parameters())  # see test_lars


@pytest.mark.parametrize("which", [None, "base_encoder", "momentum_encoder"])
@pytest.mark.parametrize("model", MODELS)
def test_upstream_checkpoints_load(model: str, which: Any, tmp_path: Path) -> None:
    """Load a file as main_moco.py saves it; each tensor repeats one number, which keeps the file small."""
    facts = load_checkpoint_keys(model)
    values = {"base_encoder": 0.5, "momentum_encoder": 0.25, "predictor": 0.125}
    weights = {}
    for name, shape, dtype in facts["entries"]["state_dict"]:
        value = torch.tensor(values[name.split(".")[1]]) if dtype == "float32" else torch.tensor(7)
        if name.endswith("pos_embed"):
            weights[name] = sincos_positions(math.isqrt(shape[1] - 1), shape[2])
        else:
            weights[name] = value.expand(shape)
    others = {"epoch": 300, "arch": "any", "optimizer": {"state": {}, "param_groups": []}, "scaler": {}}
    content = {**others, "state_dict": weights}
    assert sorted(content) == sorted(facts["top_level_keys"])
    torch.save(content, tmp_path / "checkpoint.pth.tar")

    encoder, meta = load_encoder(tmp_path / "checkpoint.pth.tar", which)
    assert (meta.format, meta.which, meta.epoch) == ("upstream", which or "base_encoder", 300)
    first = next(value for name, value in encoder.state_dict().items() if name.endswith("weight"))
    assert (first == values[which or "base_encoder"]).all()
    projector = "fc" if isinstance(encoder, ResNet) else "head"
    own = {f"module.{meta.which}.{name}" for name in encoder.state_dict()}
    assert own == {name for name in weights if name.split(".")[1] == meta.which and name.split(".")[2] != projector}
    if isinstance(encoder, VisionTransformer):
        # 12 like a ViT-B; DINO's ViT-S has 6 heads with the same shapes
        assert encoder.get_submodule("blocks.0.attn").num_heads == 12
    else:
        assert isinstance(encoder, ResNet)


def real_size(facts: dict[str, Any]) -> MoCo:
    """Build a reference model at real size, without memory for the weights."""
    entries = facts["entries"]["state_dict"]
    shapes = shapes_of(entries, "base_encoder")
    mlp_dim, dim = linear_layers(shapes_of(entries), "predictor")[0]
    with torch.device("meta"):
        vit = vit_of(shapes)
        if vit is None:
            return MoCo_ResNet(build_convnet(shapes), dim, mlp_dim)
        fixed = "module.base_encoder.patch_embed.proj.weight" in facts["frozen_base_encoder"]
        return MoCo_ViT(VITS[arch_of(shapes)](img_size=vit.img_size, stop_grad_conv1=fixed), dim, mlp_dim)
