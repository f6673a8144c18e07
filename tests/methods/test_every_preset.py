"""Every preset is complete and documented; those for small datasets take a step on small images."""

import re

import numpy as np
import pytest
from PIL import Image

from hvp.cli.dry_run import consequences
from hvp.common.config.resolving import leaf_keys, read_yaml, resolve
from hvp.methods import METHODS, get_method, get_preset, presets

SMALL_SETS = ("cifar10", "cifar100", "stl10", "imagenet100", "own")
EVERY = [(method, name) for method in METHODS for name in presets(method)]
STARTED = [(method, name) for method, name in EVERY if name in SMALL_SETS]


@pytest.mark.parametrize(("method", "name"), EVERY)
def test_a_preset_gives_its_command_and_has_consequences(method, name):
    text = get_preset(method, name).read_text(encoding="utf-8")
    first, command = text.splitlines()[:2]
    assert re.match(r"# \S.*\.$", first)
    assert command.startswith(f"#   hvp pretrain {method} --preset {name}")
    assert name == "tiny" or "# Measured here: not yet run." in text
    config = resolve(get_method(method).config, [(name, read_yaml(get_preset(method, name)))]).config
    assert consequences(method, config)


def test_every_method_has_a_preset_for_custom_images():
    for method in METHODS:
        assert {"tiny", "own", "stl10", "imagenet100"} <= set(presets(method))
    assert {"cifar10", "cifar100"} <= set(presets("simsiam")) & set(presets("simclr"))


@pytest.mark.parametrize(("method", "name"), STARTED)
def test_a_preset_gives_every_value_of_its_networks_and_objective(method, name):
    """A value that a preset leaves out is not read by the trainer there, or depends on the run."""
    given = read_yaml(get_preset(method, name))
    own = {"data", "train", "selection", "rescue", "views"}
    left_out = [
        key
        for key in leaf_keys(get_method(method).config)
        if (parts := key.split("."))[0] not in own and parts[-1] not in given.get(parts[0], {})
    ]
    allowed = {"model.head_hidden_dim", "model.head_bottleneck_dim", "model.stop_grad_conv1"}
    allowed |= {"loss.student_temp", "loss.center_momentum", "loss.center_momentum2", "optim.optimizer"}
    allowed |= {f"ibot.head_{size}" for size in ("n_prototypes", "bottleneck_dim", "nlayers", "hidden_dim")}
    assert not set(left_out) - allowed


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    numbers = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(numbers.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), STARTED)
def test_a_preset_takes_a_step(method, name, pictures, tmp_path):
    values = {"data.path": str(pictures), "data.workers": 0, "train.batch_size": 4, "train.epochs": 1}
    values |= {"train.precision": "fp32", "train.device": "cpu", "rescue.k": 2}
    given = read_yaml(get_preset(method, name))
    for section, key in (("optim", "warmup_epochs"), ("loss", "warmup_teacher_temp_epochs")):
        if key in given.get(section, {}):
            values[f"{section}.{key}"] = 0
    config = resolve(get_method(method).config, [(name, given), ("test", values)]).config
    assert get_method(method).train(config, tmp_path / "run").is_file()
