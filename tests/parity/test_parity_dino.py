"""DINO compared with the reference implementation's numbers, at the fixtures' tolerances."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from hvp.common.hardviews import Group, Slots, select
from hvp.common.losses.cross_entropy import pair_cross_entropies
from hvp.common.networks import encoder_from_state
from hvp.common.networks.heads import DINOHead
from hvp.common.networks.vision_transformer import VisionTransformer
from hvp.common.training.optimizers import LARS, clip_gradients, split_weight_decay
from hvp.common.training.schedules import cosine, linear_then_constant, warmup_cosine
from hvp.methods.dino.dino_loss import DINOLoss
from hvp.methods.dino.multi_crop import MultiCropWrapper
from tests.parity import dino_steps
from tests.parity.fixtures import Fixture, assert_close, cases, checkpoint_models, load, load_checkpoint_keys
from tests.parity.reference_models import build_encoder, described, head_sizes, renamed, shapes_of


@pytest.mark.parametrize("case", cases("dino_loss"))
def test_loss_gradient_and_center(case: str) -> None:
    f = load(case)
    t = f.tensors
    loss_fn = dino_loss_of(f)
    epoch = f.config["epoch"]
    assert loss_fn.teacher_temp(epoch) == pytest.approx(f.scalars["teacher_temp"], rel=1e-12)

    student = t["student_output"].clone().requires_grad_()
    loss = loss_fn(student, t["teacher_output"], epoch)
    loss.backward()
    assert_close(loss, t["loss"], f, "loss")
    assert_close(student.grad, t["grad_student_output"], f, "gradient")
    assert torch.equal(loss_fn.center, t["center_before"]), "the loss must not move the centre"

    loss_fn.center_step(t["teacher_output"])
    loss_fn.update_center()
    assert_close(loss_fn.center, t["center_after"], f, "centre")
    assert_close(loss_fn(student, t["teacher_output_2"], epoch), t["loss_2"], f, "second loss")
    loss_fn.center_step(t["teacher_output_2"])
    loss_fn.update_center()
    assert_close(loss_fn.center, t["center_after_2"], f, "second centre")


@pytest.mark.parametrize("case", cases("dino_loss"))
def test_center_over_two_micro_batches(case: str) -> None:
    f = load(case)
    loss_fn = dino_loss_of(f)
    loss_fn.center_step(f.tensors["teacher_output"])
    loss_fn.center_step(f.tensors["teacher_output_2"])
    loss_fn.update_center()
    assert_close(loss_fn.center, f.tensors["center_after_two_microbatches"], f, "centre")


@pytest.mark.parametrize("case", cases("dino_loss"))
def test_pair_losses_sum_to_the_loss_of_each_image(case: str) -> None:
    f = load(case)
    matrix = matrix_of(f, f.tensors["center_before"])
    per_image = matrix.sum(dim=(1, 2)) - matrix.diagonal(dim1=1, dim2=2).sum(dim=1)
    assert_close(per_image, f.tensors["per_sample_loss_sum"], f, "sum over the pairs")


@pytest.mark.parametrize("case", cases("dino_select"))
def test_pair_losses_of_every_combination(case: str) -> None:
    f = load(case)
    matrix = matrix_of(f, f.tensors["center"])  # [B, T, V]
    for combination, expected in zip(
        f.tensors["combinations"].tolist(), f.tensors["per_combination_loss"], strict=True
    ):
        pairs = [(t, v) for t in combination[:2] for v in combination if v != t]
        loss = sum((matrix[:, t, v] for t, v in pairs), torch.zeros(()))
        assert_close(loss, expected, f, str(combination))


@pytest.mark.parametrize("case", cases("dino_select"))
def test_selection(case: str) -> None:
    f = load(case)
    c, combinations = f.config, f.tensors["combinations"]
    globals_, locals_ = range(c["n_global_loaded"]), range(c["n_local_loaded"])
    slots = Slots(
        (
            Group(tuple(globals_[0::2]), 1),
            Group(tuple(globals_[1::2]), 1),
            Group(tuple(len(globals_) + v for v in locals_), c["n_local_selected"]),
        )
    )
    matrix = matrix_of(f, f.tensors["center"])
    kept = select([], matrix, slots, combinations=combinations)
    assert torch.equal(kept.index.T, f.tensors["selected"])
    num_terms = 2 * (slots.num_slots - 1)  # the released code sums where the objective averages
    assert_close(kept.loss * num_terms, f.tensors["score"], f, "score")
    if c["full_enumeration"]:
        assert torch.equal(slots.all_combinations(), combinations)
        assert torch.equal(select([], matrix, slots, search="exact").index.T, f.tensors["selected"])


def dino_loss_of(f: Fixture) -> DINOLoss:
    c = f.config
    loss_fn = DINOLoss(
        c["out_dim"], c["ncrops"], c["wtt"], c["tt"], c["wte"], c["ne"], c["student_temp"], c["center_momentum"]
    )
    loss_fn.center.copy_(f.tensors["center_before"])
    return loss_fn


def matrix_of(f: Fixture, center: Tensor) -> Tensor:
    batch = f.config["B"]
    teacher = f.tensors["teacher_output"].unflatten(0, (-1, batch))
    student = f.tensors["student_output"].unflatten(0, (-1, batch))
    return pair_cross_entropies(teacher, student, center, f.scalars["teacher_temp"], f.config["student_temp"])


@pytest.mark.parametrize("case", cases("dino_schedule"))
def test_schedules(case: str) -> None:
    f = load(case)
    c, total = f.config, f.config["epochs"] * f.config["niter"]
    warmup = c["warmup"] * c["niter"]
    values = {
        "lr": [
            warmup_cosine(i, base=c["lr"], final=c["min_lr"], total_steps=total, warmup_steps=warmup, start=c["start"])
            for i in range(total)
        ],
        "weight_decay": [cosine(i, base=c["wd"], final=c["wd_end"], total_steps=total) for i in range(total)],
        "momentum": [cosine(i, base=c["m"], final=1.0, total_steps=total) for i in range(total)],
        "teacher_temp": [linear_then_constant(e, c["wtt"], c["tt"], c["wte"]) for e in range(c["epochs"])],
    }
    for name, value in values.items():
        assert_close(torch.tensor(value, dtype=torch.float64), f.tensors[name], f, name)


@pytest.mark.parametrize("case", cases("dino_head"))
def test_head(case: str) -> None:
    f = load(case)
    c = f.config
    sizes = {key: c[key] for key in ("use_bn", "norm_last_layer", "nlayers", "hidden_dim", "bottleneck_dim")}
    head = DINOHead(c["in_dim"], c["out_dim"], **sizes)
    head.load_state_dict(f.group("state"))
    assert {name: p.requires_grad for name, p in head.named_parameters()} == c["requires_grad"]

    y = head(f.tensors["x"])
    (y * f.tensors["cotangent"]).sum().backward()
    assert_close(y, f.tensors["y"], f, "y")
    gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    assert gradients.keys() == f.group("grad").keys()
    for name, gradient in gradients.items():
        assert_close(gradient, f.tensors[f"grad.{name}"], f, f"gradient of {name}")
    for name, buffer in f.group("state_after").items():
        assert_close(head.state_dict()[name], buffer, f, name)
    frozen = head.last_layer.frozen()
    head.eval()
    embedding = head.embed(f.tensors["x"])
    assert_close(frozen(embedding), head.last_layer(embedding).detach(), f, "frozen layer")


@pytest.mark.parametrize("case", cases("dino_vit"))
def test_vision_transformer(case: str) -> None:
    f = load(case)
    c, t = f.config, f.tensors
    backbone = VisionTransformer(
        img_size=c["img_size"],
        patch_size=c["patch_size"],
        embed_dim=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
    ).eval()
    backbone.load_state_dict(f.group("state"))
    images = {
        name: dino_steps.formula_images(batch, height, width, c["input_shift"])
        for name, (batch, height, width) in c["inputs"].items()
    }
    with torch.no_grad():
        for name, x in images.items():
            assert_close(backbone(x), t[f"cls_{name}"], f, f"cls of {name}")
            if f"posembed_{name}" in t:
                posembed = backbone.interpolate_pos_encoding(*x.shape[-2:])
                assert_close(posembed, t[f"posembed_{name}"], f, f"position embedding of {name}")
        layers = backbone.get_intermediate_layers(images["x224"], 2)
        intermediate_cls = torch.stack([layer[:, 0] for layer in layers])
        assert_close(intermediate_cls, t["intermediate_cls_x224_n2"], f, "intermediate cls")
        assert_close(layers[-1], t["last_tokens_x224"], f, "last tokens")

        head = DINOHead(**c["head"])
        head.load_state_dict(f.group("head_state"))
        sizes = [224, 224, 96, 96, 96]
        views = [dino_steps.formula_images(2, s, s, c["input_shift"] + i) for i, s in enumerate(sizes)]
        wrapper = MultiCropWrapper(backbone, head)
        assert_close(wrapper(views)[0], t["multicrop_output"], f, "multi-crop output")
        batched = [torch.cat(views[:2]), torch.cat(views[2:])]
        assert_close(wrapper(batched)[0], t["multicrop_output"], f, "multi-crop output, one tensor per resolution")


@pytest.mark.parametrize("by", ["tensor", "global"])
@pytest.mark.parametrize("case", cases("dino_clip"))
def test_clipping(case: str, by: Literal["tensor", "global"]) -> None:
    f = load(case)
    gradients = f.group("grad_in")
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients.values()]
    for parameter, gradient in zip(parameters, gradients.values(), strict=True):
        parameter.grad = gradient.clone()
    norms = clip_gradients(parameters, f.config["clip"], by=by)

    expected = torch.tensor(f.scalars["norms" if by == "tensor" else "total_norm"])
    assert_close(norms, expected, f, "norms")
    name = "grad_per_parameter" if by == "tensor" else "grad_global_norm"
    for key, parameter in zip(gradients, parameters, strict=True):
        assert_close(parameter.grad, f.tensors[f"{name}.{key}"], f, f"gradient {key}")


@pytest.mark.parametrize("variant", ["dino", "hvp_simclr"])
@pytest.mark.parametrize("case", cases("lars"))
def test_lars(case: str, variant: str) -> None:
    f = load(case)
    c = f.config
    parameters = {name: nn.Parameter(p.clone()) for name, p in f.group("param").items()}
    optimizer = LARS(parameters.values(), weight_decay=c["weight_decay"], momentum=c["momentum"], eta=c["trust"])
    for step, lr in enumerate(c["lrs"]):
        optimizer.param_groups[0]["lr"] = lr
        gradients = f.group(f"grad{step}")
        for name, parameter in parameters.items():
            parameter.grad = gradients.get(name)
        optimizer.step()
        for name, expected in f.group(f"{variant}.step{step + 1}").items():
            assert_close(parameters[name], expected, f, f"{name} after step {step + 1}")


@pytest.mark.parametrize("case", cases("dino_step"))
def test_training_steps(case: str) -> None:
    f = load(case)
    dino_steps.assert_outcome(f, dino_steps.train(f))


@pytest.mark.parametrize("case", cases("hvp_dino_step"))
def test_training_steps_with_hard_views(case: str) -> None:
    f = load(case)
    outcome = dino_steps.train(f)
    num_terms = 2 * (f.config["nl"] + 1)  # the released code sums where the objective averages
    for step, kept in enumerate(outcome.selections):
        selected = dino_steps.in_loader_order(f.tensors["selected"][step], f.config["ng"])  # [S, B]
        assert torch.equal(kept.index.T, selected), step
        rtol = f.tolerance["losses"]["rtol"]
        torch.testing.assert_close(kept.loss * num_terms, f.tensors["score"][step], rtol=rtol, atol=0.0)
    assert len(outcome.selections) == len(f.tensors["selected"])
    dino_steps.assert_outcome(f, outcome)


def outcome_as_expected(f: Fixture) -> dino_steps.Outcome:
    """Outcome of a training run that equals the fixture exactly."""
    t, epochs = f.tensors, range(1, f.config["epochs"] + 1)
    return dino_steps.Outcome(
        losses=t["losses"].tolist(),
        student=[f.group(f"student_epoch{epoch}") for epoch in epochs],
        teacher=[f.group(f"teacher_epoch{epoch}") for epoch in epochs],
        center=[t[f"center_epoch{epoch}"] for epoch in epochs],
        lr=t["lr"].tolist(),
        weight_decay=t["weight_decay"].tolist(),
        momentum=t["momentum"].tolist(),
    )


@pytest.mark.parametrize(("third", "share", "passes"), [(1, 0.99, True), (1, 1.01, False), (0, 0.99, False)])
@pytest.mark.parametrize("case", cases("dino_step"))
def test_only_a_key_bias_may_be_off_by_the_steps_of_the_run(case: str, third: int, share: float, passes: bool) -> None:
    f = load(case)
    outcome = outcome_as_expected(f)
    key = next(key for key in outcome.student[-1] if key.endswith("attn.qkv.bias"))
    moved = outcome.student[-1][key] = outcome.student[-1][key].clone()
    moved.chunk(3)[third].add_(share * f.tensors["lr"].sum())
    with nullcontext() if passes else pytest.raises(AssertionError, match=key):
        dino_steps.assert_outcome(f, outcome)


MODELS = [*checkpoint_models("dino_"), *checkpoint_models("hvp_dino_")]


@pytest.mark.parametrize("model", MODELS)
def test_checkpoint_keys_and_shapes(model: str) -> None:
    facts = load_checkpoint_keys(model)
    for part, expected in facts["entries"].items():
        # The running centre is reset in every step; we do not save it.
        expected = [entry for entry in renamed(expected) if entry[0] != "running_center"]
        assert described(real_sizes(facts, part)) == expected, part


@pytest.mark.parametrize("model", MODELS)
def test_encoder_is_recognised_by_the_keys_of_a_checkpoint(model: str) -> None:
    facts = load_checkpoint_keys(model)
    entries = facts["entries"]
    shapes = shapes_of(entries["teacher"], "backbone") if "teacher" in entries else shapes_of(entries["(file)"])
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        encoder = encoder_from_state(state)
    assert encoder is not None
    assert {k: p.shape for k, p in encoder.state_dict().items()} == {k: p.shape for k, p in state.items()}


@pytest.mark.parametrize("model", checkpoint_models("dino_", having="optimizer_groups"))
def test_optimizer_groups(model: str) -> None:
    facts = load_checkpoint_keys(model)
    wrapper = real_sizes(facts, "student")
    names = {parameter: name for name, parameter in wrapper.named_parameters()}
    groups = split_weight_decay(wrapper.named_parameters())
    for ours, theirs in zip(groups, facts["optimizer_groups"], strict=True):
        assert [f"module.{names[p]}" for p in ours["params"]] == theirs["names"]
        assert ours.get("weight_decay", "schedule") == theirs["weight_decay"]


def real_sizes(facts: dict[str, Any], part: str) -> nn.Module:
    """Build a network of a reference model, or its loss, at real size but without memory for the weights."""
    entries = facts["entries"][part]
    with torch.device("meta"):
        if part == "dino_loss":
            return DINOLoss(shapes_of(entries)["center"][1], 10, 0.04, 0.04, 0, 100)
        if part == "(file)":
            return build_encoder(shapes_of(entries))
        backbone: Any = build_encoder(shapes_of(entries, "backbone"))
        norm_last_layer = facts.get("norm_last_layer", True)
        head = DINOHead(**head_sizes(shapes_of(entries, "head")), norm_last_layer=norm_last_layer)
        return MultiCropWrapper(backbone, head)
