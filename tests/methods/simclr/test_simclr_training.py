"""The SimCLR trainer on a little real data: its steps and its messages.

Behaviour that all trainers share is tested in tests/methods/test_every_method.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from hvp.common.config.resolving import read_yaml, resolve
from hvp.common.errors import UserError
from hvp.common.hardviews import select
from hvp.common.training import collapse
from hvp.common.views import normalize
from hvp.methods import get_preset, presets
from hvp.methods.simclr.config import SimclrConfig
from hvp.methods.simclr.main_simclr import build_model
from hvp.methods.simclr.nt_xent_loss import nt_xent_loss
from hvp.methods.simclr.score import pair_losses
from tests import runs
from tests.runs import CPU, Trained, constant_batch_norm, first_batch, tiny

SMALL = {**runs.SMALL, "data.shapes.train": 48, "train.epochs": 1, "optim.warmup_epochs": 0}


def small(**values: Any) -> SimclrConfig:
    return tiny(SimclrConfig, "simclr", SMALL, **values)


def train(config: SimclrConfig, out: Path) -> Trained:
    return runs.train("simclr", config, out)


@pytest.mark.parametrize("hard_views", ["none", "hvp"])
def test_first_step(tmp_path, hard_views):
    """All candidates are scored in one batch, and both views of each image's hardest pair train in one batch."""
    config = small(selection__hard_views=hard_views)
    rows = train(config, tmp_path / "run").rows

    torch.manual_seed(config.train.seed)
    model = build_model(config, CPU)
    views = normalize(first_batch(config).pixels[0])  # [N, B, ...]
    assert len(views) == (4 if hard_views == "hvp" else 2)
    if hard_views == "hvp":
        with torch.no_grad():
            losses = pair_losses(model, [views], config.loss.temperature)
        kept = select([views], losses, config.combination_slots())
        assert rows[0]["kept_loss"] == pytest.approx(kept.loss.mean().item(), rel=1e-5)
        (views,) = kept.views
    loss = nt_xent_loss(model(views.flatten(0, 1)).projection.unflatten(0, (2, 8)), config.loss.temperature)
    assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert 0 < rows[0]["spread"] < 1.1


@pytest.mark.parametrize(("mode", "forwards"), [("train", 2), ("eval", 1)])
def test_scoring_moves_the_running_statistics_in_mode_train_only(tmp_path, mode, forwards):
    state = train(small(selection__mode=mode), tmp_path / "run").checkpoint
    assert state["step"] == 6
    counts = {int(value) for name, value in state["model"].items() if name.endswith("num_batches_tracked")}
    assert counts == {forwards * 6}


def test_weight_decay_applies_to_matrices_and_the_rate_follows_the_schedule(tmp_path):
    config = small(optim__optimizer="lars", optim__weight_decay=0.5, optim__warmup_epochs=1, train__epochs=2)
    run = train(config, tmp_path / "run")
    rows = run.rows
    assert [group["weight_decay"] for group in run.checkpoint["optimizer"]["param_groups"]] == [0.5, 0.0]
    assert rows[0]["lr"] == 0
    assert rows[5]["lr"] == rows[6]["lr"] == config.peak_lr
    assert rows[-1]["lr"] < config.peak_lr / 2


@pytest.mark.parametrize(("scaling", "peak"), [("linear", 0.3 * 1024 / 256), ("sqrt", 0.3 * 32)])
def test_the_learning_rate_scales_with_the_batch(scaling, peak):
    config = small(optim__lr_scaling=scaling, optim__base_lr=0.3, train__batch_size=1024)
    assert config.peak_lr == pytest.approx(peak)


def test_googles_and_the_papers_rates_agree_at_the_papers_batch_size():
    rates = {
        small(optim__lr_scaling=scaling, optim__base_lr=base, train__batch_size=4096).peak_lr
        for scaling, base in (("linear", 0.3), ("sqrt", 0.075))
    }
    assert max(rates) == pytest.approx(min(rates)) == pytest.approx(4.8)


def test_accumulation_warns_that_it_changes_the_objective(tmp_path):
    said = {parts: train(small(train__accumulate=parts), tmp_path / str(parts)).said for parts in (1, 2)}
    assert "changes the objective" not in said[1]
    assert said[2].count("train.accumulate = 2 changes the objective: a view has 6 negatives") == 1


def test_a_collapse_is_reported_once(tmp_path, monkeypatch):
    """The projector maps everything to one point: its last batch norm multiplies by zero and adds a constant."""
    monkeypatch.setattr(collapse.CollapseWatch.__init__, "__defaults__", (3,))
    monkeypatch.setattr(torch.nn.BatchNorm1d, "reset_parameters", constant_batch_norm)
    said = train(small(optim__base_lr=1e-9), tmp_path / "run").said
    assert said.count("step 3: the network has collapsed: ") == 1
    assert "ln(2 B - 1) = 2.708" in said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim__warmup_epochs": 3, "train__epochs": 2}, "optim.warmup_epochs = 3 is longer than train.epochs = 2"),
        ({"train__batch_size": 8, "train__accumulate": 8}, "NT-Xent needs at least 2 images in each part"),
        ({"selection__candidates": 1}, "selection.candidates = 1"),
        ({"model__num_proj_layers": 1}, "model.num_proj_layers = 1"),
    ],
)
def test_inconsistent_values_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        small(**values)


@pytest.mark.parametrize("preset", presets("simclr"))
def test_presets_compare_all_pairs_of_four_views_or_take_the_only_pair(preset):
    config = resolve(SimclrConfig, [("preset", read_yaml(get_preset("simclr", preset)))]).config
    assert config.combination_slots().num_combinations == (6 if config.selection.hard_views == "hvp" else 1)
    assert config.notes() == []
