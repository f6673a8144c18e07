"""The DINO trainer on a little real data: its own behaviour, and how a run treats its folder.

Behaviour that all trainers share is tested in tests/methods/test_every_method.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from hvp.common.errors import UserError
from hvp.common.training.selecting import Kept, ViewSelector
from hvp.common.views import normalize
from hvp.methods.dino.config import DinoConfig
from hvp.methods.dino.main_dino import (
    build_loss,
    build_networks,
)
from hvp.methods.dino.score import pair_losses
from tests import runs
from tests.runs import CPU, Trained, first_batch, tiny

SMALL = {
    **runs.SMALL,
    "data.shapes.train": 48,
    "train.epochs": 2,
    "model.drop_path_rate": 0.1,
    "model.use_bn_in_head": False,
    "optim.warmup_epochs": 1,
}


def small(**values: Any) -> DinoConfig:
    return tiny(DinoConfig, "dino", SMALL, **values)


def train(config: DinoConfig, out: Path, **options: Any) -> Trained:
    return runs.train("dino", config, out, **options)


@pytest.mark.parametrize("use_bn", [False, True])
def test_accumulation_keeps_the_global_batch(tmp_path, use_bn):
    """Two halves give the step of the whole unless something couples the images of a batch, as batch norm does."""
    values: dict[str, Any] = {
        "model__drop_path_rate": 0.0,
        "model__use_bn_in_head": use_bn,
        "train__epochs": 1,
        "optim__base_lr": 0.001,
    }
    whole = train(small(**values), tmp_path / "whole").checkpoint
    halves = train(small(**values, train__accumulate=2), tmp_path / "halves").checkpoint
    assert whole["step"] == halves["step"] == 6
    key = "backbone.blocks.0.mlp.fc1.weight"
    close = torch.allclose(whole["student"][key], halves["student"][key], rtol=0, atol=2e-5)
    assert close is not use_bn
    if not use_bn:
        torch.testing.assert_close(whole["dino_loss"]["center"], halves["dino_loss"]["center"], rtol=1e-4, atol=1e-6)


def test_resuming_before_the_first_checkpoint_starts_from_the_beginning(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    run = train(small(train__epochs=1), tmp_path / "run", resume=True)
    assert run.checkpoint["step"] == 6
    assert "starts from the beginning" in run.said


def test_an_occupied_folder_is_left_alone(tmp_path):
    train(small(train__epochs=1), tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(UserError, match="is not empty"):
        train(small(), tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    overwritten = train(small(train__batch_size=16, train__epochs=1), tmp_path / "run", overwrite=True)
    assert overwritten.checkpoint["step"] == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files but no run"):
        train(small(), tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_a_run_that_diverges_stops(tmp_path):
    """It stops at a non-finite loss or, a step earlier, at a non-finite gradient."""
    with pytest.raises(UserError, match=r"step \d+: the loss is (nan|\S+, but its gradient (inf|nan)), lr"):
        train(small(optim__base_lr=1e6, optim__clip_grad=0.0, optim__optimizer="sgd"), tmp_path / "run")


class Scored:
    """Fresh networks, a batch of crops, and the selection among them."""

    def __init__(self, config: DinoConfig):
        torch.manual_seed(0)
        self.student, self.teacher = build_networks(config, CPU)
        self.dino_loss = build_loss(config)
        self.crops = [normalize(pixels) for pixels in first_batch(config).pixels]
        self.selector = ViewSelector(config, total_steps=1)

    def select(self, step=0, selector=None):
        selector = selector or self.selector
        with selector.scoring(self.student, self.teacher):
            losses, self.teacher_logits = pair_losses(self.student, self.teacher, self.crops, self.dino_loss, 0)
        return selector.keep(self.crops, losses, step)

    def tensors(self):
        return [t for part in (self.student, self.teacher, self.dino_loss) for t in part.state_dict().values()]


def test_steps_between_selections_take_the_first_of_every_slot():
    scored = Scored(small())
    first = scored.selector.first(scored.crops)
    assert torch.equal(first[0], scored.crops[0][[0, 2]])
    assert torch.equal(first[1], scored.crops[1][[0, 1]])


def test_kept_loss_is_the_objective_of_the_kept_crops():
    """The loss that `select()` maximises is the one that the step then trains on, image by image."""
    scored = Scored(small(model__drop_path_rate=0.0, selection__search="exact"))
    kept = scored.select()
    for b in range(8):
        views = [crop[:, b] for crop in kept.views]
        loss = scored.dino_loss(scored.student(views)[0], scored.teacher(views[:1])[0], 0)
        assert float(kept.loss[b]) == pytest.approx(loss.item(), rel=1e-4)
    random = scored.select(selector=ViewSelector(small(selection__policy="random"), total_steps=1))
    assert kept.loss.mean() > random.loss.mean()


def test_reused_teacher_outputs_are_those_of_the_kept_crops():
    scored = Scored(small())
    kept = scored.select()
    again, _ = scored.teacher([kept.views[0].flatten(0, 1)])
    torch.testing.assert_close(Kept(kept.index).of(scored.teacher_logits), again, rtol=1e-5, atol=1e-6)


def test_batch_norm_rules_out_reuse(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("reused")

    monkeypatch.setattr(Kept, "of", never)
    train(small(model__use_bn_in_head=True, train__epochs=1), tmp_path / "bn")
    with pytest.raises(AssertionError, match="reused"):
        train(small(train__epochs=1), tmp_path / "plain")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scoring_leaves_no_trace(mode):
    scored = Scored(small(selection__mode=mode))
    before = [tensor.clone() for tensor in scored.tensors()]
    scored.select()
    assert all(torch.equal(a, b) for a, b in zip(before, scored.tensors(), strict=True))
    assert all(parameter.grad is None for parameter in scored.student.parameters())
    assert scored.student.training
    assert scored.teacher.training


def test_stochastic_depth_is_active_when_scoring_in_train_mode_only():
    for mode, equal in (("train", False), ("eval", True)):
        scored = Scored(small(selection__mode=mode, model__drop_path_rate=0.5, selection__search="exact"))
        losses = [scored.select().loss for _ in range(2)]
        assert torch.equal(*losses) is equal


def test_sampled_combinations_depend_on_seed_and_step_alone():
    scored = Scored(small(model__drop_path_rate=0.0, selection__comparisons=2))
    torch.manual_seed(1)
    a = scored.select(step=3).index
    torch.manual_seed(2)
    assert torch.equal(a, scored.select(step=3).index)
    assert any(not torch.equal(a, scored.select(step=step).index) for step in range(4, 10))


def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        train(small(train__precision="fp16", train__device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_every_optimizer_trains(tmp_path, optimizer):
    run = train(small(optim__optimizer=optimizer, train__epochs=1), tmp_path / "run")
    assert run.checkpoint["step"] == 6
