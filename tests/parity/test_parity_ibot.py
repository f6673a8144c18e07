"""iBOT compared with the reference implementation's numbers, at the fixtures' tolerances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chi2_contingency
from torch import Tensor, nn

from hvp.common.hardviews import Group, Slots, select
from hvp.common.networks.vision_transformer import VisionTransformer, vit_from_state
from hvp.common.training.optimizers import split_weight_decay
from hvp.methods.ibot.head import MultiCropWrapper, iBOTHead
from hvp.methods.ibot.ibot_loss import iBOTLoss
from hvp.methods.ibot.masking import MaskSampler
from hvp.methods.ibot.score import loss_matrix
from tests.parity.dino_steps import formula_images
from tests.parity.fixtures import Fixture, assert_close, cases, checkpoint_models, load, load_checkpoint_keys
from tests.parity.reference_models import build_encoder, described, head_sizes, renamed, shapes_of


@pytest.mark.parametrize("case", cases("ibot_loss"))
def test_losses_gradients_and_centers(case: str) -> None:
    f = load(case)
    c, t = f.config, f.tensors
    loss_fn = iBOTLoss(
        c["out"],
        c["pout"],
        2 + c["nl"],
        c["wtt"],
        c["tt"],
        c["wtt2"],
        c["tt2"],
        c["wte"],
        c["ne"],
        student_temp=c["student_temp"],
        center_momentum=c["center_momentum"],
        center_momentum2=c["center_momentum2"],
        lambda1=c["l1"],
        lambda2=c["l2"],
        pred_start_epoch=c["mse"],
    )
    loss_fn.load_state_dict({"center": t["center_before"], "center2": t["center2_before"]})
    assert loss_fn.teacher_temp(c["epoch"]) == pytest.approx(f.scalars["teacher_temp"], rel=1e-12)
    assert loss_fn.teacher_patch_temp(c["epoch"]) == pytest.approx(f.scalars["teacher_patch_temp"], rel=1e-12)

    masks = t["masks"].bool().flatten(0, 1).flatten(1)  # [2 B, N]
    student_cls, student_patch = t["student_cls"].requires_grad_(), t["student_patch"].requires_grad_()
    views = [student_cls]
    if c["nl"]:
        views.append(t["student_local_cls"].requires_grad_())
    losses = loss_fn(
        torch.cat(views), student_patch[masks], t["teacher_cls"], t["teacher_patch"][masks], masks, c["epoch"]
    )
    losses.loss.backward()
    assert_close(losses.loss, t["loss"], f, "loss")
    assert_close(losses.cls, t["loss_cls"], f, "[CLS] part")
    assert_close(losses.patch, t["loss_patch"], f, "patch part")
    assert_close(student_cls.grad, t["grad_student_cls"], f, "gradient of [CLS]")
    assert student_patch.grad is not None
    assert_close(student_patch.grad.norm(dim=2), t["grad_student_patch_token_l2"], f, "gradient of patches")
    if c["nl"]:
        assert_close(views[1].grad, t["grad_student_local_cls"], f, "gradient of local [CLS]")
    assert torch.equal(loss_fn.center2, t["center2_before"]), "the loss must not move a centre"

    loss_fn.center_step(t["teacher_cls"], t["teacher_patch"].mean(dim=1))
    loss_fn.update_center()
    assert_close(loss_fn.center, t["center_after"], f, "centre")
    assert_close(loss_fn.center2, t["center2_after"], f, "centre of patches")


@pytest.mark.parametrize("case", cases("ibot_head"))
def test_head(case: str) -> None:
    f = load(case)
    c, t = f.config, f.tensors
    head = iBOTHead(
        c["in_dim"],
        c["out_dim"],
        patch_out_dim=c["out_dim"] if c["shared_head"] else c["patch_out_dim"],
        shared_head=c["shared_head"],
        norm_last_layer=c["norm_last_layer"],
        hidden_dim=c["hidden_dim"],
        bottleneck_dim=c["bottleneck_dim"],
    )
    head.load_state_dict(f.group("state"))
    assert {name: p.requires_grad for name, p in head.named_parameters()} == c["requires_grad"]
    embedding = head.embed(t["x_tokens"])
    assert_close(head.last_layer(embedding[:, 0]), t["y_cls"], f, "[CLS]")
    assert_close(head.last_layer2(embedding[:, 1:]), t["y_patch"], f, "patches")
    assert_close(head(t["x_vectors"]), t["y_vectors"], f, "vectors")


@pytest.mark.parametrize("case", cases("ibot_vit"))
def test_vision_transformer(case: str) -> None:
    f = load(case)
    c, t = f.config, f.tensors
    sizes = {key: c[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    backbone = VisionTransformer(**sizes, mask_token=True).eval()
    backbone.load_state_dict(f.group("state"))
    x224, x96 = (formula_images(2, side, side, c["input_shift"] + i) for i, side in enumerate((224, 96)))
    with torch.no_grad():
        tokens = backbone.all_tokens(x224, t["mask"].bool().flatten(1))
        assert_close(tokens[:, 0], t["cls_masked"], f, "[CLS], masked")
        assert_close(tokens[:, 1:], t["patch_masked"], f, "patches, masked")
        assert_close(backbone.all_tokens(x224)[:, 0], t["cls_unmasked"], f, "[CLS], unmasked, all tokens")
        assert_close(backbone(x224), t["cls_unmasked"], f, "[CLS], unmasked")
        assert_close(backbone(x96), t["cls_local"], f, "[CLS], local")


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("case", cases("ibot_masking"))
def test_mask_statistics(case: str, number: int) -> None:
    """Compare as many masks as the fixture's by its own criteria: share, its histogram, positions, neighbours."""
    f = load(case)
    s = f.scalars[f"case{number}"]
    as_tuple = lambda value: tuple(value) if isinstance(value, list) else (value,)  # noqa: E731
    sampler = MaskSampler(
        grid=(f.config["grid"],) * 2,
        num_views=2,
        ratios=as_tuple(s["pred_ratio"]),
        variations=as_tuple(s["pred_ratio_var"]),
        shape=s["pred_shape"],
        start_epoch=0,
        seed=f.meta["seed"],
    )
    masks = sampler([(0, image) for image in range(s["n_masks"] // 2)]).flatten(0, 1)  # [n, rows, columns]
    shares = masks.flatten(1).double().mean(dim=1)
    assert len(f.scalars) == 5
    assert shares.mean().item() == pytest.approx(s["mean_fraction"], abs=4 * 2**0.5 * s["standard_error_of_mean"])
    assert shares.std().item() == pytest.approx(s["std_fraction"], rel=0.1)
    assert (shares == 0).double().mean().item() == pytest.approx(s["share_empty"], abs=0.06)

    histogram = torch.histogram(shares, f.tensors["histogram_bin_edges"]).hist
    table = torch.stack((histogram, f.tensors[f"case{number}.histogram"].double()))
    rare = table.sum(dim=0) < 20
    table = torch.cat((table[:, ~rare], table[:, rare].sum(dim=1, keepdim=True)), dim=1)
    table = table[:, table.sum(dim=0) > 0]
    assert table.shape[1] == 1 or chi2_contingency(table.numpy()).pvalue > 1e-4

    inner = masks[..., :-1]
    both, first = (inner & masks[..., 1:]).flatten(1).sum(dim=1), inner.flatten(1).sum(dim=1)
    neighbours = (both[first > 0] / first[first > 0]).mean().item()
    assert neighbours == pytest.approx(s["mean_right_neighbour_masked_given_masked"], abs=0.03)

    position = masks.double().mean(dim=0)
    torch.testing.assert_close(position, f.tensors[f"case{number}.position_probability"].double(), rtol=0, atol=0.07)


@pytest.mark.parametrize("case", cases("ibot_select"))
def test_pair_losses_of_every_combination(case: str) -> None:
    f = load(case)
    matrix, slots = matrix_of(f), slots_of(f)
    for combination, expected in zip(
        f.tensors["combinations"].tolist(), f.tensors["per_combination_loss"], strict=True
    ):
        pairs = [(t, v) for t in combination[:2] for v in combination if v != t]
        zero = torch.zeros(())
        views = sum((matrix[:, t, v] for t, v in pairs), zero) / len(pairs)
        patches = sum((matrix[:, t, t] for t in combination[:2]), zero) / 2
        assert_close(views + patches, expected, f, str(combination))
    assert slots.diagonal


@pytest.mark.parametrize("case", cases("ibot_select"))
def test_selection(case: str) -> None:
    f = load(case)
    matrix, slots = matrix_of(f), slots_of(f)
    kept = select([], matrix, slots, combinations=f.tensors["combinations"])
    assert torch.equal(kept.index.T, f.tensors["selected"])
    assert_close(kept.loss, f.tensors["score"], f, "score")
    # the fixtures list every combination of one even and one odd global view
    assert len(f.tensors["combinations"]) == slots.num_combinations
    assert torch.equal(select([], matrix, slots, search="exact").index.T, f.tensors["selected"])


def matrix_of(f: Fixture) -> Tensor:
    c, t = f.config, f.tensors
    loss_fn = iBOTLoss(
        c["out_dim"],
        c["patch_out_dim"],
        2 + c["n_local_selected"],
        c["warmup_teacher_temp"],
        c["teacher_temp"],
        c["warmup_teacher_patch_temp"],
        c["teacher_patch_temp"],
        c["warmup_teacher_temp_epochs"],
        c["nepochs"],
        student_temp=c["student_temp"],
    )
    loss_fn.load_state_dict({"center": t["center"], "center2": t["center2"]})
    masks = t["masks"].bool().flatten(2)  # [G, B, N]
    rows = masks.flatten(0, 1)
    student_cls = torch.cat([t["student_cls"], *([t["student_local_cls"]] if c["n_local_loaded"] else [])])
    return loss_matrix(
        t["teacher_cls"].unflatten(0, (-1, c["B"])),
        t["teacher_patch"][rows],
        student_cls.unflatten(0, (-1, c["B"])),
        t["student_patch"][rows],
        masks,
        loss_fn,
        c["epoch"],
    )


def slots_of(f: Fixture) -> Slots:
    num_global, num_local = f.config["n_global_loaded"], f.config["n_local_loaded"]
    groups = [Group(tuple(range(first, num_global, 2)), 1) for first in (0, 1)]
    if num_local:
        groups.append(Group(tuple(range(num_global, num_global + num_local)), f.config["n_local_selected"]))
    return Slots(tuple(groups), diagonal=True)


MODELS = checkpoint_models("ibot_")


@pytest.mark.parametrize("model", MODELS)
def test_checkpoint_keys_and_shapes(model: str) -> None:
    facts = load_checkpoint_keys(model)
    student, teacher, ibot_loss = real_sizes(facts)
    for part, module in {"student": student, "teacher": teacher, "ibot_loss": ibot_loss}.items():
        assert described(module) == renamed(facts["entries"][part]), part


@pytest.mark.parametrize("model", MODELS)
def test_optimizer_groups(model: str) -> None:
    facts = load_checkpoint_keys(model)
    student, _, _ = real_sizes(facts)
    names = {parameter: name for name, parameter in student.named_parameters()}
    groups = split_weight_decay(student.named_parameters())
    for ours, theirs in zip(groups, facts["optimizer_groups"], strict=True):
        assert [f"module.{names[p]}" for p in ours["params"]] == theirs["names"]
        assert ours.get("weight_decay", "schedule") == theirs["weight_decay"]


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("model", MODELS)
def test_encoder_is_recognised_by_the_keys_of_a_checkpoint(model: str, network: str) -> None:
    state = {
        name: torch.empty(shape, device="meta")
        for name, shape in shapes_of(load_checkpoint_keys(model)["entries"][network], "backbone").items()
        if name != "masked_embed"
    }
    with torch.device("meta"):
        encoder = vit_from_state(state)
    assert encoder is not None
    assert {k: p.shape for k, p in encoder.state_dict().items()} == {k: p.shape for k, p in state.items()}


def real_sizes(facts: dict[str, Any]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Build a reference model's networks and loss at real size, without memory for the weights."""
    head_shapes = shapes_of(facts["entries"]["student"], "head")
    centers = shapes_of(facts["entries"]["ibot_loss"])
    # A shared head is listed twice in a state dict, but once in the optimiser's groups.
    trained = [name for group in facts["optimizer_groups"] for name in group["names"]]
    sizes = {
        **head_sizes(head_shapes),
        "patch_out_dim": head_shapes["last_layer2.weight_v"][0],
        "shared_head": "module.head.last_layer2.weight_v" not in trained,
        "norm_last_layer": "module.head.last_layer.weight_g" not in trained,
    }
    with torch.device("meta"):

        def network(mask_token: bool) -> MultiCropWrapper:
            shapes = shapes_of(facts["entries"]["student"], "backbone")
            backbone: Any = build_encoder(shapes, mask_token=mask_token)
            return MultiCropWrapper(backbone, iBOTHead(**sizes))

        loss = iBOTLoss(centers["center"][-1], centers["center2"][-1], 2, 0.04, 0.04, 0.04, 0.07, 30, 100)
        return network(True), network(False), loss
