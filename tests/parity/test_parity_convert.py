"""Checkpoints in the upstream's layout have the keys, shapes, order and parameter groups that its trainers make."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from fixtures import load_checkpoint_keys

from hvp.common.config import read_yaml, resolve
from hvp.common.convert.upstream import Layout, to_upstream
from hvp.methods import get_method, get_preset

MODELS = [
    ("dino_vit_small", "dino", "vits16-100ep", {"model.norm_last_layer": False}),
    ("dino_resnet50", "dino", "rn50-100ep", {}),
    ("ibot_vit_small_shared_head", "ibot", "vits16-100ep", {"model.shared_head": True}),
    ("ibot_vit_small_separate_head", "ibot", "vits16-100ep", {"model.shared_head": False}),
    ("simsiam_resnet50", "simsiam", "rn50-100ep", {"optim.fix_pred_lr": False}),
    ("hvp_simclr_resnet50", "simclr", "rn50-100ep", {}),
    ("mocov3_resnet50", "mocov3", "rn50-800ep", {}),
    ("mocov3_vit_small", "mocov3", "vits16-300ep", {}),
    ("dinov2_train_vitl16_short", "dinov2", "vitl16-100ep", {}),
]


def layout_of(method: str, preset: str, changes: dict[str, Any]) -> Layout:
    layers = [("preset", read_yaml(get_preset(method, preset))), ("test", changes)]
    return get_method(method).upstream_layout(resolve(get_method(method).config, layers).config)


def converted(layout: Layout) -> dict[str, Any]:
    """A checkpoint at its real size, whose tensors have no memory."""
    sizes = [len(group["params"]) for group in layout.optimizer.ours] if layout.optimizer else []
    groups = [{"params": [0] * size, "lr": 0.1, "weight_decay": 0.0} for size in sizes]
    optimizer = {"state": {number: {} for number in range(sum(sizes))}, "param_groups": groups}
    checkpoint = {part.ours: part.module.state_dict() for part in layout.parts}
    about = {"method": "", "config": {}, "step": 4, "epoch": 1, "steps_per_epoch": 4, "processes": []}
    precision = {"scaler": {}, "skipped_steps": 0}
    return to_upstream({**about, **checkpoint, "precision": precision, "optimizer": optimizer}, layout, "").content


@pytest.mark.parametrize(("model", "method", "preset", "changes"), MODELS)
def test_keys_shapes_and_their_order(model: str, method: str, preset: str, changes: dict[str, Any]) -> None:
    facts = load_checkpoint_keys(model)
    layout = layout_of(method, preset, changes)
    content = converted(layout)
    for entry, expected in facts["entries"].items():
        state = content[entry].items()
        assert [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state] == expected
    known = {name.partition(" ")[0] for name in facts["top_level_keys"]}
    assert set(content) - known <= {"teacher"}  # DINOv2's, which its evaluations read
    left_out = {"args", "fp16_scaler", "scaler", "total_time"} if layout.optimizer else {"optimizer"}
    assert known - set(content) <= left_out


@pytest.mark.parametrize(("model", "method", "preset", "changes"), [case for case in MODELS if case[1] != "dinov2"])
def test_parameters_are_numbered_as_upstream_does(
    model: str, method: str, preset: str, changes: dict[str, Any]
) -> None:
    facts = load_checkpoint_keys(model)
    layout = layout_of(method, preset, changes)
    assert layout.optimizer is not None
    trained = layout.parts[0]
    names = {id(parameter): f"module.{name}" for name, parameter in trained.module.named_parameters()}
    found = [[names[id(parameter)] for parameter in group["params"]] for group in layout.optimizer.theirs]
    if "optimizer_groups" in facts:
        expected = [group["names"] for group in facts["optimizer_groups"]]
    else:
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        expected = [[name for name, _, _ in facts["entries"][trained.theirs] if not name.endswith(buffers)]]
    assert found == expected
    numbers = [group["params"] for group in converted(layout)["optimizer"]["param_groups"]]
    assert list(chain(*numbers)) == list(range(len(list(chain(*expected)))))
