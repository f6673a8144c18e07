"""DINOv2 compared with the reference implementation's numbers, at the fixtures' tolerances."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hvp.common.losses.cross_entropy import patch_weights, view_cross_entropies
from hvp.common.networks import encoder_from_state
from hvp.common.networks.heads import DINOHead
from hvp.common.networks.register_vision_transformer import RegisterVisionTransformer, build_register_vit
from hvp.common.views.block_masks import mask_blocks
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.losses import DINOv2Loss, TeacherCenter, koleo_loss
from hvp.methods.dinov2.masking import SMALLEST_BLOCK, MaskSampler
from hvp.methods.dinov2.networks import Network
from hvp.methods.dinov2.param_groups import layer_decay, parameter_groups
from hvp.methods.dinov2.schedules import Schedules
from tests.parity.dino_steps import formula_images
from tests.parity.fixtures import assert_close, cases, checkpoint_models, load, load_checkpoint_keys
from tests.parity.reference_models import arch_of, described, head_sizes, own_name, renamed, shapes_of, vit_of


def centers(*shape: int, centering: Any, before: Tensor) -> TeacherCenter:
    center = TeacherCenter(*shape, centering=centering, momentum=0.9)
    center.center.copy_(before)
    return center


@pytest.mark.parametrize("case", cases("dinov2_losses"))
def test_class_token_loss(case: str) -> None:
    f = load(case)
    c, t, temp = f.config, f.tensors, f.config["temp"]
    center = centers(1, c["K"], centering="centering", before=t["center_before"])
    assert_close(center.targets(t["teacher_output"], temp), t["teacher_probs"], f, "centred targets")
    assert torch.equal(center.center, t["center_pending"]), "making targets must not move the centre"
    center.step(t["teacher_output"])
    center.update()
    assert_close(center.center, t["center_after"], f, "centre")
    assert_close(center.targets(t["teacher_output_2"], temp), t["teacher_probs_2"], f, "targets of the next step")

    balanced = centers(1, c["K"], centering="sinkhorn_knopp", before=t["center_before"])
    targets = balanced.targets(t["teacher_output"], temp)
    # the reference's own tolerance for these
    torch.testing.assert_close(targets, t["sinkhorn"], rtol=1e-4, atol=1e-6)

    local = t["student_local"].requires_grad_()
    views = [t["student_global"].chunk(2)[i] for i in (0, 1)] + list(local.chunk(c["nl"]))
    # in the fixture, rows are in the same order, and the target of a global view is that view itself
    swapped = targets.chunk(2)[::-1]
    per_view = view_cross_entropies(swapped, [view / c["student_temp"] for view in views])
    total = torch.stack(per_view[2:]).sum()
    total.backward()
    assert_close(total, t["loss_local_sum"], f, "local crops")
    assert_close(torch.stack(per_view[:2]).mean(), t["loss_global"], f, "global crops")
    assert_close(local.grad, t["grad_student_local"], f, "gradient of local crops")


@pytest.mark.parametrize("case", cases("dinov2_losses"))
def test_patch_loss(case: str) -> None:
    f = load(case)
    c, t, temp = f.config, f.tensors, f.config["temp"]
    masks = t["masks"].bool()
    student, teacher = t["student_patch"][masks], t["teacher_patch"][masks]
    assert len(student) == c["n_masked"]
    assert_close(patch_weights(masks), t["masks_weight"], f, "weights of patches")
    center = centers(1, 1, c["K"], centering="centering", before=t["patch_center_before"])
    balanced = centers(1, 1, c["K"], centering="sinkhorn_knopp", before=t["patch_center_before"])
    assert_close(center.targets(teacher, temp), t["teacher_patch_probs_masked"], f, "centred targets")
    torch.testing.assert_close(balanced.targets(teacher, temp), t["patch_sinkhorn_masked"], rtol=1e-4, atol=1e-6)

    def loss(targets: TeacherCenter) -> Tensor:
        loss_fn = DINOv2Loss(3, c["K"], 2, centering="centering", koleo_weight=0.0, student_temp=c["student_temp"])
        loss_fn.ibot_patch_loss = targets
        nothing = torch.zeros(len(masks), 3)
        return loss_fn(nothing, student, nothing, nothing, teacher, masks, temp).ibot

    for name in ("patch_loss_forward", "patch_loss_forward_masked"):
        assert_close(loss(center), t[name], f, name)
    assert_close(loss(balanced), t["patch_loss_sinkhorn"], f, "with Sinkhorn-Knopp")
    center.step(teacher)
    center.update()
    assert_close(center.center, t["patch_center_after"], f, "centre")


@pytest.mark.parametrize("case", cases("koleo"))
def test_koleo(case: str) -> None:
    f = load(case)
    x = f.tensors["x"].requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert_close(loss, f.tensors["loss"], f, "loss")
    assert_close(x.grad, f.tensors["grad_x"], f, "gradient")


@pytest.mark.parametrize("case", cases("dinov2_head"))
def test_head(case: str) -> None:
    f = load(case)
    c, t = f.config, f.tensors
    head = DINOHead(
        c["in_dim"],
        c["out_dim"],
        norm_last_layer=False,
        nlayers=c["nlayers"],
        hidden_dim=c["hidden_dim"],
        bottleneck_dim=c["bottleneck_dim"],
    )
    head.load_state_dict(f.group("state"))
    assert {name: p.requires_grad for name, p in head.named_parameters()} == c["requires_grad"]
    y = head(t["x"])
    assert_close(y, t["y"], f, "output")
    (y * t["cotangent"]).sum().backward()
    for name, parameter in head.named_parameters():
        assert_close(parameter.grad, t[f"grad.{name}"], f, name)


@pytest.mark.parametrize("case", cases("dinov2_vit"))
def test_vision_transformer(case: str) -> None:
    f = load(case)
    c, t = f.config, f.tensors
    sizes = {key: c[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    backbone = RegisterVisionTransformer(
        **sizes,
        init_values=c["init_values"],
        swiglu=c["ffn_layer"] == "swiglufused",
        num_registers=c["num_register_tokens"],
    ).eval()
    backbone.load_state_dict(f.group("state"))
    shift, small = c["input_shift"], c["local_px"]
    whole, local = formula_images(2, 224, 224, shift), formula_images(2, small, small, shift + 1)
    with torch.no_grad():
        tokens = backbone.all_tokens(whole)
        assert_close(tokens[:, 0], t["cls_224"], f, "[CLS]")
        assert_close(backbone(whole), t["cls_224"], f, "[CLS], alone")
        assert_close(tokens[:, 1::5], t["patch_224"], f, "patches")
        masked = backbone.all_tokens(whole, t["mask"].bool())
        assert_close(masked[:, 0], t["cls_224_masked"], f, "[CLS], masked")
        assert_close(backbone(local), t["cls_local"], f, "[CLS], local")
        assert_close(backbone(formula_images(1, 224, small, shift + 2)), t["cls_rect"], f, "[CLS], not square")
        assert_close(backbone.interpolate_pos_encoding(small, small), t["posembed_local"], f, "positions, local")
        if c["num_register_tokens"]:
            blocks_saw = backbone.prepare_tokens(whole)
            for block in backbone.blocks:
                blocks_saw = block(blocks_saw)
            registers = backbone.norm(blocks_saw)[:, 1 : 1 + c["num_register_tokens"]]
            assert_close(registers, t["reg_224"], f, "registers")


@pytest.mark.parametrize("case", cases("dinov2_schedule"))
def test_schedules(case: str) -> None:
    f = load(case)
    r, t = f.config["resolved"], f.tensors
    optim, teacher, length = r["optim"], r["teacher"], r["train"]["OFFICIAL_EPOCH_LENGTH"]
    own = ("base_lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end")
    of_teacher = ("momentum_teacher", "warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs")
    config = DINOv2Config.model_validate(
        {
            "optim": {key: optim[key] for key in own}
            | {"freeze_last_layer": optim["freeze_last_layer_epochs"], "epoch_length": length},
            "teacher": {key: teacher[key] for key in of_teacher}
            | {"final_momentum_teacher": float(teacher["final_momentum_teacher"])},
            "train": {"batch_size": r["train"]["batch_size_per_gpu"] * f.config["world_size"]},
        }
    )
    assert config.peak_lr == pytest.approx(f.scalars["scaled_lr"], rel=1e-12)
    total = f.scalars["total_iterations"]
    assert total == optim["epochs"] * length
    schedules = Schedules(config, total, steps_per_epoch=7)  # steps_per_epoch must have no effect here
    rtol, atol = f.tolerance["rtol"], f.tolerance["atol"]
    for name in ("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp"):
        ours = [getattr(schedules, name)(step) for step in t["iterations"].tolist()]
        np.testing.assert_allclose(ours, t[name].numpy(), rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", cases("dinov2_masking"))
def test_mask_statistics(case: str) -> None:
    """For a fixed target: the number of masked patches, their positions, and how often neighbours are masked."""
    f = load(case)
    fixed = {name: s for name, s in f.scalars.items() if "target" in s}
    assert len(fixed) == 6
    for name, s in fixed.items():
        side = int(name.removeprefix("grid").split("_")[0])
        uniforms = iter(np.random.default_rng(f.meta["seed"]).random, None)
        stack = np.zeros((s["n_masks"], side, side), dtype=bool)
        for mask in stack:
            mask_blocks(uniforms, mask, s["target"], smallest=SMALLEST_BLOCK, largest=mask.size // 2)
        masks = torch.from_numpy(stack)
        counts = masks.flatten(1).sum(dim=1).double()
        error = s["std_masked"] / math.sqrt(s["n_masks"])
        assert counts.mean().item() == pytest.approx(s["mean_masked"], abs=4 * math.sqrt(2) * error), name
        assert counts.max().item() == s["target"]
        inner = masks[..., :-1]
        both, first = (inner & masks[..., 1:]).flatten(1).sum(dim=1), inner.flatten(1).sum(dim=1)
        neighbours = (both / first).mean().item()
        assert neighbours == pytest.approx(s["mean_right_neighbour_masked_given_masked"], abs=0.03), name
        position = f.tensors[f"{name}.position_probability"].double()
        torch.testing.assert_close(masks.double().mean(dim=0), position, rtol=0, atol=0.07)


@pytest.mark.parametrize("grid", [14, 16])
@pytest.mark.parametrize("case", cases("dinov2_masking"))
def test_mask_statistics_of_a_batch(case: str, grid: int) -> None:
    f = load(case)
    s, images = f.scalars[f"collate_grid{grid}"], f.scalars[f"collate_grid{grid}"]["batch_images"]
    sampler = MaskSampler(grid=(grid, grid), num_candidates=1, probability=0.5, ratio=(0.1, 0.5), seed=f.meta["seed"])
    batches = [
        sampler([(batch, image) for image in range(images)]).flatten(0, 1).flatten(1) for batch in range(s["n_batches"])
    ]
    for masks in batches:
        masked = masks.any(dim=1)
        assert masked.double().mean().item() == pytest.approx(s["share_of_crops_masked"], abs=0.005)
        # the upstream's padding: the largest number of patches that the ratios can give
        slices = torch.linspace(0.1, 0.5, int(masked.sum()) + 1)[1:]
        assert [sum(int(grid**2 * ratio) for ratio in slices)] == s["upperbound"]
        assert masks.sum() <= s["upperbound"][0]
    shares = torch.cat([masks[masks.any(dim=1)] for masks in batches]).double().mean(dim=1)
    totals = torch.stack([masks.sum() for masks in batches]).double()
    error = s["std_n_masked"] / math.sqrt(s["n_batches"])
    assert totals.mean().item() == pytest.approx(s["mean_n_masked"], abs=4 * math.sqrt(2) * error)
    assert totals.std().item() < 2 * s["std_n_masked"], "ratios are stratified, so the totals of batches hardly differ"
    assert shares.mean().item() == pytest.approx(s["mean_fraction_over_masked_crops"], abs=1e-3)
    assert shares.std().item() == pytest.approx(s["std_fraction_over_masked_crops"], abs=2e-3)


@pytest.mark.parametrize("case", cases("dinov2_total"))
def test_total_objective(case: str) -> None:
    """Compare a whole forward and backward pass: every logged loss, both centres, some gradients."""
    f = load(case)
    c, t, shift = f.config, f.tensors, f.config["input_shift"]

    def network(state: dict[str, Tensor]) -> Network:
        sizes = {key: c[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
        head = {
            "hidden_dim": c["head_hidden"],
            "bottleneck_dim": c["head_bottleneck"],
            "norm_last_layer": False,
        }
        separate = c["separate_ibot_head"]
        net = Network(
            RegisterVisionTransformer(**sizes, img_size=c["global_px"]),
            DINOHead(c["embed_dim"], c["dino_prototypes"], **head),
            DINOHead(c["embed_dim"], c["ibot_prototypes"], **head) if separate else None,
        )
        net.load_state_dict(state)
        return net

    states = f.group("state")
    student, teacher = (
        network({k.removeprefix(f"{name}."): v for k, v in states.items() if k.startswith(f"{name}.")})
        for name in ("student", "teacher")
    )
    loss_fn = DINOv2Loss(
        c["dino_prototypes"],
        c["ibot_prototypes"],
        2 + c["n_local"],
        centering=c["centering"],
        koleo_weight=c["koleo_weight"],
    )
    loss_fn.dino_loss.center.copy_(t["dino_center_before"])
    loss_fn.ibot_patch_loss.center.copy_(t["patch_center_before"])

    masks = t["masks"].bool()
    assert int(masks.sum()) == c["n_masked"]
    whole = formula_images(2 * c["B"], c["global_px"], c["global_px"], shift)
    local = formula_images(c["n_local"] * c["B"], c["local_px"], c["local_px"], shift + 1)
    with torch.no_grad():
        embedded = teacher.embed_teacher(whole, masks)
        teacher_cls = teacher.dino_head.last_layer(embedded[0])
        teacher_patch = teacher.patch_head.last_layer(embedded[1])
    out = student([whole, local], masks)
    losses = loss_fn(out.cls, out.patch, out.features.backbone, teacher_cls, teacher_patch, masks, c["teacher_temp"])
    losses.loss.backward()
    assert_close(losses.loss, t["total_loss"], f, "total")
    assert_close(losses.dino_local, t["loss.dino_local_crops_loss"], f, "local crops")
    assert_close(losses.dino_global, t["loss.dino_global_crops_loss"], f, "global crops")
    # upstream logs half of these
    assert_close(losses.koleo / 2, t["loss.koleo_loss"], f, "KoLeo")
    assert_close(losses.ibot / 2, t["loss.ibot_loss"], f, "patches")
    gradients = f.group("grad")
    parameters = dict(student.named_parameters())
    for name, expected in gradients.items():
        assert_close(parameters[name].grad, expected, f, name)
    loss_fn.center_step(teacher_cls, teacher_patch)
    loss_fn.update_center()
    assert_close(loss_fn.dino_loss.center, t["dino_center_after"], f, "centre")
    assert_close(loss_fn.ibot_patch_loss.center, t["patch_center_after"], f, "centre of patches")


@pytest.mark.parametrize("model", checkpoint_models("dinov2_train"))
def test_training_checkpoint_keys_and_shapes(model: str) -> None:
    facts = load_checkpoint_keys(model)
    entries = facts["entries"]["model"]
    ours = described(real_loss(entries))
    for part in ("student", "teacher"):
        ours += [[f"{part}.{name}", *rest] for name, *rest in described(real_network(entries, part))]
    assert ours == renamed(entries)


@pytest.mark.parametrize("model", checkpoint_models("dinov2_train"))
def test_parameter_groups(model: str) -> None:
    facts = load_checkpoint_keys(model)
    groups = facts["param_groups"]
    theirs = {
        f"{part}.{own_name(name)}": values for part in groups if part != "columns" for name, *values in groups[part]
    }
    student = real_network(facts["entries"]["model"], "student")
    num_blocks = student.backbone.num_blocks
    # Infer the reference model's configuration from its rates.
    decay = theirs[f"backbone.blocks.{num_blocks - 1}.norm1.weight"][0]
    patch_embed_lr_mult = theirs["backbone.patch_embed.proj.weight"][0] / theirs["backbone.cls_token"][0]
    names = {parameter: name for name, parameter in student.named_parameters()}
    ours = {
        names[parameter]: (group["lr_multiplier"], group["wd_multiplier"], group["last_layer"])
        for group in parameter_groups(student, layerwise_decay=decay, patch_embed_lr_mult=patch_embed_lr_mult)
        for parameter in group["params"]
    }
    assert ours.keys() == theirs.keys()
    for name, (lr, wd, last) in ours.items():
        assert [pytest.approx(lr, rel=1e-9), wd, last] == theirs[name], name
    assert layer_decay("backbone.norm.weight", num_blocks, decay) == 1


@pytest.mark.parametrize("model", [m for m in checkpoint_models("dinov2_") if "released" in m])
def test_released_backbones_are_recognised_by_their_keys(model: str) -> None:
    entries = load_checkpoint_keys(model)["entries"]["(file)"]
    state = {name: torch.empty(shape, device="meta") for name, shape, _ in entries}
    with torch.device("meta"):
        encoder = encoder_from_state(state)
    assert encoder is not None
    assert {k: p.shape for k, p in encoder.state_dict().items()} == {k: p.shape for k, p in state.items()}
    vit = vit_of(shapes_of(entries))
    assert vit is not None
    assert [encoder.patch_size, encoder.num_blocks] == [vit.patch_size, vit.depth]


def real_network(entries: list[list[Any]], part: str) -> Network:
    """Build the student or the teacher of a training checkpoint, without memory for the weights."""
    shapes = shapes_of(entries, f"{part}.backbone")
    vit = vit_of(shapes)
    assert vit is not None
    with torch.device("meta"):
        backbone = build_register_vit(
            arch_of(shapes),
            patch_size=vit.patch_size,
            img_size=vit.img_size,
            init_values=1e-5 if "blocks.0.ls1.gamma" in shapes else 0.0,
            swiglu="blocks.0.mlp.w12.weight" in shapes,
            num_registers=shapes["register_tokens"][1] if "register_tokens" in shapes else 0,
        )
        heads = [shapes_of(entries, f"{part}.{name}_head") for name in ("dino", "ibot")]
        dino, ibot = (DINOHead(**head_sizes(head), norm_last_layer=False) if head else None for head in heads)
        assert dino is not None
        return Network(backbone, dino, ibot)


def real_loss(entries: list[list[Any]]) -> DINOv2Loss:
    """Build the loss of a training checkpoint, with its two centres."""
    shapes = shapes_of(entries)
    dino, ibot = (shapes[f"{name}_loss.center"][-1] for name in ("dino", "ibot_patch"))
    return DINOv2Loss(dino, ibot, 10, centering="centering")
