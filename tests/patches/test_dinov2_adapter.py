"""Adapter of DINOv2's original: its options, and the folder of images."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml

from hvp.common.config.resolving import flatten, read_yaml, resolve
from hvp.common.errors import UserError
from hvp.methods import get_preset
from hvp.methods.dinov2.config import DINOv2Config
from hvp.patches.dinov2.adapter import IMAGES, check_data, flags
from hvp.patches.patching import load_patch
from tests.upstreams import clone_of


def config(**values: object) -> DINOv2Config:
    """Return the preset with other values; __ stands for the dot of a key."""
    layers: list[tuple[str, Mapping[str, object]]] = [("preset", read_yaml(get_preset("dinov2", "vitl16-100ep")))]
    layers.append(("test", {key.replace("__", "."): value for key, value in values.items()}))
    return resolve(DINOv2Config, layers).config


def options(of: DINOv2Config, processes: int = 8) -> dict[str, str]:
    """Return the options after our flags, by key."""
    words = flags(of, "DATA", processes)
    assert words[:8] == ["--config-file", "/dev/null", "--output-dir", ".", "--rescue-k", words[5], "--rescue-s", "1.0"]
    return dict(word.split("=", 1) for word in words[8:])


def test_the_preset_has_the_originals_epochs():
    """200 passes over the images in batches of 2048 are 100 times 1250 steps."""
    given = options(config())
    assert (given["optim.epochs"], given["train.OFFICIAL_EPOCH_LENGTH"]) == ("100", "1250")
    assert given["train.batch_size_per_gpu"] == "256"
    assert given["crops.global_crops_scale"] == "[0.32,1.0]"
    assert flags(config(), "DATA", 8)[5] == "2"
    assert given["train.dataset_path"] == "ImageNet:split=TRAIN:root=DATA:extra=DATA"


def test_epochs_are_passes_without_an_epoch_length():
    given = options(config(optim__epoch_length=None, train__epochs=30, train__batch_size=1024))
    assert (given["optim.epochs"], given["train.OFFICIAL_EPOCH_LENGTH"]) == ("30", "1251")


def test_a_partial_epoch_is_refused():
    with pytest.raises(UserError, match=r"are 94375 steps .* no whole number of optim.epoch_length = 1250"):
        flags(config(train__epochs=151), "DATA", 8)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"optim.warmup_epochs = 10 are 12500 steps, but the run has 6250"):
        flags(config(train__epochs=10), "DATA", 8)


def test_precision_and_sharding_appear_unless_they_are_the_default():
    def of(**values: object) -> dict[str, str]:
        given = options(config(**values))
        return {key.removeprefix("compute_precision."): given[key] for key in given if key.startswith("compute")}

    assert of() == {"grad_scaler": "true"}
    found = of(train__precision="bf16", train__sharding="ddp")
    assert len(found) == 1 + 6 * 3
    assert found["grad_scaler"] == "false"
    assert found["teacher.ibot_head.sharding_strategy"] == "NO_SHARD"
    assert found["student.backbone.mixed_precision.param_dtype"] == "bf16"
    assert found["student.backbone.mixed_precision.reduce_dtype"] == "fp32"


def test_registers_change_the_interpolation_of_positions():
    assert "student.interpolate_offset" not in options(config())
    given = options(config(model__num_register_tokens=4))
    assert (given["student.interpolate_antialias"], given["student.interpolate_offset"]) == ("true", "0.0")


def test_without_the_originals_list_the_message_has_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError) as caught:
        check_data(tmp_path, tmp_path / "clone")
    command = shlex.split(str(caught.value).splitlines()[-1])
    assert command[:4] == ["env", f"PYTHONPATH={tmp_path / 'clone'}", "python", "-c"]
    assert f'root="{tmp_path}", extra="{tmp_path}"' in command[4]


def test_only_a_list_of_all_images_is_accepted(tmp_path):
    np.save(tmp_path / "entries-TRAIN.npy", np.zeros(3, dtype=np.uint8))
    with pytest.raises(UserError, match="lists 3 images"):
        check_data(tmp_path, tmp_path)
    np.save(tmp_path / "entries-TRAIN.npy", np.zeros(IMAGES, dtype=np.uint8))
    check_data(tmp_path, tmp_path)


def test_a_path_with_special_characters_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read a path that contains"):
        check_data(tmp_path / "a=b", tmp_path)


# On a real clone.


CONFIGS = [
    {"data__workers": 4},
    {"train__precision": "fp32", "train__sharding": "ddp", "model__num_register_tokens": 4},
]


def defaults() -> Path:
    """Return the original's default configuration."""
    return clone_of(load_patch("dinov2")) / "dinov2" / "configs" / "ssl_default_config.yaml"


@pytest.mark.parametrize("values", CONFIGS)
def test_the_original_has_every_option(values):
    known = flatten(yaml.safe_load(defaults().read_text()))
    assert options(config(**values)).keys() <= known.keys()


@pytest.mark.parametrize("values", CONFIGS)
def test_the_original_reads_every_value_with_its_type(values):
    """OmegaConf reads its configuration; an unknown key would be an error."""
    OmegaConf = pytest.importorskip("omegaconf").OmegaConf
    known = OmegaConf.load(defaults())
    OmegaConf.set_struct(known, True)
    given = options(config(**values))
    found = OmegaConf.merge(known, OmegaConf.from_cli([f"{key}={value}" for key, value in given.items()]))
    for key in given:
        now, before = (OmegaConf.select(where, key) for where in (found, known))
        assert type(now) is type(before) or {type(now), type(before)} == {int, float}, key
    assert (found.optim.min_lr, list(found.crops.global_crops_scale)) == (1e-6, [0.32, 1.0])
    assert found.train.dataset_path == given["train.dataset_path"]
