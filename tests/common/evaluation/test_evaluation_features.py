"""Features are in order, computed on upstream's evaluation view, and cached; the encoder is left unchanged."""

import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms

from hvp.common.errors import UserError
from hvp.common.evaluation import centre_crop
from hvp.common.evaluation.centre_crop import evaluation_view
from hvp.common.evaluation.features import cached, extract, source_digest, weights_digest
from hvp.common.views import normalize
from tests.common.evaluation.evaluation_toys import ToyEncoder, ToySource


@pytest.mark.parametrize("resolution", [224, 96, 32, 33])
@pytest.mark.parametrize("size", [(64, 64), (300, 451), (457, 301), (37, 500), (256, 256)])
def test_the_view_equals_torchvisions(size: tuple[int, int], resolution: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    upstream = transforms.Compose(
        [
            transforms.Resize(round(resolution * 256 / 224), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(resolution),
        ]
    )
    np.testing.assert_array_equal(evaluation_view(image, resolution), np.asarray(upstream(Image.fromarray(image))))


SIDES = st.one_of(st.integers(1, 40), st.integers(1, 260))


@settings(max_examples=60)
@given(shorter=SIDES, longer=SIDES, wide=st.booleans(), resolution=st.sampled_from([224, 96, 33, 7]))
@example(shorter=1, longer=3000, wide=True, resolution=96)
@example(shorter=1, longer=3001, wide=False, resolution=33)
@example(shorter=31, longer=32, wide=False, resolution=224)
@example(shorter=3, longer=1001, wide=True, resolution=17)
def test_the_crop_of_an_enlarged_image_is_the_same_without_the_rest_of_it(
    shorter: int, longer: int, wide: bool, resolution: int
) -> None:
    size = (shorter, longer) if wide else (longer, shorter)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = evaluation_view(image, resolution)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(centre_crop, "LARGEST_ENLARGEMENT", 0)
        np.testing.assert_array_equal(evaluation_view(image, resolution), expected)


@pytest.mark.parametrize("size", [(1, 30_000), (1, 100_000), (100_000, 1), (2, 40_000_000)])
def test_an_image_of_extreme_shape_needs_little_memory(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.broadcast_to(np.array([200, 30, 40], dtype=np.uint8), (*size, 3))
    monkeypatch.setattr(Image, "fromarray", lambda _: pytest.fail("the whole image is resized"))
    tracemalloc.start()
    view = evaluation_view(image, 224)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    assert view.shape == (224, 224, 3)
    assert (view == [200, 30, 40]).all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_features_are_in_order_for_any_batch_size(batch_size: int, workers: int) -> None:
    source, encoder = ToySource(length=13), ToyEncoder()
    features = extract(encoder, source, resolution=16, batch_size=batch_size, workers=workers)
    encoder.eval()
    for index in range(len(source)):
        view = torch.from_numpy(evaluation_view(source.read(index), 16))
        torch.testing.assert_close(features[index], encoder(normalize(view)[None])[0].detach(), rtol=1e-5, atol=1e-6)


def test_extraction_changes_nothing() -> None:
    encoder = ToyEncoder()
    modes = [module.training for module in encoder.modules()]
    before, random = weights_digest(encoder), torch.get_rng_state()
    features = extract(encoder, ToySource(), resolution=16)
    assert [module.training for module in encoder.modules()] == modes
    assert weights_digest(encoder) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not features.requires_grad
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_an_error() -> None:
    encoder = ToyEncoder()
    with pytest.raises(UserError):
        extract(encoder, ToySource(bad=(30,)), resolution=16)
    assert encoder.training
    assert encoder.norm.training
    assert not encoder.dropout.training


def test_half_precision_gives_close_float32_features() -> None:
    full = extract(ToyEncoder(), ToySource(), resolution=16)
    half = extract(ToyEncoder(), ToySource(), resolution=16, precision="bf16")
    assert half.dtype == full.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        extract(ToyEncoder(), ToySource(bad=(17,)), resolution=16, batch_size=8, workers=workers)
    assert str(caught.value).startswith("toy 17: is not an image.\n")
    assert "skip" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_an_empty_source_is_an_error() -> None:
    with pytest.raises(UserError, match="there are no images"):
        extract(ToyEncoder(), ToySource(length=0), resolution=16)


def test_the_error_for_non_finite_features_names_the_image() -> None:
    def overflow(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x))[:, None] == 3, torch.inf, x.mean(dim=(2, 3)))

    with pytest.raises(UserError, match="toy 3: the encoder's features are not finite"):
        extract(ToyEncoder(), ToySource(), resolution=16, features=overflow)


def test_progress_ends_at_the_total() -> None:
    seen: list[tuple[str, int, int]] = []
    extract(ToyEncoder(), ToySource(), resolution=16, batch_size=25, progress=lambda *call: seen.append(call))
    assert [(done, total) for _, done, total in seen] == [(25, 60), (50, 60), (60, 60)]


def test_digests_depend_on_images_and_weights() -> None:
    sources = [ToySource(), ToySource(length=59), ToySource(name="other"), ToySource(seed=1)]
    assert len({source_digest(source) for source in sources}) == len(sources)
    assert source_digest(ToySource()) == source_digest(ToySource())
    encoder = ToyEncoder()
    before = weights_digest(encoder)
    with torch.no_grad():
        encoder.mix[0, 0] += 1e-3
    assert weights_digest(encoder) != before


def test_cache_computes_once_per_key(tmp_path: Path) -> None:
    def read(name: str, value: float) -> Tensor:
        return cached(tmp_path / "cache", {"name": name}, lambda: torch.full((2, 3), value))

    found = [read(name, value) for name, value in (("a", 1.0), ("b", 2.0), ("a", 7.0), ("b", 7.0))]
    assert [features[0, 0].item() for features in found] == [1.0, 2.0, 1.0, 2.0]


def test_a_damaged_cache_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached(tmp_path, {"a": 1}, lambda: torch.zeros(50, 3))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with caplog.at_level(logging.WARNING):
        assert cached(tmp_path, {"a": 1}, lambda: torch.ones(50, 3)).eq(1.0).all()
    assert "damaged and computed again" in caplog.text
    assert cached(tmp_path, {"a": 1}, lambda: torch.zeros(50, 3)).eq(1.0).all()
    assert list(tmp_path.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_does_not_stop_the_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert cached(tmp_path / "file", {}, lambda: torch.ones(2, 3)).eq(1.0).all()
    assert "cannot be kept" in caplog.text
