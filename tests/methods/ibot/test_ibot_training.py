"""The iBOT trainer on a little real data: its own behaviour.

Behaviour that all trainers share is tested in tests/methods/test_every_method.py.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvp.common.errors import UserError
from hvp.common.evaluation.checkpoints import load_encoder
from hvp.common.training.selecting import Kept, ViewSelector
from hvp.common.views import normalize
from hvp.methods.ibot import main_ibot
from hvp.methods.ibot.config import IbotConfig
from hvp.methods.ibot.main_ibot import (
    build_encoder,
    build_loss,
    build_masks,
    build_networks,
    teacher_outputs,
)
from hvp.methods.ibot.score import pair_losses
from tests import runs
from tests.runs import CPU, Trained, first_batch, tiny

SMALL = {
    **runs.SMALL,
    "data.shapes.train": 48,
    "train.epochs": 2,
    "model.norm_in_head": None,
    "masks.pred_ratio": [0.0, 0.3],
    "masks.pred_ratio_var": [0.0, 0.1],
    "optim.warmup_epochs": 1,
}


def small(**values: Any) -> IbotConfig:
    return tiny(IbotConfig, "ibot", SMALL, **values)


def train(config: IbotConfig, out: Path) -> Trained:
    return runs.train("ibot", config, out)


class Scored:
    """Fresh networks and the candidates of a batch, with their masks."""

    def __init__(self, config: IbotConfig) -> None:
        torch.manual_seed(0)
        self.student, self.teacher = build_networks(config, CPU)
        mask_token = self.student.backbone.masked_embed
        assert mask_token is not None
        torch.nn.init.normal_(mask_token)
        self.ibot_loss = build_loss(config)
        self.selector = ViewSelector(config, total_steps=1)
        batch = first_batch(config, build_masks(config))
        assert batch.masks is not None
        self.crops = [normalize(pixels) for pixels in batch.pixels]
        self.masks: Tensor = batch.masks.flatten(2)

    def select(self, step: int = 0):
        """Return the kept views, the pair losses, and the teacher's embedding of all candidates."""
        with self.selector.scoring(self.student, self.teacher):
            losses, embedding = pair_losses(self.student, self.teacher, self.crops, self.masks, self.ibot_loss, 0)
        return self.selector.keep(self.crops, losses, step), losses, embedding


def test_a_run_trains_both_centres_and_the_mask_token(tmp_path):
    run = train(small(), tmp_path / "run")
    state = run.checkpoint
    assert (state["step"], state["epoch"], state["method"]) == (12, 2, "ibot")
    assert state["ibot_loss"].keys() == {"center", "center2"}
    assert all(value.abs().sum() > 0 for value in state["ibot_loss"].values())
    assert state["student"].keys() - state["teacher"].keys() == {"backbone.masked_embed"}
    assert state["student"]["backbone.masked_embed"].any(), "the mask token learns"
    # two of four global crops, two of four local ones
    assert all(sum(row["kept_hist"]) == pytest.approx(4) for row in run.rows)
    assert all(0 < row["loss_patch"] < row["loss_cls"] for row in run.rows)


@pytest.mark.parametrize("shared_head", [True, False])
def test_the_teacher_follows_every_parameter_of_the_student_but_the_mask_token(tmp_path, shared_head):
    """With the upstream's default heads the teacher starts from the patch head and never follows it (README)."""
    run = train(small(model__shared_head=shared_head, model__momentum_teacher=0.0, train__epochs=1), tmp_path / "run")
    state = run.checkpoint
    assert 0 < run.rows[-1]["momentum"] < 1
    for name, value in state["teacher"].items():
        if not name.endswith("weight_g"):  # fixed at 1
            assert not torch.equal(value, state["student"][name]), name
    assert torch.equal(state["teacher"]["head.last_layer.weight_v"], state["teacher"]["head.last_layer2.weight_v"]) is (
        shared_head
    )


def test_prototypes_of_both_kinds_stay_while_they_are_frozen(tmp_path):
    frozen = train(small(optim__freeze_last_layer=2), tmp_path / "frozen").checkpoint["student"]
    fresh = Scored(small()).student.state_dict()
    moving = train(small(), tmp_path / "moving").checkpoint["student"]
    for name in ("head.last_layer.weight_v", "head.last_layer2.weight_v"):
        assert torch.equal(frozen[name], fresh[name])
        assert not torch.equal(moving[name], fresh[name])


@pytest.mark.parametrize("local_crops", [0, 2])
@pytest.mark.parametrize("global_pairs", ["by_transform", "any"])
def test_kept_loss_is_the_objective_of_the_kept_crops_under_their_masks(local_crops, global_pairs):
    """The loss that `select()` maximises is the one that the step then trains on, image by image."""
    scored = Scored(
        small(
            selection__search="exact",
            selection__global_pairs=global_pairs,
            views__local_crops_number=local_crops,
            selection__local_candidates=2 * local_crops,
        )
    )
    kept, _, (cls, patches) = scored.select()
    masks = Kept(kept.index).of(scored.masks)
    assert masks.any()
    assert not masks.all(dim=1).any()
    kept_cls, kept_patches = Kept(kept.index).of(cls), Kept(kept.index).of(patches)
    for b in range(8):
        rows = [b, 8 + b]  # this image's of [2 B, ...]
        views = [crop[:, b] for crop in kept.views]
        targets = teacher_outputs(scored.teacher.head, kept_cls[rows], kept_patches[rows], masks[rows])
        losses = scored.ibot_loss(*scored.student(views, masks[rows])[:2], *targets[:2], masks[rows], 0)
        assert float(kept.loss[b]) == pytest.approx(losses.loss.item(), rel=1e-4)


def test_masks_travel_with_the_views():
    scored = Scored(small())
    kept, _, _ = scored.select()
    globals_, masks = kept.views[0].flatten(0, 1), Kept(kept.index).of(scored.masks)
    for row, (view, mask) in enumerate(zip(globals_, masks, strict=True)):
        b = row % 8
        (number,) = [g for g in range(4) if torch.equal(scored.crops[0][g, b], view)]
        assert torch.equal(scored.masks[number, b], mask)
        assert number == kept.index[b, row // 8]


def test_masks_of_a_step_that_does_not_select_are_those_of_the_first_candidates(tmp_path, monkeypatch):
    seen: list[Tensor] = []
    forward = main_ibot.iBOTLoss.forward

    def seeing(self: main_ibot.iBOTLoss, *args: Any) -> Any:
        seen.append(args[4])
        return forward(self, *args)

    monkeypatch.setattr(main_ibot.iBOTLoss, "forward", seeing)
    train(small(train__epochs=1, selection__hard_views="none"), tmp_path / "vanilla")
    train(small(train__epochs=1, selection__start=1.0), tmp_path / "later")
    vanilla, later = seen[:6], seen[6:]
    first = [torch.equal(a[:8], b[:8]) for a, b in zip(vanilla, later, strict=True)]
    assert all(first), "a mask depends on the number of its view"


def test_reused_teacher_outputs_are_those_of_the_kept_crops():
    scored = Scored(small())
    kept, _, embedding = scored.select()
    again = scored.teacher.embed(kept.views[0].flatten(0, 1))
    for ours, expected in zip(embedding, again, strict=True):
        torch.testing.assert_close(Kept(kept.index).of(ours), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_in_head", [None, "bn"])
def test_the_teacher_sees_kept_crops_again_only_with_batch_norm(tmp_path, monkeypatch, norm_in_head):
    seen: list[int] = []
    embed = main_ibot.MultiCropWrapper.embed

    def seeing(self: main_ibot.MultiCropWrapper, views: Tensor, masks: Tensor | None = None) -> Any:
        if self.backbone.masked_embed is None:
            seen.append(len(views))
        return embed(self, views, masks)

    monkeypatch.setattr(main_ibot.MultiCropWrapper, "embed", seeing)
    train(small(model__norm_in_head=norm_in_head, train__epochs=1), tmp_path / "run")
    assert seen == ([32] * 6 if norm_in_head is None else [32, 16] * 6)


def test_the_centre_of_patches_follows_the_mean_over_all_of_them():
    scored = Scored(small())
    cls, patches = scored.teacher.embed(scored.crops[0].flatten(0, 1))
    masks = scored.masks.flatten(0, 1)
    logits = scored.teacher.head.last_layer2(patches)  # [n, N, K2]
    _, masked, mean = teacher_outputs(scored.teacher.head, cls, patches, masks)
    torch.testing.assert_close(masked, logits[masks])
    torch.testing.assert_close(mean, logits.mean(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scoring_leaves_no_trace(mode):
    scored = Scored(small(selection__mode=mode))
    modules = scored.student, scored.teacher, scored.ibot_loss
    before = [value.clone() for module in modules for value in module.state_dict().values()]
    scored.select()
    after = [value for module in modules for value in module.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in scored.student.parameters())


def test_accumulation_keeps_the_global_batch(tmp_path):
    values = {"train__epochs": 1, "optim__base_lr": 0.001}
    whole = train(small(**values), tmp_path / "whole")
    halves = train(small(**values, train__accumulate=2), tmp_path / "halves")
    ours, expected = halves.checkpoint, whole.checkpoint
    for key in ("backbone.blocks.0.mlp.fc1.weight", "backbone.masked_embed"):
        torch.testing.assert_close(ours["student"][key], expected["student"][key], rtol=0, atol=5e-5)
    for name in ("center", "center2"):
        torch.testing.assert_close(ours["ibot_loss"][name], expected["ibot_loss"][name], rtol=1e-4, atol=1e-5)
    for a, b in zip(halves.rows, whole.rows, strict=True):
        assert a["loss_patch"] == pytest.approx(b["loss_patch"], rel=1e-3)


def test_epochs_before_the_masks_begin_train_without_them(tmp_path):
    run = train(small(masks__pred_start_epoch=1), tmp_path / "run")
    patch = [row["loss_patch"] for row in run.rows]
    assert patch[:6] == [0.0] * 6
    assert all(value > 0 for value in patch[6:])


def test_a_collapsed_run_is_reported(tmp_path, monkeypatch):
    """Temperatures so high that all distributions are uniform: the [CLS] loss stays at ln K."""
    monkeypatch.setattr("hvp.common.training.step.CollapseWatch.__init__.__defaults__", (3,), raising=True)
    hot = {"loss__student_temp": 1e6, "loss__teacher_temp": 1e6, "loss__warmup_teacher_temp": 1e6}
    said = train(small(**hot), tmp_path / "run").said
    assert f"ln(out_dim) = {math.log(128):.3f}" in said
    assert "step 3: the network has collapsed" in said


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("layout", ["ours", "upstream", "bare"])
def test_checkpoints_load_for_evaluation_without_the_mask_token(tmp_path, network, layout):
    config = small()
    scored = Scored(config)
    module = getattr(scored, network)
    file = tmp_path / "checkpoint.pth"
    if layout == "ours":
        run = train(config, tmp_path / "run")
        file = run.out / "last.pt"
        module.load_state_dict(run.checkpoint[network])
    elif layout == "upstream":
        student = {f"module.{name}": value for name, value in scored.student.state_dict().items()}
        states = {"student": student, "teacher": scored.teacher.state_dict(), "epoch": 3}
        torch.save(states | {"ibot_loss": scored.ibot_loss.state_dict()}, file)
    else:
        torch.save({"state_dict": module.backbone.state_dict()}, file)
    encoder, meta = load_encoder(file, None if layout == "bare" else network)
    x = scored.crops[0][0]
    torch.testing.assert_close(encoder(x), module.backbone.eval()(x))
    assert any("masked_embed" in name for name in meta.dropped) is (network == "student")
    assert not any("masked_embed" in name for name in encoder.state_dict())
    assert build_encoder(config).state_dict().keys() == encoder.state_dict().keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__shared_head": True, "model__patch_out_dim": 64}, "a shared head has model.out_dim = 128"),
        ({"masks__pred_ratio": [0.3]}, "pred_ratio has 1 values and masks.pred_ratio_var 2"),
        ({"masks__pred_ratio": [0.1, 0.3], "masks__pred_ratio_var": [0.2, 0.0]}, "leaves the range from 0 to 1"),
        ({"selection__local_candidates": 1}, "selection.local_candidates = 1, but views.local_crops_number = 2"),
        ({"views__local_crops_size": 20}, "views.local_crops_size = 20 is not a multiple"),
        ({"optim__warmup_epochs": 3}, "optim.warmup_epochs = 3 is longer"),
        ({"loss__warmup_teacher_temp_epochs": 2, "masks__pred_start_epoch": 1}, "is longer than train.epochs = 2"),
    ],
)
def test_inconsistent_values_are_refused(values, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        small(**values)
