"""The SimCLR trainer on a little real data: what its steps compute and what it says. What all trainers share is tested
in tests/methods/test_every_method.py."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hvp.common.config.resolving import read_yaml, resolve
from hvp.common.errors import UserError
from hvp.common.hardviews import select
from hvp.common.training import collapse
from hvp.common.training.checkpoint import load_checkpoint
from hvp.common.training.loading import build_loader, open_training_data
from hvp.common.views import normalize
from hvp.methods import get_preset, presets
from hvp.methods.simclr.config import SimclrConfig
from hvp.methods.simclr.main_simclr import build_model, train_simclr
from hvp.methods.simclr.nt_xent_loss import nt_xent_loss
from hvp.methods.simclr.score import pair_losses

SMALL = {
    "data.workers": 0,
    "data.shapes.train": 48,
    "data.shapes.size": 32,
    "train.batch_size": 8,
    "train.epochs": 1,
    "train.log_every": 1,
    "optim.warmup_epochs": 0,
    "selection.start": 0.0,
}


def small(**values) -> SimclrConfig:
    values = {key.replace("__", "."): value for key, value in values.items()}
    layers = [("preset", read_yaml(get_preset("simclr", "tiny"))), ("small", SMALL), ("test", values)]
    return resolve(SimclrConfig, layers).config


def train(config: SimclrConfig, out: Path) -> tuple[list[dict], str, dict]:
    """The rows of the log, what was said, and the checkpoint."""
    with open(out.with_suffix(".txt"), "w") as said:
        state = load_checkpoint(train_simclr(config, out, console=Console(file=said, width=200)))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows, out.with_suffix(".txt").read_text(), state


@pytest.mark.parametrize("hard_views", ["none", "hvp"])
def test_first_step(tmp_path, hard_views):
    """All candidates in one batch, the hardest pair of each image, and both of its views in one batch."""
    config = small(selection__hard_views=hard_views)
    rows, _, _ = train(config, tmp_path / "run")

    torch.manual_seed(config.train.seed)
    model = build_model(config, torch.device("cpu"))
    (batch,) = next(build_loader(config, open_training_data(config), torch.device("cpu")).epoch(0))
    views = normalize(batch.pixels[0])  # [N, B, ...]
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
    _, _, state = train(small(selection__mode=mode), tmp_path / "run")
    assert state["step"] == 6
    counts = {int(value) for name, value in state["model"].items() if name.endswith("num_batches_tracked")}
    assert counts == {forwards * 6}


def test_weight_decay_is_for_matrices_and_the_rate_follows_the_schedule(tmp_path):
    config = small(optim__optimizer="lars", optim__weight_decay=0.5, optim__warmup_epochs=1, train__epochs=2)
    rows, _, state = train(config, tmp_path / "run")
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.5, 0.0]
    assert rows[0]["lr"] == 0
    assert rows[5]["lr"] == rows[6]["lr"] == config.peak_lr
    assert rows[-1]["lr"] < config.peak_lr / 2


@pytest.mark.parametrize(("scaling", "peak"), [("linear", 0.3 * 1024 / 256), ("sqrt", 0.3 * 32)])
def test_the_learning_rate_scales_with_the_batch(scaling, peak):
    config = small(optim__lr_scaling=scaling, optim__base_lr=0.3, train__batch_size=1024)
    assert config.peak_lr == pytest.approx(peak)


def test_googles_and_the_papers_rates_are_the_same_at_the_papers_batch():
    rates = {
        small(optim__lr_scaling=scaling, optim__base_lr=base, train__batch_size=4096).peak_lr
        for scaling, base in (("linear", 0.3), ("sqrt", 0.075))
    }
    assert max(rates) == pytest.approx(min(rates)) == pytest.approx(4.8)


def test_accumulation_says_that_it_changes_the_objective(tmp_path):
    said = {parts: train(small(train__accumulate=parts), tmp_path / str(parts))[1] for parts in (1, 2)}
    assert "changes the objective" not in said[1]
    assert said[2].count("train.accumulate = 2 changes the objective: views have 6 negatives") == 1


def test_a_collapse_is_said_once(tmp_path, monkeypatch):
    """A projector whose outputs are one point: its last batch norm multiplies by nothing and adds a constant."""
    monkeypatch.setattr(collapse.CollapseWatch.__init__, "__defaults__", (3,))
    monkeypatch.setattr(torch.nn.BatchNorm1d, "reset_parameters", _constant)
    _, said, _ = train(small(optim__base_lr=1e-9), tmp_path / "run")
    assert said.count("step 3: the network has collapsed: ") == 1
    assert "ln(2 B - 1) = 2.708" in said


def _constant(self: torch.nn.BatchNorm1d) -> None:
    self.reset_running_stats()
    torch.nn.init.zeros_(self.weight)
    torch.nn.init.ones_(self.bias)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim__warmup_epochs": 3, "train__epochs": 2}, "optim.warmup_epochs = 3 is longer than train.epochs = 2"),
        ({"train__batch_size": 8, "train__accumulate": 8}, "NT-Xent needs at least 2 a part"),
        ({"selection__candidates": 1}, "selection.candidates = 1"),
        ({"model__num_proj_layers": 1}, "model.num_proj_layers = 1"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        small(**values)


@pytest.mark.parametrize("preset", presets("simclr"))
def test_presets_resolve(preset):
    config = resolve(SimclrConfig, [("preset", read_yaml(get_preset("simclr", preset)))]).config
    assert config.combination_slots().num_combinations == (6 if config.selection.hard_views == "hvp" else 1)
    assert config.notes() == []
