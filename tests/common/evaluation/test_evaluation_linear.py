"""Linear probing separates separable images, is reproducible, and caches features by their settings."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvp.common.errors import UserError
from hvp.common.evaluation.linear import LinearOptions, evaluate_linear
from hvp.common.evaluation.linear_classifier import train_linear
from tests.common.evaluation.evaluation_toys import ToyEncoder, ToySource

TRAIN = ToySource()
VAL = ToySource(name="toy (val, 30 images)", length=30, seed=1)
OPTIONS = LinearOptions(epochs=15, base_lr=1.0, batch_size=16, n_last_blocks=2, resolution=16)


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "seconds"}


@pytest.mark.parametrize("augment", [False, True])
def test_separable_images_are_separated(augment: bool) -> None:
    result = evaluate_linear(ToyEncoder(), TRAIN, VAL, replace(OPTIONS, augment=augment))
    assert result["last"]["top1"] == 100.0
    assert result["last"]["top5"] is None
    assert result["last"]["epoch"] == 15
    assert result["best"]["selected_on"] == "val"
    assert len(result["history"]) == 15
    assert result["history"][-1]["loss"] < result["history"][0]["loss"]


@pytest.mark.parametrize("augment", [False, True])
def test_the_result_depends_only_on_the_seed(augment: bool) -> None:
    def run(seed: int, workers: int) -> Any:
        options = replace(OPTIONS, augment=augment, epochs=3, seed=seed, workers=workers)
        return evaluate_linear(ToyEncoder(), TRAIN, VAL, options)["history"]

    torch.manual_seed(1)
    first, random = run(0, workers=0), torch.get_rng_state()
    torch.manual_seed(2)
    assert run(0, workers=2) == first
    assert run(1, workers=0) != first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), random), "the global random state was used"


def test_augmentation_draws_new_crops_every_epoch() -> None:
    seen: list[Tensor] = []

    class Watched(ToyEncoder):
        def probe_features(self, x: Tensor, n_last_blocks: int, avgpool: bool) -> Tensor:
            seen.append(x.sum(dim=(1, 2, 3)).sort().values)
            return super().probe_features(x, n_last_blocks, avgpool)

    encoder = Watched()
    evaluate_linear(encoder, TRAIN, VAL, replace(OPTIONS, augment=True, epochs=2, batch_size=60))
    validation, first, second = seen
    assert (len(validation), len(first), len(second)) == (30, 60, 60)
    assert not torch.allclose(first, second)
    assert encoder.norm.num_batches_tracked == 0
    assert encoder.training


def test_training_is_sgd_with_a_cosine_over_epochs() -> None:
    """Compared with torch's own optimiser, scheduler and layer, from the same weights on the same batches."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 5, generator=generator), torch.randint(0, 6, (40,), generator=generator)
    layer = nn.Linear(5, 6)
    nn.init.normal_(layer.weight, std=0.01, generator=torch.Generator().manual_seed(3))
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6, eta_min=0)
    expected = []
    for _ in range(6):
        total = 0.0
        for x, y in zip(features.split(16), labels.split(16), strict=True):
            loss = nn.functional.cross_entropy(layer(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x) / 40
        scheduler.step()
        expected.append(total)

    history = train_linear(
        lambda epoch: zip(features.split(16), labels.split(16), strict=True),
        features,
        labels,
        6,
        lr=0.5,
        epochs=6,
        seed=3,
    )
    assert [entry.loss for entry in history] == pytest.approx(expected, rel=1e-5)
    assert history[-1].top1 == pytest.approx(100 * (layer(features).argmax(1) == labels).double().mean().item())


def test_lars_scales_weights_and_bias_by_their_own_length() -> None:
    """Compared with SimSiam's recipe, step by step.

    LARC without clipping scales each gradient, including the bias', to 0.001 times the length of its tensor; SGD with
    momentum follows. A tensor of length 0 uses the gradient unscaled.
    """
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 5, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    weight = torch.empty(3, 5).normal_(0.0, 0.01, generator=torch.Generator().manual_seed(3))
    tensors = [weight.double(), torch.zeros(3, dtype=torch.float64)]
    speeds = [torch.zeros_like(tensor) for tensor in tensors]
    expected = []
    for epoch in range(4):
        lr = 0.3 * 0.5 * (1 + math.cos(math.pi * epoch / 4))
        total = 0.0
        for x, y in zip(features.double().split(16), labels.split(16), strict=True):
            probabilities = (x @ tensors[0].T + tensors[1]).softmax(dim=1)
            total -= probabilities[torch.arange(len(y)), y].log().sum().item() / 40
            error = (probabilities - nn.functional.one_hot(y, 3)) / len(y)
            for tensor, speed, gradient in zip(tensors, speeds, (error.T @ x, error.sum(dim=0)), strict=True):
                length = math.sqrt((tensor**2).sum().item())
                trust = 0.001 * length / (math.sqrt((gradient**2).sum().item()) + 1e-8) if length else 1.0
                speed.mul_(0.9).add_(gradient * trust)
                tensor.sub_(lr * speed)
        expected.append(total)
    history = train_linear(
        lambda epoch: zip(features.split(16), labels.split(16), strict=True),
        features,
        labels,
        3,
        lr=0.3,
        epochs=4,
        seed=3,
        optimizer="lars",
    )
    assert [entry.loss for entry in history] == pytest.approx(expected, rel=1e-5)


def test_the_first_the_last_and_every_nth_epoch_are_validated() -> None:
    result = evaluate_linear(ToyEncoder(), TRAIN, VAL, replace(OPTIONS, epochs=6, val_every=2))
    assert [entry["epoch"] for entry in result["history"]] == [1, 3, 5, 6]


def test_best_is_the_first_of_equal_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    top1 = iter([50.0, 90.0, 90.0, 70.0])
    monkeypatch.setattr("hvp.common.evaluation.linear_classifier._validate", lambda *_: (next(top1), None))
    result = evaluate_linear(ToyEncoder(), TRAIN, VAL, replace(OPTIONS, epochs=4))
    assert (result["best"]["top1"], result["best"]["epoch"]) == (90.0, 2)
    assert (result["last"]["top1"], result["last"]["epoch"]) == (70.0, 4)


def test_features_are_computed_once_for_the_same_settings(tmp_path: Path) -> None:
    def run(**changes: Any) -> tuple[dict[str, Any], int]:
        encoder = ToyEncoder()
        result = evaluate_linear(encoder, TRAIN, VAL, replace(OPTIONS, epochs=2, **changes), cache_folder=tmp_path)
        return without_times(result), encoder.seen

    fresh, seen = run()
    assert seen == 60 + 30
    assert run() == (fresh, 0)
    assert run(seed=1, base_lr=0.5)[1] == 0
    for changes in ({"resolution": 12}, {"avgpool": True}, {"n_last_blocks": 1}, {"precision": "bf16"}):
        assert run(**changes)[1] > 0

    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:300])
    assert run() == (fresh, seen)


def test_a_batch_larger_than_the_dataset_is_reduced_with_a_note() -> None:
    result = evaluate_linear(ToyEncoder(), TRAIN, VAL, replace(OPTIONS, batch_size=1024, base_lr=0.512))
    assert result["settings"]["lr"] == pytest.approx(0.512 * 60 / 256)
    assert result["notes"] == ["batch_size = 1024 is more than the 60 training images: 60 is used"]
    json.dumps(result, allow_nan=False)


def test_divergence_is_an_error() -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf)\. Lower base_lr"):
        evaluate_linear(ToyEncoder(), TRAIN, VAL, replace(OPTIONS, base_lr=1e38))


@pytest.mark.parametrize("augment", [False, True])
def test_a_bad_training_image_is_named(augment: bool) -> None:
    with pytest.raises(UserError) as caught:
        evaluate_linear(ToyEncoder(), ToySource(bad=(17,)), VAL, replace(OPTIONS, augment=augment))
    assert str(caught.value).startswith("toy 17: is not an image.\n")
    assert "skip" not in str(caught.value)


def test_sources_with_different_classes_are_refused() -> None:
    with pytest.raises(UserError, match="Only in val: yellow; only in train: red"):
        evaluate_linear(ToyEncoder(), TRAIN, ToySource(classes=("blue", "green", "yellow")), OPTIONS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("epochs", "batch_size", "val_every", "resolution", "n_last_blocks")),
        *(("base_lr", value) for value in (0.0, float("nan"), float("inf"))),
    ],
)
def test_options_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"linear probing: {name} = {value}, but it must be"):
        LinearOptions(**{name: value})
