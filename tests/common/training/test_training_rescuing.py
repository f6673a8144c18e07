"""Rescue in a training step: its images, strong views, features and batch statistics."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from hvp.common.config.sections import TrainConfig
from hvp.common.data import open_dataset
from hvp.common.errors import UserError
from hvp.common.networks import Features
from hvp.common.training.batch_norm import running_statistics_kept, shared_batch_norm
from hvp.common.training.distributed import World
from hvp.common.training.rescuing import Rescuer, images_to_rescue, strong_transform
from hvp.common.views import ViewBatch, normalize
from hvp.common.views.strong import StrongViews
from hvp.methods.simclr.config import SimclrConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Seed the random features, so that their order does not depend on rounding or on earlier tests."""
    torch.manual_seed(0)


def config(**rescue: object) -> SimclrConfig:
    return SimclrConfig.model_validate(
        {"rescue": {"enabled": True, **rescue}, "train": {"batch_size": 256}, "views": {"crop_size": 32}}
    )


@pytest.mark.parametrize(("k", "batch_size", "count"), [(None, 256, 4), (None, 32, 1), (None, 320, 5), (16, 256, 16)])
def test_a_step_rescues_one_in_64_images_or_as_many_as_configured(k, batch_size, count):
    values = {"rescue": {"enabled": True, "k": k}, "train": {"batch_size": batch_size}}
    assert images_to_rescue(SimclrConfig.model_validate(values)) == count


def test_more_images_than_a_batch_has_are_refused():
    with pytest.raises(ValueError, match=r"rescue\.k = 300, but a step has only train.batch_size = 256"):
        config(k=300)


class Network(nn.Module):
    """Return mean colours as features, and the same after batch norm as projections."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.seen: list[Tensor] = []

    def encode(self, x: Tensor) -> Features:
        self.seen.append(x)
        colours = x.mean(dim=(2, 3))
        return Features(colours, self.norm(colours))


def rescuer(network: Network, tmp_path: Path, **rescue: object) -> tuple[Rescuer, StrongViews]:
    run = config(**rescue)
    strong = StrongViews(open_dataset("shapes", "train"), strong_transform(run), seed=run.train.seed, threads=1)
    return Rescuer(run, network, strong, World(), CPU), strong


def part(*index: int, epoch: int) -> ViewBatch:
    return ViewBatch([], torch.empty(0), torch.tensor(index), epoch)


def test_strong_views_are_of_the_easiest_images(tmp_path):
    network = Network()
    ours, strong = rescuer(network, tmp_path, k=2, s=0.5)
    features = Features(torch.randn(8, 3), torch.randn(8, 3))
    features.projection[4:] = torch.randn(4, 3)
    features.projection[5] = 2 * features.projection[1]  # image 1: its views are the same
    features.projection[7] = features.projection[3] + 1e-3  # image 3: nearly
    loss = ours.loss(features, part(50, 51, 52, 53, epoch=3))
    (seen,) = network.seen
    assert torch.equal(seen, normalize(strong([(3, 51), (3, 53)])))
    z = network.encode(seen).projection
    towards = torch.cosine_similarity(features.projection[[1, 3]], z)
    assert loss.item() == pytest.approx(-0.5 * towards.mean().item(), abs=1e-6)
    assert ours.statistics()["strong_similarity"] == pytest.approx(towards.mean().item(), abs=1e-6)
    assert ours.statistics()["easy_similarity"] == pytest.approx(1, abs=1e-5)
    strong.close()


def test_accumulation_rescues_the_easiest_of_the_whole_batch_in_the_last_part(tmp_path):
    """The loss is that of the batch in one part, but the common views have no gradient."""
    features = [torch.randn(8, 3, requires_grad=True), torch.randn(8, 3, requires_grad=True)]
    values = config(k=3, s=0.5).model_copy(update={"train": TrainConfig(batch_size=8, accumulate=2)})
    strong = StrongViews(open_dataset("shapes", "train"), strong_transform(values), seed=0, threads=1)
    network = Network()
    ours = Rescuer(values, network, strong, World(), CPU)
    halves = [Features(z, z) for z in features]
    first = ours.loss(halves[0], part(50, 51, 52, 53, epoch=3))
    assert (first.item(), first.requires_grad, network.seen) == (0.0, False, [])
    loss = (first + ours.loss(halves[1], part(60, 61, 62, 63, epoch=3))) / 2
    z_a, z_b = (torch.cat([z.chunk(2)[view] for z in features]) for view in (0, 1))
    index = torch.cosine_similarity(z_a, z_b).argsort(descending=True)[:3]
    images = torch.tensor([50, 51, 52, 53, 60, 61, 62, 63])[index]
    assert torch.equal(network.seen[0], normalize(strong([(3, image) for image in images.tolist()])))
    towards = torch.cosine_similarity(z_a[index], network.encode(network.seen[0]).projection)
    assert loss.item() == pytest.approx(-0.5 * towards.mean().item(), abs=1e-6)
    loss.backward()
    assert network.norm.weight.grad is not None
    assert network.norm.weight.grad.norm() > 0
    assert all(z.grad is None for z in features)
    assert ours.loss(halves[0], part(50, 51, 52, 53, epoch=4)).item() == 0, "the next step starts anew"
    strong.close()


def test_the_configured_feature_is_compared(tmp_path):
    network = Network()
    ours, strong = rescuer(network, tmp_path, k=2, feature="backbone")
    features = Features(torch.randn(4, 3), torch.full((4, 3), torch.nan))
    loss = ours.loss(features, part(0, 1, epoch=0))
    first, second = features.backbone.chunk(2)
    index = torch.cosine_similarity(first, second).argsort(descending=True)
    z = network.seen[0].mean(dim=(2, 3))
    assert loss.item() == pytest.approx(-torch.cosine_similarity(features.backbone[index], z).mean().item(), abs=1e-6)
    strong.close()


def test_strong_views_do_not_move_running_statistics(tmp_path):
    network = Network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ours, strong = rescuer(network, tmp_path, k=2)
    ours.loss(Features(torch.randn(8, 3), torch.randn(8, 3)), part(0, 1, 2, 3, epoch=0))
    strong.close()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.norm.track_running_stats


def test_running_statistics_are_also_kept_with_several_processes():
    norm = shared_batch_norm(nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(8, 3)
    with running_statistics_kept(norm):
        kept = norm(x)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert torch.equal(norm(x), kept)  # normalised by the batch all the same
    assert not torch.equal(norm.state_dict()["running_mean"], before["running_mean"])


def test_one_image_is_too_few_for_batch_norm(tmp_path):
    with pytest.raises(UserError, match=r"rescue.k = 1, but batch norm needs at least 2 .* Raise rescue.k to 2"):
        rescuer(Network(), tmp_path, k=1)


SMALL = {
    "data": {"path": "shapes", "workers": 0, "shapes": {"train": 16, "val": 16, "size": 32}},
    "model": {
        "arch": "vit_micro",
        "patch_size": 8,
        "drop_path_rate": 0.0,
        "out_dim": 32,
        "head_hidden_dim": 32,
        "head_bottleneck_dim": 16,
    },
    "optim": {"warmup_epochs": 0},
    "views": {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 2},
    "selection": {"hard_views": "none"},
    "rescue": {"enabled": True, "k": 3},
    "train": {"batch_size": 8, "epochs": 2, "precision": "fp32", "log_every": 1, "device": "cpu"},
}


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_rescue_the_same_images_as_one(tmp_path):
    """Three images, which do not divide evenly; also with accumulation, where only strong views have gradient."""
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    for out, options in (
        ("one", ["--set=rescue.stop_gradient=true"]),
        ("two", ["--set=rescue.stop_gradient=true", "--devices=2"]),
        ("parts", ["--set=train.accumulate=2", "--devices=2"]),
    ):
        command = [str(Path(sys.executable).with_name("hvp")), "pretrain", "dino", *options]
        command += ["--config", str(tmp_path / "small.yaml"), "--out", str(tmp_path / out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
