"""Every kind of checkpoint file is read, and unusable ones are refused with a reason."""

import argparse
import collections
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hvp.common.errors import UserError
from hvp.common.evaluation.checkpoints import load_complete, load_encoder, read_backbone_state
from hvp.common.evaluation.linear import probe_defaults
from hvp.common.networks.resnet import CONVNETS
from hvp.common.training.checkpoint import save_checkpoint

WEIGHT = {"cls_token": torch.ones(1, 1, 4), "norm.weight": torch.arange(4.0)}
HEAD = {"head.mlp.0.weight": torch.ones(2, 4), "head.last_layer.weight_g": torch.ones(2, 1)}


def network(scale: float, prefix: str = "", backbone: str = "backbone.") -> dict[str, Tensor]:
    """State dict of a student or teacher in a checkpoint, with every weight multiplied by `scale`."""
    weights = {backbone + key: value for key, value in WEIGHT.items()} | HEAD
    return {prefix + key: value * scale for key, value in weights.items()}


def assert_weights(state: dict[str, Tensor], scale: float) -> None:
    assert set(state) == set(WEIGHT)
    for key, value in WEIGHT.items():
        torch.testing.assert_close(state[key], value * scale)


def hvp_file(path: Path, **changes: Any) -> Path:
    content = {"method": "dino", "config": {"model": {"arch": "vit_tiny"}}, "epoch": 3, "step": 40}
    content |= {"student": network(1.0), "teacher": network(2.0)}
    save_checkpoint(path, content | changes)
    return path


def upstream_file(path: Path) -> Path:
    """Save a file like main_dino.py: DDP's prefix on the student, arguments, and numpy numbers in the optimiser."""
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(5e-4), "weight_decay": np.float64(0.04)}]}
    content = {"student": network(1.0, "module."), "teacher": network(2.0), "optimizer": optimizer, "epoch": 100}
    content |= {"args": argparse.Namespace(arch="vit_small", patch_size=16, global_crops_scale=(0.4, 1.0))}
    torch.save(content | {"dino_loss": {"center": torch.zeros(1, 2)}}, path)
    return path


@pytest.mark.parametrize(("which", "scale"), [("student", 1.0), ("teacher", 2.0)])
@pytest.mark.parametrize("write", [hvp_file, upstream_file])
def test_the_requested_network_is_read_from_training_checkpoints(
    write: Any, which: Any, scale: float, tmp_path: Path
) -> None:
    state, meta = vars(read_backbone_state(write(tmp_path / "checkpoint.pth"), which)).values()
    assert_weights(state, scale)
    assert meta.which == which
    assert meta.dropped == tuple(HEAD)


def test_the_meta_data_of_a_file_is_read(tmp_path: Path) -> None:
    ours = read_backbone_state(hvp_file(tmp_path / "last.pt")).meta
    assert (ours.format, ours.method, ours.epoch, ours.step) == ("hvp", "dino", 3, 40)
    assert ours.config == {"model": {"arch": "vit_tiny"}}
    assert ours.summary()["which"] == "teacher"
    upstream = read_backbone_state(upstream_file(tmp_path / "checkpoint.pth")).meta
    assert (upstream.format, upstream.method, upstream.epoch, upstream.step) == ("upstream", None, 100, None)
    assert upstream.config is not None
    assert upstream.config["patch_size"] == 16


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "encoder.", "module.encoder."])
def test_bare_state_dicts(prefix: str, wrapped: str | None, tmp_path: Path) -> None:
    weights = collections.OrderedDict((prefix + key, value) for key, value in WEIGHT.items())
    torch.save({wrapped: weights, "epoch": 7} if wrapped else weights, tmp_path / "weights.pth")
    read = read_backbone_state(tmp_path / "weights.pth")
    assert_weights(read.state, 1.0)
    assert (read.meta.format, read.meta.which, read.meta.dropped) == ("bare", "bare", ())
    assert read.meta.epoch == (7 if wrapped else None)
    with pytest.raises(UserError, match=r"does not say which .* the teacher's\. It has one network"):
        read_backbone_state(tmp_path / "weights.pth", "teacher")


def test_safetensors(tmp_path: Path) -> None:
    save_file(network(1.0), tmp_path / "weights.safetensors")
    assert_weights(read_backbone_state(tmp_path / "weights.safetensors").state, 1.0)
    (tmp_path / "weights.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:-8])
    with pytest.raises(UserError, match=r"weights\.safetensors: is truncated, or no checkpoint"):
        read_backbone_state(tmp_path / "weights.safetensors")


def test_a_run_folder_means_its_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no last\.pt"):
        read_backbone_state(tmp_path)
    assert read_backbone_state(hvp_file(tmp_path / "last.pt").parent).meta.path == tmp_path / "last.pt"


def test_a_method_with_one_network(tmp_path: Path) -> None:
    """SimSiam has the projector in place of the encoder's classifier, and the predictor beside the encoder."""
    head = {"encoder.fc.0.weight": torch.ones(2, 4), "predictor.3.bias": torch.ones(2)}
    weights = {f"encoder.{key}": value for key, value in WEIGHT.items()} | head
    save_checkpoint(tmp_path / "last.pt", {"method": "simsiam", "config": {}, "epoch": 3, "step": 40, "model": weights})
    for which in (None, "model"):
        read = read_backbone_state(tmp_path / "last.pt", which)
        assert_weights(read.state, 1.0)
        assert (read.meta.which, read.meta.method, read.meta.dropped) == ("model", "simsiam", tuple(head))
    with pytest.raises(UserError, match=r"has no teacher\. It has: model"):
        read_backbone_state(tmp_path / "last.pt", "teacher")


def test_a_projector_in_place_of_the_backbones_classifier(tmp_path: Path) -> None:
    """The trainer of sthalles/SimCLR saves such files."""
    head = {"backbone.fc.0.weight": torch.ones(2, 4), "backbone.fc.2.bias": torch.ones(2)}
    weights = {f"backbone.{key}": value for key, value in WEIGHT.items()} | head
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": weights}, tmp_path / "checkpoint_0200.pth.tar")
    read = read_backbone_state(tmp_path / "checkpoint_0200.pth.tar")
    assert_weights(read.state, 1.0)
    assert read.meta.dropped == tuple(head)


def two_encoders(prefix: str = "") -> dict[str, Tensor]:
    """MoCo v3's state dict: two encoders, each with its projector, and a predictor."""
    weights = {f"{prefix}predictor.0.weight": torch.ones(2, 2)}
    for name, scale in (("base_encoder", 1.0), ("momentum_encoder", 2.0)):
        for key, value in (WEIGHT | {"head.0.weight": torch.ones(2, 4), "fc.0.weight": torch.ones(2, 4)}).items():
            weights[f"{prefix}{name}.{key}"] = value * scale
    return weights


@pytest.mark.parametrize(("which", "scale"), [(None, 1.0), ("base_encoder", 1.0), ("momentum_encoder", 2.0)])
@pytest.mark.parametrize("form", ["hvp", "upstream", "safetensors"])
def test_two_encoders_in_one_state_dict(form: str, which: Any, scale: float, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{form}"
    if form == "hvp":
        content = {"method": "mocov3", "config": {}, "epoch": 3, "step": 40, "model": two_encoders()}
        save_checkpoint(path, content)
    elif form == "upstream":
        torch.save({"state_dict": two_encoders("module."), "arch": "vit_small", "epoch": 7}, path)
    else:
        save_file(two_encoders(), path)
    read = read_backbone_state(path, which)
    assert_weights(read.state, scale)
    name = which or "base_encoder"
    assert (read.meta.which, read.meta.format) == (name, "hvp" if form == "hvp" else "upstream")
    assert set(read.meta.dropped) == {"predictor.0.weight", f"{name}.head.0.weight", f"{name}.fc.0.weight"}
    with pytest.raises(UserError, match=r"has no teacher\. It has: base_encoder, momentum_encoder"):
        read_backbone_state(path, "teacher")


def test_a_file_with_only_the_momentum_encoder(tmp_path: Path) -> None:
    save_file({f"momentum_encoder.{key}": value for key, value in WEIGHT.items()}, tmp_path / "weights.safetensors")
    read = read_backbone_state(tmp_path / "weights.safetensors")
    assert_weights(read.state, 1.0)
    assert read.meta.which == "momentum_encoder"


@pytest.mark.parametrize("arch", CONVNETS)
@pytest.mark.parametrize("prefix", ["backbone.", "encoder."])
def test_convnets_are_loaded_and_probed(arch: str, prefix: str, tmp_path: Path) -> None:
    network = CONVNETS[arch]().eval()
    weights = {prefix + key: value for key, value in network.state_dict().items()}
    save_checkpoint(tmp_path / "last.pt", {"method": "simclr", "config": {}, "epoch": 1, "step": 1, "model": weights})
    encoder, _ = load_encoder(tmp_path / "last.pt")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
        assert expected.shape == (2, network.embed_dim)
        assert torch.equal(encoder(images), expected)
        assert torch.equal(encoder.probe_features(images, *probe_defaults(encoder)), expected)


def test_the_teacher_is_the_default_if_there_is_one(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], float]] = [
        ({}, 2.0),
        ({"teacher": None}, 1.0),
        ({"student": None, "teacher": None, "model": network(3.0)}, 3.0),
    ]
    for number, (networks, scale) in enumerate(cases):
        assert_weights(read_backbone_state(hvp_file(tmp_path / f"{number}.pt", **networks)).state, scale)


def test_a_missing_network_is_refused(tmp_path: Path) -> None:
    torch.save({"student": network(1.0), "epoch": 1}, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"has no teacher\. It has: student"):
        read_backbone_state(tmp_path / "half.pth", "teacher")
    assert read_backbone_state(tmp_path / "half.pth", "student").meta.which == "student"
    nothing = hvp_file(tmp_path / "a.pt", student=None, teacher=None)
    with pytest.raises(UserError, match=r"has no student\. It has: no network"):
        read_backbone_state(nothing, "student")
    with pytest.raises(UserError, match=r"has no model\. It has: no network"):
        read_backbone_state(nothing)


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has format version 99, but this hvp reads version"):
        read_backbone_state(hvp_file(tmp_path / "last.pt", version=99))


class Foreign:
    """Type that would run code when unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.ran),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"student": network(1.0), "args": Foreign(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: holds Python objects besides weights \(os\.makedirs\)"):
        read_backbone_state(tmp_path / "evil.pth", "student")
    assert not (tmp_path / "ran").exists()


def damaged_files() -> dict[str, Any]:
    return {
        "text": b"epoch: 3\n",
        "empty": b"",
        "pickle": pickle.dumps({"weights": [1, 2]}, protocol=2),
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(64),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_files_that_are_not_checkpoints(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(damaged_files()[name])
    with pytest.raises(UserError, match=f"{name}: is (truncated, or|empty,) not a checkpoint"):
        read_backbone_state(tmp_path / name)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(part: float, tmp_path: Path) -> None:
    whole = hvp_file(tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UserError, match=r"last\.pt: is truncated, or not a checkpoint"):
        read_backbone_state(tmp_path / "last.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, no weights"),
        ({"epoch": 3, "lr": 0.1}, r"holds a dict \(epoch, lr\), no weights"),
        ({}, r"holds a dict \(none\), no weights"),
        ({"student": 3}, "holds a int, no weights"),
        (HEAD, "there is no backbone in this file, only a head: head.mlp.0.weight"),
        ({"backbone.a": torch.ones(1), "reducer.b": torch.ones(1)}, "1 tensors belong neither .*: reducer.b"),
        ({"backbone.a": torch.ones(1), "encoder.b": torch.ones(1)}, "1 tensors belong neither .*: encoder.b"),
    ],
)
def test_files_without_a_backbone(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        read_backbone_state(tmp_path / "x.pth")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth: there is no such file"):
        read_backbone_state(tmp_path / "nowhere.pth")


def test_load_complete_loads_weights_that_fit() -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_complete(target, {key: value.half() for key, value in source.state_dict().items()}, "x.pth")
    torch.testing.assert_close(target.weight, source.weight, rtol=0, atol=1e-3)
    assert target.weight.dtype == torch.float32


def test_load_complete_lists_every_misfit() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = {"0.weight": torch.zeros(2, 4), "0.bias": torch.zeros(2)} | {f"fc.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(UserError) as caught:
        load_complete(module, state, "x.pth")
    message = str(caught.value)
    assert message.startswith("x.pth: ")
    assert "missing (2): 1.weight, 1.bias\n" in message
    assert "left over (9): fc.0, fc.1, fc.2, fc.3, fc.4, fc.5, fc.6, fc.7, ...\n" in message
    assert "other shapes (1): 0.weight [2, 4] instead of [2, 3]\n" in message
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key])
