"""SimSiam compared with the reference implementations' numbers, at the fixtures' tolerances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvp.common.errors import UserError
from hvp.common.evaluation.checkpoints import load_encoder
from hvp.common.hardviews import Slots, select
from hvp.common.networks.resnet import CONVNETS, ResNet
from hvp.common.training.schedules import cosine
from hvp.methods.simsiam.builder import SimSiam
from hvp.methods.simsiam.config import SimSiamConfig
from hvp.methods.simsiam.main_simsiam import symmetric_loss
from hvp.methods.simsiam.score import negative_cosines
from tests.parity.fixtures import Fixture, assert_close, cases, checkpoint_models, load, load_checkpoint_keys
from tests.parity.reference_models import build_convnet, described, linear_layers, renamed, shapes_of


@pytest.mark.parametrize("case", cases("simsiam_loss"))
def test_loss_and_gradients(case: str) -> None:
    f = load(case)
    t = f.tensors
    p1, p2 = (t[name].clone().requires_grad_() for name in ("p1", "p2"))
    loss = symmetric_loss(p1, p2, t["z1"], t["z2"])
    loss.backward()
    assert_close(loss, t["loss"], f, "loss")
    assert loss.item() == pytest.approx(f.scalars["loss"], rel=f.tolerance["rtol"])
    assert_close(p1.grad, t["grad_p1"], f, "gradient of p1")
    assert_close(p2.grad, t["grad_p2"], f, "gradient of p2")


@pytest.mark.parametrize("case", cases("simsiam_loss"))
def test_pair_losses_average_to_the_loss_of_each_image(case: str) -> None:
    f = load(case)
    t = f.tensors
    matrix = negative_cosines(torch.stack((t["p1"], t["p2"])), torch.stack((t["z1"], t["z2"])))
    assert_close((matrix[:, 0, 1] + matrix[:, 1, 0]) / 2, t["per_sample_loss"], f, "loss of each image")


@pytest.mark.parametrize("case", cases("simsiam_schedule"))
def test_learning_rates(case: str) -> None:
    f = load(case)
    c, t = f.config, f.tensors
    config = SimSiamConfig.model_validate(
        {"optim": {"base_lr": c["lr"]}, "train": {"batch_size": c["batch_size"], "epochs": c["epochs"]}}
    )
    rates = [cosine(epoch, base=config.peak_lr, final=0.0, total_steps=c["epochs"]) for epoch in range(c["epochs"])]
    assert_close(torch.tensor(rates, dtype=torch.float64), t["lr_encoder"], f, "encoder")
    fixed = torch.full((c["epochs"],), config.peak_lr, dtype=torch.float64)
    assert_close(fixed, t["lr_predictor_fixed"], f, "predictor")


class Features(nn.Module):
    """Encoder for images that are features already."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.fc: nn.Module = nn.Identity()

    def pooled(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooled(x))


def model_of(f: Fixture) -> SimSiam:
    """Build the fixture's model in its initial state."""
    c = f.config
    encoder: object = Features(c["feat"])
    model = SimSiam(
        encoder,  # type: ignore[arg-type]  # a stand-in for a convnet
        c["dim"],
        c["pred_dim"],
        projector_layers=c["proj_layer"],
        projector_bias=c["builder"] == "fair",
    )
    model.load_state_dict(f.group("state"))
    return model.train()


def assert_buffers(model: SimSiam, f: Fixture) -> None:
    for name, expected in f.group("state_after").items():
        assert_close(model.state_dict()[name], expected, f, name)


@pytest.mark.parametrize("case", cases("simsiam_model"))
def test_model_in_train_mode(case: str) -> None:
    f = load(case)
    t = f.tensors
    model = model_of(f)
    parameters = dict(model.named_parameters())
    assert {name: p.requires_grad for name, p in parameters.items()} == f.config["requires_grad"]
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d):
            assert (part.momentum, part.eps) == (f.config["momentum_bn"], f.config["eps_bn"])

    outputs = model(t["x1"], t["x2"])[:4]
    for name, output in zip(("p1", "p2", "z1", "z2"), outputs, strict=True):
        assert_close(output, t[name], f, name)
    assert not outputs[2].requires_grad
    assert not outputs[3].requires_grad
    if "p_joint" not in t:
        assert_buffers(model, f)
    loss = symmetric_loss(*outputs)
    assert_close(loss, t["loss"], f, "loss")
    loss.backward()
    gradients = f.group("grad")
    assert gradients.keys() == {name for name, p in parameters.items() if p.grad is not None}
    for name, expected in gradients.items():
        assert_close(parameters[name].grad, expected, f, f"gradient of {name}")


@pytest.mark.parametrize("case", [case for case in cases("simsiam_model") if "hvp" in case])
def test_joint_forward_of_a_selection(case: str) -> None:
    f = load(case)
    t = f.tensors
    model = model_of(f)
    with torch.no_grad():
        p, z = model.single_forward(torch.cat((t["x1"], t["x2"])))
    assert_close(p, t["p_joint"], f, "p")
    assert_close(z, t["z_joint"], f, "z")
    # In these cases the fixture's buffers were updated once, by this joint forward, not twice by the two views.
    assert_buffers(model, f)


@pytest.mark.parametrize("case", cases("simsiam_select"))
def test_selection(case: str) -> None:
    f = load(case)
    t, num_views = f.tensors, f.config["n_views"]
    p, z = (t[name].unflatten(0, (num_views, f.config["B"])) for name in ("p", "z"))  # [N, B, D]
    matrix = negative_cosines(p, z)
    slots = Slots.from_counts((num_views,), (2,))
    assert torch.equal(slots.all_combinations(), t["pairs"])
    for (first, second), expected in zip(t["pairs"].tolist(), t["pair_similarity"], strict=True):
        pair = (matrix[:, first, second] + matrix[:, second, first]) / 2
        assert_close(-pair, expected, f, f"similarity of {first} and {second}")
    for search in ("sampled", "exact"):
        kept = select([], matrix, slots, search=search)
        assert torch.equal(kept.index.T, t["selected"])
        assert_close(-kept.loss, t["score"], f, "score")


MODELS = [*checkpoint_models("simsiam_"), *checkpoint_models("hvp_simsiam_")]


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_names_and_shapes(name: str) -> None:
    facts = load_checkpoint_keys(name)
    (entries,) = facts["entries"].values()
    model = real_size(entries)
    # HVP's own network for CIFAR has a block's entries in another order than torchvision's
    assert sorted(described(model)) == sorted(renamed(entries))
    if "frozen" in facts:
        assert [f"module.{key}" for key, p in model.named_parameters() if not p.requires_grad] == facts["frozen"]


@pytest.mark.parametrize("name", MODELS)
def test_reference_checkpoints_load_for_evaluation(name: str, tmp_path: Path) -> None:
    facts = load_checkpoint_keys(name)
    ((top_level, entries),) = facts["entries"].items()
    # every tensor repeats a number of its own, which keeps the file small
    weights = {
        key: torch.tensor(number, dtype=getattr(torch, dtype)).expand(shape)
        for number, (key, shape, dtype) in enumerate(entries)
    }
    rest = {"epoch": 100, "arch": "resnet50", "optimizer": {"state": {}}, "fp16": None, "total_time": "1:00:00"}
    content = {key: weights if key == top_level else rest[key] for key in facts["top_level_keys"]}
    torch.save(content, tmp_path / "checkpoint.pth.tar")

    encoder, meta = load_encoder(tmp_path / "checkpoint.pth.tar")
    assert isinstance(encoder, ResNet)
    assert not encoder.training
    assert (meta.format, meta.which, meta.epoch) == ("bare", "bare", 100)
    assert all(key.startswith(("encoder.fc.", "predictor.")) for key in meta.dropped)
    loaded = encoder.state_dict()
    own = dict(zip((key for key, *_ in renamed(entries)), weights.values(), strict=True))
    assert len(loaded) + len(meta.dropped) == len(weights)
    for key, value in loaded.items():
        assert torch.equal(value, own[f"encoder.{key}"]), key


@pytest.mark.parametrize("name", MODELS)
def test_the_error_for_a_misfit_names_the_keys(name: str, tmp_path: Path) -> None:
    (entries,) = load_checkpoint_keys(name)["entries"].values()
    weights = {key: torch.zeros(()).expand(shape) for key, shape, _ in entries}
    del weights["module.encoder.bn1.weight"]
    weights["module.encoder.extra"] = torch.zeros(1)
    torch.save({"state_dict": weights}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"missing \(1\): bn1\.weight\n.*left over \(1\): extra\n"):
        load_encoder(tmp_path / "odd.pth")


def test_residual_branches_start_at_zero() -> None:
    """The last batch norm of every block starts at zero, as in the upstream, or at one without the option."""
    for zero, value in ((True, 0.0), (False, 1.0)):
        for arch, last in (("resnet50", "bn3"), ("resnet18_cifar", "bn2")):
            network = CONVNETS[arch](zero_init_residual=zero)
            gains = [m.weight for key, m in network.named_modules() if key.endswith(last) and key.startswith("layer")]
            assert len(gains) == (16 if arch == "resnet50" else 8)
            assert all((gain == value).all() for gain in gains)


def real_size(entries: list[list[Any]]) -> SimSiam:
    """Build a reference model at real size, without memory for the weights."""
    shapes = shapes_of(entries)
    projector = linear_layers(shapes, "encoder.fc")
    pred_dim, dim = linear_layers(shapes, "predictor")[0]
    last = 3 * (len(projector) - 1)  # batch norm and ReLU stand between two linear layers
    layers: Any = len(projector)
    with torch.device("meta"):
        encoder = build_convnet(shapes_of(entries, "encoder"))
        bias = f"encoder.fc.{last}.bias" in shapes
        return SimSiam(encoder, dim, pred_dim, projector_layers=layers, projector_bias=bias)
