"""Comparison with DINOv2's original: its batches and checkpoints, and other configurations where there is a clone."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from hvp.benchmarks.originals.comparison import Comparison, compare
from hvp.benchmarks.originals.dinov2 import HARNESS, ImagesOfSteps, batch_with_masks, read_checkpoint
from hvp.common.views import ViewBatch
from hvp.methods import get_method
from hvp.patches import get_adapter
from hvp.patches.patching import load_patch
from tests.upstreams import clone_of


def test_a_batch_has_the_originals_layout():
    """2 images, 2 global and 3 local crops, 4 patches."""
    shades = torch.arange(4, dtype=torch.uint8).reshape(2, 2, 1, 1, 1)  # of each global crop
    masks = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    batch = ViewBatch(
        pixels=[shades.repeat(1, 1, 4, 4, 3), torch.zeros(3, 2, 2, 2, 3, dtype=torch.uint8)],
        parameters=torch.zeros(2, 5, 1),
        index=torch.tensor([7, 9]),
        masks=masks.reshape(2, 2, 2, 2),
    )
    found = batch_with_masks(batch)
    shade_order = found["collated_global_crops"][:, 0, 0, 0].argsort()
    assert shade_order.tolist() == [0, 1, 2, 3]  # crop after crop, in each image after image
    assert found["collated_local_crops"].shape == (6, 3, 2, 2)
    assert found["collated_masks"].shape == (4, 4)
    assert found["mask_indices_list"].tolist() == [1, 3, 8, 9, 10]
    assert found["masks_weight"].tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
    assert found["n_masked_patches"].tolist() == [5]
    assert found["upperbound"] >= 5
    assert found["index"].tolist() == [7, 9]


def test_a_checkpoint_is_divided_into_its_parts():
    names = ["student.backbone.blocks.2.7.norm1.bias", "teacher.dino_head.mlp.0.bias", "ibot_patch_loss.center"]
    found = read_checkpoint({"model": {name: torch.zeros(1) for name in names}})
    keys = {part: list(state) for part, state in found.items()}
    assert keys == {
        "student": ["backbone.blocks.7.norm1.bias"],
        "teacher": ["dino_head.mlp.0.bias"],
        "dinov2_loss": ["ibot_patch_loss.center"],
    }


def test_strong_views_depend_on_the_epoch_of_the_step():
    """With 40 images in batches of 4, step 13 belongs to the second epoch."""
    ours = ImagesOfSteps()
    index = torch.tensor([3, 5])
    assert torch.equal(ours.strong_views(13, index), ours.strong_views(10, index))
    assert not torch.equal(ours.strong_views(13, index), ours.strong_views(9, index))


# On a real clone.


BOTH = {
    "teacher.centering": "sinkhorn_knopp",
    "ibot.separate_head": True,
    "ibot.head_n_prototypes": 80,
    "ibot.head_hidden_dim": 192,
    "ibot.head_bottleneck_dim": 48,
}
GATED = {"model.ffn_layer": "swiglu", "model.num_register_tokens": 4, "optim.epoch_length": None}


def compare_with(values: Mapping[str, object], words: Mapping[str, str]) -> Comparison:
    """Compare on other configuration values, with words of the original's command line replaced."""
    patch = load_patch("dinov2")
    clone = clone_of(patch)
    for package in HARNESS.needs:
        pytest.importorskip(package)
    harness = replace(HARNESS, values={**HARNESS.values, **values}, words=words)
    return compare(get_method("dinov2"), get_adapter("dinov2"), harness, patch, clone)


@pytest.mark.slow
@pytest.mark.parametrize("values", [BOTH, GATED])
def test_the_patched_original_agrees_in_other_configurations(values):
    """Sinkhorn-Knopp with a head for patches, and registers with gated layers."""
    found = compare_with(values, {})
    assert found.agrees, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "instead"),
    [
        ("optim.layerwise_decay=0.9", "optim.layerwise_decay=0.85"),
        ("teacher.momentum_teacher=0.992", "teacher.momentum_teacher=0.99"),
        ("0.5", "0.51"),  # --rescue-s
    ],
)
def test_an_original_with_another_value_does_not_agree(word, instead):
    found = compare_with({}, {word: instead})
    assert found.untouched
    assert not found.agrees
