"""Exported backbones load strictly into timm's and torchvision's networks, and compute the same features there."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from hvp.common.convert.backbone import export_backbone
from hvp.common.convert.report import Converted, saver, write
from hvp.common.errors import UserError
from hvp.common.evaluation.checkpoints import evaluation_size, load_encoder
from hvp.common.evaluation.linear import probe_defaults
from hvp.common.networks import Encoder
from hvp.common.networks.register_vision_transformer import build_register_vit
from hvp.common.networks.resnet import CONVNETS
from hvp.common.networks.vision_transformer import VisionTransformer, build_vit, sincos_positions
from hvp.common.training.checkpoint import save_checkpoint

HEAD = {"head.mlp.0.weight": torch.ones(2, 4)}


def randomised(encoder: Encoder) -> Encoder:
    """Randomise all weights, including norms and their statistics, so that no two layers are equal."""
    torch.manual_seed(0)
    with torch.no_grad():
        for key, value in encoder.state_dict().items():
            if value.is_floating_point() and not (key == "pos_embed" and not encoder.pos_embed.requires_grad):
                value.uniform_(0.5, 1.5) if value.ndim == 1 else value.normal_(std=0.05)
    return encoder.eval()


def with_fixed_positions() -> Encoder:
    """ViT-S with fixed positions and 12 heads, as in MoCo v3."""
    encoder = VisionTransformer(img_size=32, embed_dim=384, depth=12, num_heads=12)
    encoder.pos_embed = nn.Parameter(sincos_positions(2, 384), requires_grad=False)
    return encoder


ENCODERS: dict[str, Callable[[], Encoder]] = {
    "tiny": lambda: build_vit("vit_tiny", patch_size=16, img_size=64),
    "patches of 8": lambda: build_vit("vit_tiny", patch_size=8, img_size=32),
    "small with fixed positions, twelve heads": with_fixed_positions,
    "LayerScale, registers": lambda: build_register_vit("vit_small", patch_size=14, img_size=42, num_registers=4),
    "LayerScale": lambda: build_register_vit("vit_small", patch_size=14, img_size=42),
    "registers": lambda: build_register_vit("vit_small", patch_size=16, img_size=32, num_registers=2, init_values=0.0),
    "resnet50": CONVNETS["resnet50"],
    "resnet18": CONVNETS["resnet18"],
}


def run_of(encoder: nn.Module, tmp_path: Path) -> Path:
    """Write a run's checkpoint with the encoder as the teacher's backbone."""
    weights = {f"backbone.{key}": value for key, value in encoder.state_dict().items()} | HEAD
    student = {key: torch.zeros(()).expand(value.shape) for key, value in weights.items()}  # one number on disk
    config = {"views": {"global_crops_size": 96}}
    content = {"method": "dino", "config": config, "epoch": 3, "step": 40, "student": student, "teacher": weights}
    save_checkpoint(tmp_path / "last.pt", {**content, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}})
    return tmp_path / "last.pt"


def written(converted: Converted, source: Path, out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Write a conversion and read back the weights and the description."""
    write(converted, source, out, saver(out, state_dict=True))
    state = load_file(out) if out.suffix == ".safetensors" else torch.load(out, weights_only=True)
    return state, json.loads(out.with_name(f"{out.name}.meta.json").read_text())


def assert_equal_features(ours: Encoder, theirs: nn.Module, size: int) -> None:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = ours(images)
        assert expected.std() > 1e-2
        torch.testing.assert_close(theirs.eval()(images), expected, rtol=1e-4, atol=1e-4)


def assert_read_back(source: Path, out: Path, resolution: int) -> None:
    """Check that an evaluation uses the same network and image size before and after the conversion."""
    (before, was), (after, meta) = load_encoder(source), load_encoder(out)
    assert evaluation_size(before, was) == evaluation_size(after, meta)
    assert evaluation_size(after, meta)[0] == resolution
    assert (meta.method, meta.which, meta.epoch, meta.step) == (was.method, was.which, was.epoch, was.step)
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        options = probe_defaults(before)
        assert options == probe_defaults(after)
        assert torch.equal(before.probe_features(images, *options), after.probe_features(images, *options))


@pytest.mark.parametrize(("name", "suffix"), [*((name, ".pth") for name in ENCODERS), ("tiny", ".safetensors")])
def test_timm(name: str, suffix: str, tmp_path: Path) -> None:
    encoder = randomised(ENCODERS[name]())
    source = run_of(encoder, tmp_path)
    state, about = written(export_backbone(source, "timm"), source, tmp_path / f"backbone{suffix}")
    network = eval(about["backbone"]["load"]["call"], {"timm": timm})  # the instruction for the user
    network.load_state_dict(state, strict=True)
    assert network.num_features == about["backbone"]["feature_width"] == encoder.embed_dim
    assert_equal_features(encoder, network, about["backbone"]["img_size"])
    assert_read_back(source, tmp_path / f"backbone{suffix}", 96)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(CONVNETS["resnet50"], id="resnet50"),
        pytest.param(CONVNETS["resnet18"], id="resnet18"),
        # torchvision's only ViT that we have too; it is large
        pytest.param(lambda: build_vit("vit_base", patch_size=16, img_size=32), id="vit", marks=pytest.mark.slow),
    ],
)
def test_torchvision(build: Callable[[], Encoder], tmp_path: Path) -> None:
    with torch.device("meta"):
        encoder = build()
    encoder = randomised(encoder.to_empty(device="cpu"))
    source = tmp_path / "weights.pth"
    torch.save(encoder.state_dict(), source)
    state, about = written(export_backbone(source, "torchvision"), source, tmp_path / "backbone.pth")
    scope: dict[str, Any] = {"torch": torch, "torchvision": torchvision}
    exec(about["backbone"]["load"]["call"], scope)  # the instruction for the user
    scope["model"].load_state_dict(state, strict=True)
    assert_read_back(source, tmp_path / "backbone.pth", about["backbone"]["img_size"] or 224)
    assert_equal_features(encoder, scope["model"], about["backbone"]["img_size"] or 64)


def test_bare_weights_are_evaluated_alike_after_conversion(tmp_path: Path) -> None:
    source, out = tmp_path / "weights.pth", tmp_path / "backbone.pth"
    torch.save(randomised(ENCODERS["tiny"]()).state_dict(), source)
    written(export_backbone(source, "timm"), source, out)
    assert_read_back(source, out, 64)


def test_converting_twice_keeps_the_first_description(tmp_path: Path) -> None:
    source = run_of(randomised(ENCODERS["registers"]()), tmp_path)
    written(export_backbone(source, "timm"), source, tmp_path / "a.pth")
    again = export_backbone(tmp_path / "a.pth", "safetensors")
    assert [(fate.became, fate.why) for fate in again.fates if fate.became != "renamed"] == [
        ("changed", "a zero position for [CLS] was added")
    ]
    assert again.about["method"] == "dino"
    written(again, tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert_read_back(source, tmp_path / "b.safetensors", 96)


def test_a_description_of_another_file_is_not_used(tmp_path: Path) -> None:
    source = run_of(randomised(ENCODERS["tiny"]()), tmp_path)
    out = tmp_path / "a.safetensors"
    written(export_backbone(source, "timm"), source, out)
    encoder, meta = load_encoder(out)
    assert (evaluation_size(encoder, meta), meta.note) == ((96, "as pretrained"), "")
    assert meta.origin == (f"{out}: the teacher of dino, epoch 3, step 40, described in a.safetensors.meta.json")
    described = out.with_name("a.safetensors.meta.json")
    for content, reason in [
        (described.read_text().replace('"sha256": "', '"sha256": "0'), "it describes another file of this name"),
        ("{}", "not a description written by hvp convert"),
        ("[" * 10**5, "not a description written by hvp convert"),
        (described.read_text()[:100], "not a description written by hvp convert"),
    ]:
        described.write_text(content)
        encoder, meta = load_encoder(out)
        assert meta.note == f"a.safetensors.meta.json is not used: {reason}"
        assert (meta.which, meta.method, meta.described) == ("bare", None, None)
        assert evaluation_size(encoder, meta) == (64, "from the position embedding")
    described.unlink()
    assert load_encoder(out)[1].note == ""


def test_a_position_embedding_for_dense_tasks_does_not_set_the_evaluation_size(tmp_path: Path) -> None:
    """DINOv2's released networks have one for 518 pixels, but are evaluated at 224."""
    torch.save(build_vit("vit_tiny", patch_size=16, img_size=512).state_dict(), tmp_path / "a.pth")
    assert evaluation_size(*load_encoder(tmp_path / "a.pth"))[0] == 224


@pytest.mark.parametrize("name", ["tiny", "resnet50"])
def test_safetensors(name: str, tmp_path: Path) -> None:
    encoder = randomised(ENCODERS[name]())
    source = run_of(encoder, tmp_path)
    state, about = written(export_backbone(source, "safetensors"), source, tmp_path / "backbone.safetensors")
    assert sorted(state) == sorted(encoder.state_dict())
    loaded, meta = load_encoder(tmp_path / "backbone.safetensors")
    assert meta.dropped == ()
    assert "load_encoder" in about["backbone"]["load"]["call"]
    for key, value in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize(
    ("library", "encoder"),
    [
        ("timm", lambda: build_vit("vit_micro", patch_size=8, img_size=32)),
        ("timm", CONVNETS["convnet_micro"]),
        ("timm", CONVNETS["resnet18_cifar"]),
        ("torchvision", lambda: build_vit("vit_micro", patch_size=8, img_size=32)),
        ("timm", lambda: build_register_vit("vit_small", patch_size=16, img_size=32, swiglu=True)),
        ("torchvision", CONVNETS["resnet18_cifar"]),
        ("torchvision", lambda: build_register_vit("vit_small", patch_size=16, img_size=32)),
        ("torchvision", lambda: build_vit("vit_small", patch_size=16, img_size=32)),
    ],
)
def test_networks_missing_from_the_library_are_refused(
    library: Any, encoder: Callable[[], Encoder], tmp_path: Path
) -> None:
    source = run_of(encoder(), tmp_path)
    with pytest.raises(UserError, match=rf"(?s){library} has no network like this one .* Use --to safetensors"):
        export_backbone(source, library)
    assert export_backbone(source, "safetensors").content


def test_tensors_that_timm_lacks_are_reported(tmp_path: Path) -> None:
    encoder = build_register_vit("vit_small", patch_size=14, img_size=28, num_registers=4)
    torch.save(encoder.state_dict(), tmp_path / "weights.pth")
    fates = export_backbone(tmp_path / "weights.pth", "timm").fates
    assert {fate.why: (fate.became, fate.tensors) for fate in fates} == {
        "the position of [CLS] is added to it, as in timm": ("changed", 1),
        "the position of [CLS] is part of cls_token, as in timm": ("changed", 1),
        "replaces masked patches in pretraining; no feature depends on it": ("left out", 1),
        "": ("renamed", len(encoder.state_dict()) - 3),
    }


def test_the_description_covers_every_tensor_and_the_source(tmp_path: Path) -> None:
    encoder = build_vit("vit_tiny", patch_size=16, img_size=32)
    source = run_of(encoder, tmp_path)
    _, about = written(export_backbone(source, "timm"), source, tmp_path / "a.pth")
    assert about["file"] == {"name": "a.pth", "sha256": hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()}
    assert about["source"] == {"path": str(source), "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    assert {key: about[key] for key in ("method", "which", "epoch", "step", "layout")} == {
        "method": "dino",
        "which": "teacher",
        "epoch": 3,
        "step": 40,
        "layout": "timm",
    }
    assert about["config"] == {"views": {"global_crops_size": 96}}
    assert about["versions"]["timm"] == timm.__version__
    assert {key: value for key, value in about["backbone"].items() if key != "load"} == {
        "feature_width": 192,
        "feature": "[CLS] token after the last norm",
        "img_size": 32,
        "patch_size": 16,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    count = len(encoder.state_dict())
    assert {fate["group"]: (fate["became"], fate["tensors"]) for fate in about["tensors"]} == {
        "teacher.backbone": ("renamed", count),
        "teacher.head": ("left out", 1),
        "student.backbone": ("left out", count),
        "student.head": ("left out", 1),
        "optimizer": ("left out", 1),
    }


def test_a_bare_backbone_keeps_its_names(tmp_path: Path) -> None:
    encoder = randomised(CONVNETS["resnet50"]())
    torch.save(encoder.state_dict(), tmp_path / "weights.pth")
    fates = export_backbone(tmp_path / "weights.pth", "torchvision").fates
    assert [(fate.group, fate.became, fate.tensors) for fate in fates] == [
        ("weights", "kept", len(encoder.state_dict()))
    ]


def test_the_requested_network_is_exported(tmp_path: Path) -> None:
    source = run_of(randomised(CONVNETS["convnet_micro"]()), tmp_path)
    student = export_backbone(source, "safetensors", "student").content
    assert not any(value.any() for value in student.values())
    with pytest.raises(UserError, match="has no model"):
        export_backbone(source, "safetensors", "model")


def test_one_of_two_encoders_in_a_state_dict_is_exported(tmp_path: Path) -> None:
    """MoCo v3 saves both encoders in one state dict."""
    encoder = randomised(CONVNETS["resnet50"]())
    own, other = (f"module.{name}_encoder." for name in ("momentum", "base"))
    weights = {f"{own}{key}": value for key, value in encoder.state_dict().items()}
    weights |= {f"{other}{key}": value + 1 for key, value in encoder.state_dict().items()}
    weights |= {f"{own}fc.0.weight": torch.ones(2, 2), "module.predictor.0.weight": torch.ones(2, 2)}
    torch.save({"epoch": 3, "arch": "resnet50", "state_dict": weights}, tmp_path / "up.pth")
    converted = export_backbone(tmp_path / "up.pth", "torchvision", "momentum_encoder")
    for key, value in encoder.state_dict().items():
        assert torch.equal(converted.content[key], value)
    count = len(encoder.state_dict())
    assert [(fate.group, fate.became, fate.tensors) for fate in converted.fates] == [
        ("state_dict.momentum_encoder", "renamed", count),
        ("state_dict.base_encoder", "left out", count),
        ("state_dict.momentum_encoder", "left out", 1),
        ("state_dict.predictor", "left out", 1),
    ]


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    state = CONVNETS["resnet50"]().state_dict()
    del state["layer1.0.conv1.weight"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"missing \(1\): layer1\.0\.conv1\.weight"):
        export_backbone(tmp_path / "weights.pth", "timm")
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="is no ViT or ResNet"):
        export_backbone(tmp_path / "weights.pth", "timm")


def test_a_changed_library_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = run_of(CONVNETS["resnet50"](), tmp_path)
    monkeypatch.setattr(timm, "create_model", lambda name, **_: nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"does not fit timm's network in the installed version\.\n +missing \(2\)"):
        export_backbone(source, "timm")
