"""DINOv2's original: its options, its batches, and side by side with ours where HVP_UPSTREAMS names a clone."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hvp.benchmarks.originals.comparison import compare
from hvp.common.config.resolving import flatten, read_yaml, resolve
from hvp.common.errors import UserError
from hvp.common.views import ViewBatch
from hvp.methods import get_method, get_preset
from hvp.methods.dinov2.config import DINOv2Config
from hvp.patches.dinov2.original import IMAGES, ORIGINAL, ImagesOfSteps, check_data, flags, saved
from hvp.patches.patching import load_patch
from tests.upstreams import clone_of


def config(**values: object) -> DINOv2Config:
    """The preset with other values; __ stands for the dot of a key."""
    layers = [("preset", read_yaml(get_preset("dinov2", "vitl16-100ep")))]
    layers.append(("test", {key.replace("__", "."): value for key, value in values.items()}))
    return resolve(DINOv2Config, layers).config


def options(of: DINOv2Config, processes: int = 8) -> dict[str, str]:
    """What stands after our flags, by key."""
    words = flags(of, "DATA", processes)
    assert words[:8] == ["--config-file", "/dev/null", "--output-dir", ".", "--rescue-k", words[5], "--rescue-s", "1.0"]
    return dict(word.split("=", 1) for word in words[8:])


def test_the_preset_has_the_originals_epochs():
    """200 passes over the images in batches of 2048 are 100 times 1250 steps."""
    said = options(config())
    assert (said["optim.epochs"], said["train.OFFICIAL_EPOCH_LENGTH"]) == ("100", "1250")
    assert said["train.batch_size_per_gpu"] == "256"
    assert said["crops.global_crops_scale"] == "[0.32,1.0]"
    assert flags(config(), "DATA", 8)[5] == "2"
    assert said["train.dataset_path"] == "ImageNet:split=TRAIN:root=DATA:extra=DATA"


def test_epochs_are_passes_where_no_length_is_given():
    said = options(config(optim__epoch_length=None, train__epochs=30, train__batch_size=1024))
    assert (said["optim.epochs"], said["train.OFFICIAL_EPOCH_LENGTH"]) == ("30", "1251")


def test_a_part_of_an_epoch_cannot_be_said():
    with pytest.raises(UserError, match=r"are 94375 steps .* no whole number of optim.epoch_length = 1250"):
        flags(config(train__epochs=151), "DATA", 8)


def test_a_warm_up_longer_than_the_run_cannot_be_said():
    with pytest.raises(UserError, match=r"optim.warmup_epochs = 10 are 12500 steps, but the run has 6250"):
        flags(config(train__epochs=10), "DATA", 8)


def test_precision_and_sharding_are_said_where_they_are_not_the_default():
    def of(**values: object) -> dict[str, str]:
        said = options(config(**values))
        return {key.removeprefix("compute_precision."): said[key] for key in said if key.startswith("compute")}

    assert of() == {"grad_scaler": "true"}
    found = of(train__precision="bf16", train__sharding="ddp")
    assert len(found) == 1 + 6 * 3
    assert found["grad_scaler"] == "false"
    assert found["teacher.ibot_head.sharding_strategy"] == "NO_SHARD"
    assert found["student.backbone.mixed_precision.param_dtype"] == "bf16"
    assert found["student.backbone.mixed_precision.reduce_dtype"] == "fp32"


def test_registers_bring_their_way_to_interpolate_positions():
    assert "student.interpolate_offset" not in options(config())
    said = options(config(model__num_register_tokens=4))
    assert (said["student.interpolate_antialias"], said["student.interpolate_offset"]) == ("true", "0.0")


def test_data_without_the_originals_list_gets_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError) as caught:
        check_data(tmp_path, tmp_path / "clone")
    command = shlex.split(str(caught.value).splitlines()[-1])
    assert command[:4] == ["env", f"PYTHONPATH={tmp_path / 'clone'}", "python", "-c"]
    assert f'root="{tmp_path}", extra="{tmp_path}"' in command[4]


def test_only_a_list_of_all_images_will_do(tmp_path):
    np.save(tmp_path / "entries-TRAIN.npy", np.zeros(3, dtype=np.uint8))
    with pytest.raises(UserError, match="lists 3 images"):
        check_data(tmp_path, tmp_path)
    np.save(tmp_path / "entries-TRAIN.npy", np.zeros(IMAGES, dtype=np.uint8))
    check_data(tmp_path, tmp_path)


def test_a_path_that_the_original_takes_apart_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be told a path"):
        check_data(tmp_path / "a=b", tmp_path)


def test_a_batch_is_the_originals():
    """2 images, 2 global and 3 local crops, 4 patches."""
    shades = torch.arange(4, dtype=torch.uint8).reshape(2, 2, 1, 1, 1)  # of each global crop
    masks = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    batch = ViewBatch(
        pixels=[shades.repeat(1, 1, 4, 4, 3), torch.zeros(3, 2, 2, 2, 3, dtype=torch.uint8)],
        parameters=torch.zeros(2, 5, 1),
        index=torch.tensor([7, 9]),
        masks=masks.reshape(2, 2, 2, 2),
    )
    found = ORIGINAL.batch(batch)
    assert found["collated_global_crops"][:, 0, 0, 0].argsort().tolist() == [
        0,
        1,
        2,
        3,
    ]  # crop after crop, and in each image after image
    assert found["collated_local_crops"].shape == (6, 3, 2, 2)
    assert found["collated_masks"].shape == (4, 4)
    assert found["mask_indices_list"].tolist() == [1, 3, 8, 9, 10]
    assert found["masks_weight"].tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
    assert found["n_masked_patches"].tolist() == [5]
    assert found["upperbound"] >= 5
    assert found["index"].tolist() == [7, 9]


def test_a_checkpoint_is_taken_apart():
    names = ["student.backbone.blocks.2.7.norm1.bias", "teacher.dino_head.mlp.0.bias", "ibot_patch_loss.center"]
    found = saved({"model": {name: torch.zeros(1) for name in names}})
    keys = {part: list(state) for part, state in found.items()}
    assert keys == {
        "student": ["backbone.blocks.7.norm1.bias"],
        "teacher": ["dino_head.mlp.0.bias"],
        "dinov2_loss": ["ibot_patch_loss.center"],
    }


def test_strong_views_are_those_of_our_trainers_epoch():
    """Of 40 images in batches of 4, step 13 is of the second epoch."""
    ours = ImagesOfSteps()
    index = torch.tensor([3, 5])
    assert torch.equal(ours.strong_views(13, index), ours.strong_views(10, index))
    assert not torch.equal(ours.strong_views(13, index), ours.strong_views(9, index))


# A real clone.


CONFIGS = [
    {"data__workers": 4},
    {"train__precision": "fp32", "train__sharding": "ddp", "model__num_register_tokens": 4},
]


def defaults() -> Path:
    """The original's own configuration."""
    return clone_of(load_patch("dinov2")) / "dinov2" / "configs" / "ssl_default_config.yaml"


@pytest.mark.parametrize("values", CONFIGS)
def test_the_original_has_every_option(values):
    known = flatten(yaml.safe_load(defaults().read_text()))
    assert options(config(**values)).keys() <= known.keys()


@pytest.mark.parametrize("values", CONFIGS)
def test_the_original_reads_every_value_as_what_it_is(values):
    """By the package that it reads its configuration with; a key that it does not know would be an error."""
    OmegaConf = pytest.importorskip("omegaconf").OmegaConf
    known = OmegaConf.load(defaults())
    OmegaConf.set_struct(known, True)
    said = options(config(**values))
    found = OmegaConf.merge(known, OmegaConf.from_cli([f"{key}={value}" for key, value in said.items()]))
    for key in said:
        now, before = (OmegaConf.select(where, key) for where in (found, known))
        assert type(now) is type(before) or {type(now), type(before)} == {int, float}, key
    assert (found.optim.min_lr, list(found.crops.global_crops_scale)) == (1e-6, [0.32, 1.0])
    assert found.train.dataset_path == said["train.dataset_path"]


BOTH = {
    "teacher.centering": "sinkhorn_knopp",
    "ibot.separate_head": True,
    "ibot.head_n_prototypes": 80,
    "ibot.head_hidden_dim": 192,
    "ibot.head_bottleneck_dim": 48,
}
GATED = {"model.ffn_layer": "swiglu", "model.num_register_tokens": 4, "optim.epoch_length": None}


def side_by_side(also: dict[str, object], replaced: str = "", by: str = ""):
    """Both on ORIGINAL's configuration with other values; the original alone on one that is replaced."""
    patch = load_patch("dinov2")
    clone = clone_of(patch)
    for package in ORIGINAL.needs:
        pytest.importorskip(package)

    def others(config: DINOv2Config, data: str, processes: int) -> list[str]:
        words = flags(config, data, processes)
        return [by if replaced and word == replaced else word for word in words]

    original = replace(ORIGINAL, flags=others, compared={**ORIGINAL.compared, **also})
    return compare(get_method("dinov2"), original, patch, clone)


@pytest.mark.slow
@pytest.mark.parametrize("also", [BOTH, GATED])
def test_the_patched_original_agrees_otherwise_configured(also):
    """Sinkhorn-Knopp with a head for patches, and registers with gated layers, beside what `hvp patch compare` has."""
    found = side_by_side(also)
    assert found.agrees, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "instead"),
    [
        ("optim.layerwise_decay=0.9", "optim.layerwise_decay=0.85"),
        ("teacher.momentum_teacher=0.992", "teacher.momentum_teacher=0.99"),
        ("0.5", "0.51"),  # --rescue-s
    ],
)
def test_an_original_that_is_told_otherwise_does_not_agree(said, instead):
    found = side_by_side({}, said, instead)
    assert found.untouched
    assert not found.agrees
