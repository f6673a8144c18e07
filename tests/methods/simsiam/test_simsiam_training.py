"""The SimSiam trainer on a little real data: trained parameters, learning rates, and kept views.

Behaviour that all trainers share is tested in tests/methods/test_every_method.py.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvp.common.errors import UserError
from hvp.common.training.distributed import World
from hvp.common.training.run import Run
from hvp.common.training.selecting import ViewSelector
from hvp.common.views import normalize
from hvp.methods.simsiam import main_simsiam
from hvp.methods.simsiam.builder import SimSiam
from hvp.methods.simsiam.config import SimSiamConfig
from hvp.methods.simsiam.main_simsiam import (
    build_model,
    check_batch,
    parameter_groups,
    symmetric_loss,
)
from hvp.methods.simsiam.score import pair_losses
from tests import runs
from tests.runs import CPU, Trained, first_batch, tiny

SMALL = {**runs.SMALL, "data.shapes.train": 48, "train.epochs": 3}


def small(**values: Any) -> SimSiamConfig:
    return tiny(SimSiamConfig, "simsiam", SMALL, **values)


def train(config: SimSiamConfig, out: Path) -> Trained:
    return runs.train("simsiam", config, out)


def scored(config: SimSiamConfig) -> tuple[SimSiam, ViewSelector, list[Tensor]]:
    """Return a fresh model, its selector, and the normalised views of a batch."""
    torch.manual_seed(0)
    model = build_model(config, CPU)
    return model, ViewSelector(config, total_steps=1), [normalize(pixels) for pixels in first_batch(config).pixels]


def losses_of(model: SimSiam, selector: ViewSelector, views: list[Tensor]) -> Tensor:
    """Return the pair losses that a step would select by."""
    with selector.scoring(model):
        return pair_losses(model, views)


@pytest.mark.parametrize("fixed", [True, False])
def test_the_rate_falls_by_epoch_and_the_predictors_may_stay_fixed(tmp_path, monkeypatch, fixed):
    optimizers, rates = [], []
    build, record = main_simsiam.build_optimizer, Run.record

    def built(*args):
        optimizers.append(build(*args))
        return optimizers[0]

    def recorded(run, **values):
        rates.append([group["lr"] for group in optimizers[0].param_groups])
        record(run, **values)

    monkeypatch.setattr(main_simsiam, "build_optimizer", built)
    monkeypatch.setattr(Run, "record", recorded)
    train(small(optim__fix_pred_lr=fixed, optim__base_lr=3.2), tmp_path / "run")
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3) for _ in range(6)]
    assert [rate for rate, _ in rates] == pytest.approx(expected, rel=1e-12)
    assert [rate for _, rate in rates] == pytest.approx([0.1] * 18 if fixed else expected, rel=1e-12)


def test_everything_is_trained_and_decayed_except_the_projectors_last_bias(tmp_path):
    config = small(selection__hard_views="none", model__projector_layers=3)
    model = build_model(config, CPU)
    encoder, predictor = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [names[id(p)] for group in (encoder, predictor) for p in group["params"]]
    assert sorted(grouped) == sorted(set(names.values()) - {"encoder.fc.6.bias"})
    assert all(name.startswith("predictor.") for name in (names[id(p)] for p in predictor["params"]))
    assert encoder["weight_decay"] == predictor["weight_decay"] == 0.1

    torch.manual_seed(config.train.seed)
    before = build_model(config, CPU).state_dict()
    after = train(config, tmp_path / "run").checkpoint["model"]
    unchanged = [key for key in before if torch.equal(before[key], after[key])]
    assert unchanged == ["encoder.fc.6.bias"]


def test_gradients_stop_at_the_projections():
    """Targets are constants: copies of their values give the same gradients."""
    model, _, (views,) = scored(small())
    p1, p2, z1, z2, _ = model(views[0], views[1])
    symmetric_loss(p1, p2, z1, z2).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    other = build_model(small(), CPU)
    z = [other.encoder(view) for view in views[:2]]
    towards = [other.predictor(x) for x in z]
    constants = [torch.tensor(x.tolist()) for x in z]
    symmetric_loss(towards[0], towards[1], constants[0], constants[1]).backward()
    expected = [p.grad for p in other.parameters() if p.requires_grad]
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scoring_forwards_all_views_in_one_batch(mode):
    model, selector, views = scored(small(selection__mode=mode))
    losses = losses_of(model, selector, views)
    torch.manual_seed(0)
    fresh = build_model(small(), CPU).train(mode == "train")
    z = fresh.encoder(torch.cat(list(views[0])))
    p, z = (x.chunk(4) for x in (fresh.predictor(z), z))
    for target in range(4):
        for online in range(4):
            expected = -torch.nn.functional.cosine_similarity(p[online], z[target])
            torch.testing.assert_close(losses[:, target, online], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scoring_moves_nothing_but_running_statistics(mode):
    model, selector, views = scored(small(selection__mode=mode))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses_of(model, selector, views)
    changed = {
        key.rpartition(".")[2] for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == ({"running_mean", "running_var", "num_batches_tracked"} if mode == "train" else set())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_the_kept_pair_is_the_hardest_under_the_same_outputs():
    model, selector, views = scored(small())
    p, z = (x.detach().unflatten(0, (4, 8)) for x in model.single_forward(views[0].flatten(0, 1)))
    kept = selector.keep(views, losses_of(model, selector, views), step=0)
    assert kept.views[0].shape == (2, 8, 3, 32, 32)
    for b in range(8):
        pair = kept.index[b].tolist()
        assert torch.equal(kept.views[0][:, b], views[0][pair, b])
        losses = {
            (i, j): symmetric_loss(*(x[[v], b] for x, v in ((p, i), (p, j), (z, i), (z, j)))).item()
            for j in range(4)
            for i in range(j)
        }
        assert losses[tuple(pair)] == max(losses.values()) == pytest.approx(kept.loss[b].item(), abs=1e-5)


def test_four_views_are_sampled_and_two_without_hard_views():
    (slot,) = small().view_slots()
    assert (slot.candidates, slot.kept, slot.transform.size) == (4, 2, 32)
    assert small().combination_slots().num_combinations == 6
    vanilla = small(selection__hard_views="none")
    assert vanilla.view_slots()[0].candidates == 2
    assert vanilla.combination_slots().num_combinations == 1
    with pytest.raises(UserError, match=r"selection\.candidates"):
        small(selection__candidates=1)


@pytest.mark.parametrize(("values", "world"), [({"train__accumulate": 8}, World()), ({}, World(0, 8))])
def test_one_image_at_a_time_is_refused(tmp_path, values, world):
    config = small(**values)
    with pytest.raises(UserError, match=r"train\.batch_size = 8 .* is 1 image at a time, but batch norm needs"):
        check_batch(config, world)
    if world.size == 1:
        with pytest.raises(UserError, match="1 image at a time"):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_collapse_is_reported_once_across_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(main_simsiam, "feature_spread", lambda z: 0.001)
    config = small(train__epochs=5, train__batch_size=2, selection__hard_views="none")
    said = train(config, tmp_path / "run").said
    assert said.count("the network has collapsed") == 1
    assert "step 100: the network has collapsed: for 100 steps the projections of all images have been nearly" in said
