"""SimCLR compared with the numbers of HVP's and google-research's code, at the fixtures' tolerances."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn

from hvp.common.evaluation.checkpoints import load_encoder
from hvp.common.hardviews import Slots, combination_losses, select
from hvp.common.networks.resnet import ResNet
from hvp.common.training.optimizers import LARS
from hvp.methods.simclr.model import SimCLR, SimCLRProjectionHead
from hvp.methods.simclr.nt_xent_loss import nt_xent_loss
from hvp.methods.simclr.score import pair_nt_xent
from tests.parity.fixtures import assert_close, cases, checkpoint_models, load, load_checkpoint_keys
from tests.parity.reference_models import build_convnet, described, linear_layers, renamed, shapes_of


@pytest.mark.parametrize("case", cases("simclr_loss"))
def test_loss_and_gradients(case: str) -> None:
    f = load(case)
    z = torch.stack([f.tensors["z1"], f.tensors["z2"]]).requires_grad_()
    loss = nt_xent_loss(z, f.config["temperature"])
    loss.backward()
    assert_close(loss, f.tensors["loss"], f, "loss")
    assert_close(2 * loss.detach().double(), f.tensors["google_per_sample"].mean(), f, "google-research's loss")
    assert_close(z.grad, torch.stack([f.tensors["grad_z1"], f.tensors["grad_z2"]]), f, "gradients")


@pytest.mark.parametrize("case", cases("simclr_loss"))
def test_pair_losses_are_the_loss_of_each_image(case: str) -> None:
    f = load(case)
    losses = pair_nt_xent(torch.stack([f.tensors["z1"], f.tensors["z2"]]), f.config["temperature"])
    both_anchors = losses[:, 0, 1] + losses[:, 1, 0]
    assert_close(both_anchors, f.tensors["per_sample"], f, "sum of both anchors")
    assert_close(both_anchors.double(), f.tensors["google_per_sample"], f, "google-research's sum of both anchors")


@pytest.mark.parametrize("case", cases("simclr_select"))
def test_selection(case: str) -> None:
    f = load(case)
    num_views = f.config["n_views"]
    losses = pair_nt_xent(f.tensors["features"].unflatten(0, (num_views, -1)), f.config["temperature"])
    slots = Slots.from_counts((num_views,), (2,))
    assert f.tensors["pairs"].tolist() == [list(pair) for pair in combinations(range(num_views), 2)]
    assert torch.equal(slots.all_combinations(), f.tensors["pairs"])
    # the released code adds the two anchors where the objective takes their mean
    assert_close(2 * combination_losses(losses, f.tensors["pairs"], slots).T, f.tensors["pair_loss"], f, "all pairs")
    for search in ("sampled", "exact"):
        kept = select([], losses, slots, search=search)
        assert torch.equal(kept.index.T, f.tensors["selected"])
        assert_close(2 * kept.loss, f.tensors["score"], f, "score")


@pytest.mark.parametrize("case", cases("simclr_head"))
def test_head(case: str) -> None:
    f = load(case)
    head = SimCLRProjectionHead(**{name: value for name, value in f.config.items() if name != "B"})
    head.load_state_dict(f.group("state"))
    assert_close(head(f.tensors["x"]), f.tensors["y"], f, "y")
    for name, buffer in f.group("state_after").items():
        assert_close(head.state_dict()[name], buffer, f, name)


@pytest.mark.parametrize("case", cases("lars"))
def test_google_has_the_learning_rate_inside_the_momentum(case: str) -> None:
    """The two are equal at a constant rate. When it changes by a factor, google's momentum is ours divided by it.

    Biases and norms are exempt: google recognises them by name, we by having one dimension.
    """
    f = load(case)
    c = f.config
    parameters = {name: nn.Parameter(p.clone()) for name, p in f.group("param").items()}
    optimizer = LARS(parameters.values(), weight_decay=c["weight_decay"], momentum=c["momentum"], eta=c["trust"])
    before = math.inf
    for step, lr in enumerate(c["lrs"]):
        optimizer.param_groups[0]["lr"] = lr
        for state in optimizer.state.values():
            state["mu"] *= before / lr
        before = lr
        gradients = f.group(f"grad{step}")
        for name, parameter in parameters.items():
            parameter.grad = gradients.get(name)
        optimizer.step()
        for name, expected in f.group(f"google_classic.step{step + 1}").items():
            assert_close(parameters[name], expected.float(), f, f"{name} after step {step + 1}")


MODELS = checkpoint_models("hvp_simclr_")


@pytest.mark.parametrize("model", MODELS)
def test_checkpoint_keys_and_shapes(model: str) -> None:
    entries = load_checkpoint_keys(model)["entries"]["model"]
    shapes = shapes_of(entries, "projector")
    layers = linear_layers(shapes, "layers")
    (hidden_dim, in_dim), out_dim = layers[0], layers[-1][0]
    with torch.device("meta"):
        backbone = build_convnet(shapes_of(entries, "backbone"))
        use_bn = "layers.1.running_mean" in shapes
        projector = SimCLRProjectionHead(in_dim, hidden_dim, out_dim, num_layers=len(layers), use_bn=use_bn)
        ours = SimCLR(backbone, projector)
    assert described(ours) == renamed(entries)


@pytest.mark.parametrize("model", MODELS)
def test_released_checkpoints_load(model: str, tmp_path: Path) -> None:
    """Load a file as the released code saves it; each tensor repeats one number, which keeps the file small."""
    facts = load_checkpoint_keys(model)
    kinds = {"float32": torch.tensor(0.5), "int64": torch.tensor(7)}
    weights = {name: kinds[dtype].expand(shape) for name, shape, dtype in facts["entries"]["model"]}
    others = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 100, "scaler": None, "total_time": 12345}
    assert ["model", *others] == facts["top_level_keys"]
    torch.save({"model": weights, **others}, tmp_path / "checkpoint.pth")

    encoder, meta = load_encoder(tmp_path / "checkpoint.pth")
    assert isinstance(encoder, ResNet)
    assert set(encoder.state_dict()) == set(shapes_of(facts["entries"]["model"], "backbone"))
    assert all(
        (value == (7 if name.endswith("tracked") else 0.5)).all() for name, value in encoder.state_dict().items()
    )
    assert len(meta.dropped) == len(weights) - len(encoder.state_dict())
