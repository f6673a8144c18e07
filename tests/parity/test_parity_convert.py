"""Checkpoints in the upstream's layout have the keys, shapes, order and parameter groups of its trainers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, get_args

import pytest

from hvp.common.config.resolving import read_yaml, resolve
from hvp.common.convert.layouts import Layout
from hvp.common.convert.training_checkpoints import to_upstream
from hvp.methods import get_method, get_preset
from tests.parity.fixtures import checkpoint_models, load_checkpoint_keys
from tests.parity.reference_models import Shapes, arch_of, head_sizes, linear_layers, shapes_of, vit_of


@dataclass(frozen=True)
class Family:
    """Reference models that belong to one method."""

    prefix: str
    """Prefix of the models' names."""
    method: str
    backbone: str
    """Prefix of the backbone within the first entry of a checkpoint."""
    vit: str = ""
    """Preset for Vision Transformers."""
    resnet: str = ""
    """Preset for ResNets."""

    def describes(self, facts: dict[str, Any]) -> bool:
        """Whether a model is a training checkpoint of a network that the method can be configured for."""
        arch = get_method(self.method).config.model_fields["model"].annotation.model_fields["arch"].annotation
        return "(file)" not in facts["entries"] and arch_of(self.backbone_shapes(facts)) in get_args(arch)

    def backbone_shapes(self, facts: dict[str, Any]) -> Shapes:
        return shapes_of(first_entry(facts), self.backbone)

    def layout(self, facts: dict[str, Any]) -> Layout:
        """Upstream's layout for a configuration with the reference model's networks."""
        shapes = self.backbone_shapes(facts)
        vit = vit_of(shapes)
        preset = get_preset(self.method, self.resnet if vit is None else self.vit)
        changes = {"model.arch": arch_of(shapes), **HEADS[self.method](facts)}
        if vit is not None:
            changes[CROPS[self.method]] = vit.img_size
        if vit is not None and self.method != "mocov3":  # its networks have a fixed patch size
            changes["model.patch_size"] = vit.patch_size
        method = get_method(self.method)
        return method.upstream_layout(resolve(method.config, [("preset", read_yaml(preset)), ("test", changes)]).config)


FAMILIES = [
    Family("dino_", "dino", "backbone", vit="vits16-100ep", resnet="rn50-100ep"),
    Family("ibot_", "ibot", "backbone", vit="vits16-100ep"),
    Family("simsiam_", "simsiam", "encoder", resnet="rn50-100ep"),
    Family("hvp_simclr_", "simclr", "backbone", resnet="rn50-100ep"),
    Family("mocov3_", "mocov3", "base_encoder", vit="vits16-300ep", resnet="rn50-800ep"),
    Family("dinov2_train_", "dinov2", "student.backbone", vit="vitl16-100ep"),
]

CROPS = {"mocov3": "views.crop_size", **dict.fromkeys(("dino", "ibot", "dinov2"), "views.global_crops_size")}


def dino_head(facts: dict[str, Any]) -> dict[str, Any]:
    sizes = head_sizes(shapes_of(first_entry(facts), "head"))
    return {"model.out_dim": sizes["out_dim"], "model.norm_last_layer": facts["norm_last_layer"]}


def ibot_head(facts: dict[str, Any]) -> dict[str, Any]:
    shapes = shapes_of(first_entry(facts), "head")
    trained = [name for group in facts["optimizer_groups"] for name in group["names"]]
    return {
        "model.out_dim": shapes["last_layer.weight_v"][0],
        "model.patch_out_dim": shapes["last_layer2.weight_v"][0],
        "model.shared_head": "module.head.last_layer2.weight_v" not in trained,
    }


def simsiam_head(facts: dict[str, Any]) -> dict[str, Any]:
    shapes = shapes_of(first_entry(facts))
    pred_dim, dim = linear_layers(shapes, "predictor")[0]
    layers = len(linear_layers(shapes, "encoder.fc"))
    sizes = {"model.dim": dim, "model.pred_dim": pred_dim, "model.projector_layers": layers}
    return {**sizes, "optim.fix_pred_lr": False}


def simclr_head(facts: dict[str, Any]) -> dict[str, Any]:
    layers = linear_layers(shapes_of(first_entry(facts)), "projector")
    sizes = {"model.proj_hidden_dim": layers[0][0], "model.out_dim": layers[-1][0]}
    return {**sizes, "model.num_proj_layers": len(layers)}


def moco_head(facts: dict[str, Any]) -> dict[str, Any]:
    mlp_dim, dim = linear_layers(shapes_of(first_entry(facts)), "predictor")[0]
    return {"model.dim": dim, "model.mlp_dim": mlp_dim}


def dinov2_heads(facts: dict[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name in ("dino", "ibot"):
        shapes = shapes_of(first_entry(facts), f"student.{name}_head")
        if not shapes:
            continue
        for key, size in head_sizes(shapes).items():
            if key in ("nlayers", "hidden_dim", "bottleneck_dim"):
                changes[f"{name}.head_{key}"] = size
        changes[f"{name}.head_n_prototypes"] = shapes["last_layer.weight_v"][0]
        changes["ibot.separate_head"] = name == "ibot"
    return changes


HEADS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "dino": dino_head,
    "ibot": ibot_head,
    "simsiam": simsiam_head,
    "simclr": simclr_head,
    "mocov3": moco_head,
    "dinov2": dinov2_heads,
}
"""Configuration values for heads with the sizes in a checkpoint, by method."""


def first_entry(facts: dict[str, Any]) -> list[list[Any]]:
    """Return the first state dict in a checkpoint."""
    entries: list[list[Any]] = next(iter(facts["entries"].values()))
    return entries


MODELS = [(model, family) for family in FAMILIES for model in checkpoint_models(family.prefix, suits=family.describes)]


def converted(layout: Layout) -> dict[str, Any]:
    """Convert a checkpoint of real size whose tensors have no memory."""
    sizes = [len(group["params"]) for group in layout.optimizer.ours] if layout.optimizer else []
    groups = [{"params": [0] * size, "lr": 0.1, "weight_decay": 0.0} for size in sizes]
    optimizer = {"state": {number: {} for number in range(sum(sizes))}, "param_groups": groups}
    checkpoint = {part.ours: part.module.state_dict() for part in layout.parts}
    about = {"method": "", "config": {}, "step": 4, "epoch": 1, "steps_per_epoch": 4, "processes": []}
    precision = {"scaler": {}, "skipped_steps": 0}
    return to_upstream({**about, **checkpoint, "precision": precision, "optimizer": optimizer}, layout, "").content


@pytest.mark.parametrize(("model", "family"), MODELS, ids=[model for model, _ in MODELS])
def test_keys_shapes_and_their_order(model: str, family: Family) -> None:
    facts = load_checkpoint_keys(model)
    layout = family.layout(facts)
    content = converted(layout)
    for entry, expected in facts["entries"].items():
        state = content[entry].items()
        assert [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state] == expected
    known = {name.partition(" ")[0] for name in facts["top_level_keys"]}
    assert set(content) - known <= {"teacher"}  # DINOv2's, which its evaluations read
    left_out = {"args", "fp16_scaler", "scaler", "total_time"} if layout.optimizer else {"optimizer"}
    assert known - set(content) <= left_out


NUMBERED = [case for case in MODELS if case[1].method != "dinov2"]


@pytest.mark.parametrize(("model", "family"), NUMBERED, ids=[model for model, _ in NUMBERED])
def test_parameters_are_numbered_like_upstream(model: str, family: Family) -> None:
    facts = load_checkpoint_keys(model)
    layout = family.layout(facts)
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
