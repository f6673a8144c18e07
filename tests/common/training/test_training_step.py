"""A trainer's step outside a run, and the mechanics that all trainers share."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from hvp.benchmarks.given_steps import GivenSteps, noise
from hvp.common.config.resolving import read_yaml, resolve
from hvp.common.networks import Features
from hvp.common.training.checkpoint import load_checkpoint
from hvp.common.training.distributed import World
from hvp.common.training.loading import build_loader, build_strong_views, open_training_data
from hvp.common.training.rescuing import images_to_rescue
from hvp.common.training.session import seeded
from hvp.methods import METHODS, get_method, get_preset

CPU = torch.device("cpu")
SMALL = {
    "data.shapes.train": 8,
    "data.shapes.size": 40,
    "data.workers": 0,
    "train.batch_size": 8,
    "train.epochs": 1,
    "train.device": "cpu",
    "train.log_every": 1,
    "selection.start": 0.0,
    "rescue.enabled": True,
    "rescue.k": 2,
}


def config_of(name: str, changes: dict[str, Any]) -> Any:
    warmup = {} if name == "simsiam" else {"optim.warmup_epochs": 0}
    layers = [("preset", read_yaml(get_preset(name, "tiny"))), ("small", SMALL | warmup), ("test", changes)]
    return resolve(get_method(name).config, layers).config


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_outside_a_run_is_that_of_the_run(name: str, accumulate: int, tmp_path: Path) -> None:
    """The same loss and weights, bit for bit, with hard views and Rescue."""
    config = config_of(name, {"train.accumulate": accumulate})
    method = get_method(name)
    of_the_run = load_checkpoint(method.train(config, tmp_path / "run", console=Console(quiet=True)))
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())

    source = open_training_data(config)
    masks = method.build_masks and method.build_masks(config)
    with (
        seeded(config.train.seed, CPU),
        closing(build_loader(config, source, CPU, masks=masks)) as loader,
        closing(build_strong_views(config, source, images_to_rescue(config))) as strong,
    ):
        parts = method.build(config, World(), CPU)
        run = GivenSteps(config, parts[0], list(loader.epoch(0)), strong=strong)
        method.train_one_epoch(run, parts, 0, config)
    assert {name: row[name] for name in run.rows[0]} == run.rows[0]
    networks = {name: part for name, part in parts._asdict().items() if isinstance(part, nn.Module)}
    assert networks
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, of_the_run[name][key]), f"{name} {key}"


class Toy(nn.Module):
    """A linear network of the mean pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.mean(dim=(2, 3)))
        return out

    def encode(self, x: Tensor) -> Features:
        return Features(x, self(x))


def toy_step(**changes: Any) -> GivenSteps:
    values = {"views.crop_size": 8, "rescue.enabled": False}
    config = config_of("simclr", values | {key.replace("__", "."): value for key, value in changes.items()})
    torch.manual_seed(0)
    return GivenSteps(config, Toy(), [[noise(config, CPU)]])


def first_candidates(views: list[Tensor]) -> Tensor:
    """Losses that are the larger, the later both candidates come."""
    number = torch.arange(float(views[0].shape[0]))
    return (number[:, None] + number).expand(views[0].shape[1], -1, -1)


def test_hard_views_are_those_with_the_largest_loss() -> None:
    run = toy_step()
    for _, (part,) in run.steps(0):
        views = run.views(part)
        hard = run.hard_views(views, first_candidates)
        assert torch.equal(hard[0], views[0][[2, 3]])
        assert run.kept.outputs is None
        assert torch.equal(run.kept.of(views[0]), hard[0].flatten(0, 1))


def test_outputs_of_the_scoring_follow_the_kept_views() -> None:
    run = toy_step()
    for _, (part,) in run.steps(0):
        views = run.views(part)
        hard = run.hard_views(views, lambda v: (first_candidates(v), (v[0], v[0] + 1)))
        kept, more = run.kept.outputs
        assert torch.equal(kept, hard[0].flatten(0, 1))
        assert torch.equal(more, kept + 1)


def test_a_step_that_does_not_select_takes_the_first_views_and_scores_nothing() -> None:
    run = toy_step(selection__hard_views="none")

    def never(views: list[Tensor]) -> Tensor:
        raise AssertionError("scored")

    for _, (part,) in run.steps(0):
        views = run.views(part)
        assert run.hard_views(views, never)[0] is views[0]
        assert torch.equal(run.kept.of(views[0]), views[0].flatten(0, 1))
        assert run.kept.outputs is None


def test_parts_of_a_batch_give_the_gradient_and_the_loss_of_the_whole() -> None:
    whole = toy_step(selection__hard_views="none")
    halved = toy_step(selection__hard_views="none", train__accumulate=2)
    halved.model.load_state_dict(whole.model.state_dict())
    pixels = torch.randn(8, 3, 4, 4)
    gradients = []
    for run, parts in ((whole, [pixels]), (halved, list(pixels.chunk(2)))):
        optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
        for _ in run.steps(0):
            for part in parts:
                loss = run.model(part).square().mean()
                run.backward(loss, 3 * loss, twice=2 * loss)
            assert run.loss_part("twice") == pytest.approx(2 * run.objective)
            run.optimize(optimizer)
            run.record()
        gradients.append([p.grad for p in run.model.parameters()])
        assert run.rows[0]["loss"] == pytest.approx(4 * run.objective)
    assert whole.rows[0] == pytest.approx(halved.rows[0])
    torch.testing.assert_close(*gradients)


def test_values_of_the_log_are_computed_only_for_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_step()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    called: list[bool] = []

    def value() -> float:
        called.append(True)
        return 1.0

    for due in (True, False):
        monkeypatch.setattr(GivenSteps, "row_due", due)
        for _ in run.steps(0):
            run.backward(run.model(torch.ones(1, 3, 2, 2)).mean())
            run.optimize(optimizer)
            run.record(lr=0.5, value=value)
    assert called == [True]
    assert run.rows[0]["lr"] == 0.5
    assert run.rows[0]["value"] == 1.0
    assert run.rows[1].keys() == {"loss"}
