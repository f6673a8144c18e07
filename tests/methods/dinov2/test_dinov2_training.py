"""The DINOv2 trainer on a little real data: its own behaviour.

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
from hvp.methods.dinov2 import main_dinov2
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.main_dinov2 import (
    build_loss,
    build_masks,
    build_networks,
    check_lengths,
    teacher_logits,
)
from hvp.methods.dinov2.networks import Network
from hvp.methods.dinov2.schedules import Schedules
from hvp.methods.dinov2.score import pair_losses
from tests import runs
from tests.runs import CPU, Trained, first_batch, tiny

SMALL = {**runs.SMALL, "data.shapes.train": 32, "train.epochs": 1, "optim.warmup_epochs": 0}


def small(**values: Any) -> DINOv2Config:
    return tiny(DINOv2Config, "dinov2", SMALL, **values)


def train(config: DINOv2Config, out: Path) -> Trained:
    return runs.train("dinov2", config, out)


class Scored:
    """Fresh networks and the candidates of a batch, with their masks."""

    temp = 0.05

    def __init__(self, config: DINOv2Config) -> None:
        torch.manual_seed(0)
        self.student, self.teacher = build_networks(config, CPU)
        torch.nn.init.normal_(self.student.backbone.mask_token)
        self.loss = build_loss(config)
        self.selector = ViewSelector(config, total_steps=1)
        batch = first_batch(config, build_masks(config))
        assert batch.masks is not None
        self.crops = [normalize(pixels) for pixels in batch.pixels]
        self.masks: Tensor = batch.masks.flatten(2)

    def select(self):
        """Return the kept views, and the teacher's embedding of all candidates."""
        with self.selector.scoring(self.student):
            losses, embedding = pair_losses(self.student, self.teacher, self.crops, self.masks, self.loss, self.temp)
        return self.selector.keep(self.crops, losses, 0), embedding


def test_a_run_trains_both_centres_and_the_mask_token(tmp_path):
    run = train(small(teacher__centering="centering"), tmp_path / "run")
    state = run.checkpoint
    assert (state["step"], state["epoch"], state["method"]) == (4, 1, "dinov2")
    assert state["dinov2_loss"].keys() == {"dino_loss.center", "ibot_patch_loss.center"}
    assert all(value.abs().sum() > 0 for value in state["dinov2_loss"].values())
    assert state["student"].keys() == state["teacher"].keys()
    assert state["student"]["backbone.mask_token"].any(), "the mask token learns"
    for row in run.rows:
        terms = [row[f"loss_{name}"] for name in ("global", "local", "koleo", "patch")]
        assert row["loss"] == pytest.approx(sum(terms), rel=1e-5)
        # two of four global crops, two of four local ones
        assert sum(row["kept_hist"]) == pytest.approx(4)


def test_two_heads_or_one(tmp_path):
    for separate in (True, False):
        state = train(small(ibot__separate_head=separate), tmp_path / str(separate)).checkpoint
        assert any(name.startswith("ibot_head.") for name in state["student"]) is separate


def test_the_teacher_follows_every_parameter_of_the_student(tmp_path):
    state = train(small(teacher__momentum_teacher=0.5), tmp_path / "run").checkpoint
    for name, value in state["teacher"].items():
        assert not torch.equal(value, state["student"][name]), name


def test_frozen_prototypes_stay(tmp_path):
    fresh = Scored(small()).student.state_dict()
    frozen = train(small(optim__freeze_last_layer=1), tmp_path / "frozen").checkpoint["student"]
    for name, value in fresh.items():
        if "mask_token" not in name:
            assert torch.equal(frozen[name], value) is ("last_layer" in name), name


@pytest.mark.parametrize(("global_pairs", "local_crops"), [("by_transform", 2), ("any", 0)])
def test_kept_loss_is_the_objective_of_the_kept_crops_under_their_masks(global_pairs, local_crops):
    """The loss that `select()` maximises is the one that the step then trains on, image by image, without KoLeo."""
    scored = Scored(
        small(
            teacher__centering="centering",
            dino__koleo_loss_weight=0.0,
            ibot__loss_weight=0.7,
            selection__search="exact",
            selection__global_pairs=global_pairs,
            views__local_crops_number=local_crops,
            selection__local_candidates=2 * local_crops,
        )
    )
    kept, (cls, patches) = scored.select()
    masks, kept_cls, kept_patches = map(Kept(kept.index).of, (scored.masks, cls, patches))
    assert masks.any()
    for b in range(8):
        rows = [b, 8 + b]  # this image's of [2 B, ...]
        views = [crop[:, b] for crop in kept.views]
        targets = teacher_logits(scored.teacher, views[0], masks[rows], (kept_cls[rows], kept_patches[rows]))
        out = scored.student(views, masks[rows])
        losses = scored.loss(out.cls, out.patch, out.features.backbone, *targets, masks[rows], scored.temp)
        assert float(kept.loss[b]) == pytest.approx(losses.loss.item(), rel=1e-4)


def test_scoring_balances_targets_over_all_candidates():
    scored = Scored(small())
    assert scored.loss.dino_loss.centering == "sinkhorn_knopp"
    with scored.selector.scoring(scored.student):
        losses, (cls, _) = pair_losses(
            scored.student, scored.teacher, scored.crops, scored.masks, scored.loss, scored.temp
        )
        logits = scored.teacher.dino_head.last_layer(cls)  # [G, B, K]
        targets = scored.loss.dino_loss.targets(logits.flatten(0, 1), scored.temp).view_as(logits)
        local = scored.student.encode(scored.crops[1][0]).projection
        online = (scored.student.dino_head.last_layer(local) / 0.1).log_softmax(dim=-1)
    torch.testing.assert_close(losses[:, :, 4], -(targets * online).sum(dim=-1).T, rtol=1e-4, atol=1e-5)


def test_reused_teacher_outputs_are_those_of_the_kept_crops():
    scored = Scored(small())
    kept, (cls, patches) = scored.select()
    masks = Kept(kept.index).of(scored.masks)
    again = scored.teacher.embed_teacher(kept.views[0].flatten(0, 1), masks)
    for ours, expected in zip((Kept(kept.index).of(cls), Kept(kept.index).of(patches)[masks]), again, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_as_many_kept_crops_are_masked_as_without_hard_views():
    scored = Scored(small())
    kept, _ = scored.select()
    assert int(Kept(kept.index).of(scored.masks).any(dim=1).sum()) == 8


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scoring_leaves_no_trace(mode, centering):
    scored = Scored(small(selection__mode=mode, teacher__centering=centering))
    modules = scored.student, scored.teacher, scored.loss
    before = [value.clone() for module in modules for value in module.state_dict().values()]
    scored.select()
    after = [value for module in modules for value in module.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in scored.student.parameters())
    assert scored.student.training
    assert not scored.teacher.training


def test_gradients_are_clipped_module_by_module(tmp_path, monkeypatch):
    seen: list[tuple[float, float]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def clipped(parameters, max_norm):
        parameters = list(parameters)
        norm = clip(parameters, max_norm)
        after = torch.stack([p.grad.norm() for p in parameters]).norm()
        seen.append((float(norm), float(after)))
        return norm

    monkeypatch.setattr(main_dinov2.nn.utils, "clip_grad_norm_", clipped)
    train(small(optim__clip_grad=0.05), tmp_path / "run")
    assert len(seen) == 4 * 3  # backbone and two heads
    for before, after in seen:
        assert after == pytest.approx(min(before, 0.05), rel=1e-4)


def test_layers_have_rates_of_their_own_and_vectors_no_weight_decay(tmp_path, monkeypatch):
    seen: list[list[dict[str, Any]]] = []
    step = torch.optim.AdamW.step

    def stepping(self: torch.optim.AdamW, *arguments: Any) -> Any:
        seen.append([dict(group) for group in self.param_groups])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    config = small(optim__layerwise_decay=0.5, optim__patch_embed_lr_mult=0.1, optim__weight_decay=0.3)
    train(config, tmp_path / "run")
    lr = Schedules(config, 4, 4).lr(0)
    # the patch embedding; the other embeddings; three blocks; the final norm and the heads
    expected = [lr * share for share in (0.1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)]
    assert sorted({group["lr"] for group in seen[0]}) == pytest.approx(expected)
    for group in seen[0]:
        assert group["weight_decay"] == (0.0 if group["params"][0].ndim == 1 else 0.3)
        assert len({p.ndim == 1 for p in group["params"]}) == 1


def test_epochs_of_a_given_length():
    config = small(
        optim__epoch_length=100,
        optim__warmup_epochs=2,
        optim__freeze_last_layer=1,
        teacher__warmup_teacher_temp_epochs=3,
        teacher__teacher_temp=0.07,
    )
    schedules = Schedules(config, total_steps=1000, steps_per_epoch=7)
    assert schedules.lr(0) == 0
    assert schedules.lr(200) == pytest.approx(config.peak_lr)
    assert (schedules.last_layer_lr(99), schedules.last_layer_lr(100)) == (0, schedules.lr(100))
    assert schedules.teacher_temp(299) == pytest.approx(0.07)
    assert schedules.teacher_temp(150) < 0.07


def test_a_run_too_short_or_a_part_too_small_is_refused_before_it_starts(tmp_path):
    with pytest.raises(UserError, match=r"optim\.warmup_epochs = 2 are 200 steps, but the run has 4"):
        train(small(optim__epoch_length=100, optim__warmup_epochs=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="leaves one image to each of 4 processes and 2 parts"):
        check_lengths(small(train__accumulate=2), 4, 4)
    check_lengths(small(train__accumulate=2, dino__koleo_loss_weight=0.0), 4, 4)
    with pytest.raises(UserError, match=r"views\.local_crops_size = 20 is not a multiple"):
        small(views__local_crops_size=20)


def test_accumulation_notes_which_terms_it_changes():
    assert small().notes() == []
    (note,) = small(train__accumulate=2).notes()
    assert "KoLeo and Sinkhorn-Knopp will see" in note
    assert small(train__accumulate=2, teacher__centering="centering", dino__koleo_loss_weight=0.0).notes() == []


def test_a_collapsed_run_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("hvp.common.training.step.CollapseWatch.__init__.__defaults__", (3,), raising=True)
    hot = {"teacher__student_temp": 1e6, "teacher__teacher_temp": 1e6, "teacher__warmup_teacher_temp": 1e6}
    assert f"ln(head_n_prototypes) = {math.log(128):.3f}" in train(small(**hot), tmp_path / "run").said


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("layout", ["upstream", "teacher alone", "released"])
@pytest.mark.parametrize("registers", [0, 2])
def test_upstream_checkpoints_load_for_evaluation(tmp_path, network, layout, registers):
    student, teacher = build_networks(small(model__num_register_tokens=registers, model__ffn_layer="swiglu"), CPU)
    torch.nn.init.normal_(student.backbone.pos_embed)
    module = {"student": student, "teacher": teacher}[network]

    def chunked(net: Network, prefix: str) -> dict[str, Tensor]:
        """Return a state in chunks of two blocks, numbered throughout, as upstream's."""
        names = {f"blocks.{i}.": f"blocks.{i // 2}.{i}." for i in range(3)}
        return {
            prefix + next((n.replace(a, b) for a, b in names.items() if a in n), n): v
            for n, v in net.state_dict().items()
        }

    file = tmp_path / "checkpoint.pth"
    if layout == "upstream":
        center = {"dino_loss.center": torch.zeros(1, 128), "ibot_patch_loss.center": torch.zeros(1, 1, 128)}
        both = {**center, **chunked(student, "student."), **chunked(teacher, "teacher.")}
        torch.save({"model": both, "optimizer": {}, "iteration": 9}, file)
        encoder, meta = load_encoder(file, network)
        assert (meta.format, meta.which) == ("upstream", network)
        assert {name.split(".")[0] for name in meta.dropped} == {"dino_head", "ibot_head"}
    elif layout == "teacher alone":
        torch.save({"teacher": chunked(module, "")}, file)
        encoder, meta = load_encoder(file)
    else:
        torch.save(module.backbone.state_dict(), file)
        encoder, meta = load_encoder(file)
    for side in (32, 24):
        x = torch.randn(2, 3, side, side)
        with torch.no_grad():
            torch.testing.assert_close(encoder(x), module.backbone.eval()(x))
            probe = encoder.probe_features(x, 1, avgpool=True).unflatten(1, (-1, 2))
            tokens = module.backbone.all_tokens(x)
        torch.testing.assert_close(probe[..., 1], tokens[:, 1:].mean(dim=1), msg="registers are no patches")
        assert tokens.shape[1] == 1 + (side // 8) ** 2
