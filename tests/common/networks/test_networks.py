"""Properties of backbones, head, multi-crop wrapper and loss that the parity fixtures, small and few, do not cover."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hvp.common.errors import UserError
from hvp.common.networks import Encoder, encoder_from_state
from hvp.common.networks.heads import DINOHead, WeightNormLinear
from hvp.common.networks.resnet import CONVNETS
from hvp.common.networks.vision_transformer import VisionTransformer, sincos_positions
from hvp.common.training.distributed import World
from hvp.methods.dino.dino_loss import DINOLoss
from hvp.methods.dino.multi_crop import MultiCropWrapper, build_backbone
from tests.processes import in_two_processes


@pytest.fixture
def micro() -> VisionTransformer:
    torch.manual_seed(0)
    backbone = build_backbone("vit_micro", patch_size=8, img_size=32)
    assert isinstance(backbone, VisionTransformer)
    return backbone.eval()


def images(batch: int, side: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def num_heads(vit: VisionTransformer) -> Any:
    return vit.get_submodule("blocks.0.attn").num_heads


@pytest.mark.parametrize(
    ("arch", "embed_dim", "num_blocks", "millions"),
    [
        ("vit_micro", 96, 3, 0.4),
        ("vit_tiny", 192, 12, 5.5),
        ("vit_small", 384, 12, 21.7),
        ("vit_base", 768, 12, 85.8),
        ("resnet50", 2048, 0, 23.5),
        ("resnet18", 512, 0, 11.2),
    ],
)
def test_sizes(arch: str, embed_dim: int, num_blocks: int, millions: float) -> None:
    with torch.device("meta"):
        backbone: Encoder
        if arch == "resnet18":
            backbone = CONVNETS[arch]()
        else:
            backbone = build_backbone(arch, patch_size=8 if arch == "vit_micro" else 16)
        assert (backbone.embed_dim, backbone.num_blocks) == (embed_dim, num_blocks)
        assert backbone(torch.empty(2, 3, 96, 96)).shape == (2, embed_dim)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("arch", ["vit_micro", "vit_tiny"])
def test_initialisation(arch: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(arch, drop_path_rate=0.3)
    assert isinstance(backbone, VisionTransformer)
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
    assert backbone.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert backbone.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.3, backbone.num_blocks))


def test_position_embedding_at_its_own_size_is_untouched(micro: VisionTransformer) -> None:
    assert micro.interpolate_pos_encoding(32, 32) is micro.pos_embed
    # The same number of patches in another shape is another size.
    assert not torch.equal(micro.interpolate_pos_encoding(16, 64), micro.pos_embed)


@settings(max_examples=30)
@given(height=st.integers(8, 200), width=st.integers(8, 200))
def test_images_of_any_size(height: int, width: int) -> None:
    backbone = VisionTransformer(img_size=56, patch_size=8, embed_dim=6, depth=1, num_heads=1)
    tokens = backbone.prepare_tokens(torch.zeros(1, 3, height, width))
    assert tokens.shape == (1, 1 + (height // 8) * (width // 8), 6)


def test_a_feature_does_not_depend_on_the_batch(micro: VisionTransformer) -> None:
    """Reusing a teacher's outputs relies on this; the teacher is in train mode."""
    x = images(4, 32)
    micro.train()
    torch.testing.assert_close(micro(x)[1:2], micro(x[1:2]), rtol=1e-5, atol=1e-6)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in micro.modules())


def test_probe_features(micro: VisionTransformer) -> None:
    x = images(2, 32)
    layers = micro.get_intermediate_layers(x, 3)
    torch.testing.assert_close(micro.probe_features(x, 1, avgpool=False), micro(x))
    cls = torch.cat([layer[:, 0] for layer in layers], dim=1)
    assert torch.equal(micro.probe_features(x, 3, avgpool=False), cls)
    features = micro.probe_features(x, 1, avgpool=True)
    assert torch.equal(features[:, 0::2], layers[-1][:, 0])
    assert torch.equal(features[:, 1::2], layers[-1][:, 1:].mean(dim=1))


def test_probe_features_that_a_network_lacks(micro: VisionTransformer) -> None:
    x = images(1, 32)
    with pytest.raises(UserError, match="n_last_blocks = 4, but this network has 3 blocks"):
        micro.probe_features(x, 4, avgpool=False)
    with pytest.raises(UserError, match="n_last_blocks to 1"):
        micro.probe_features(x, 2, avgpool=True)
    with torch.device("meta"):
        resnet = build_backbone("resnet50")
        assert resnet.probe_features(torch.empty(2, 3, 64, 64), 1, avgpool=False).shape == (2, 2048)
        with pytest.raises(UserError, match="one pooled feature"):
            resnet.probe_features(torch.empty(2, 3, 64, 64), 4, avgpool=False)


def test_unknown_arch_and_patch_sizes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="patch_size = 14 does not divide the image size 96"):
        build_backbone("vit_tiny", patch_size=14, img_size=96)
    with pytest.raises(UserError, match="patch_size = 0 does not divide"):
        build_backbone("vit_tiny", patch_size=0)
    with pytest.raises(UserError, match="Set 2, 4, 8, 16 or 32"):
        build_backbone("vit_micro", patch_size=6, img_size=36)


@pytest.mark.parametrize(
    ("arch", "patch_size", "img_size"),
    [("vit_micro", 8, 32), ("vit_micro", 4, 32), ("vit_tiny", 8, 64), ("vit_tiny", 16, 224), ("vit_base", 8, 224)],
)
def test_encoder_is_recognised_by_its_weights(arch: str, patch_size: int, img_size: int) -> None:
    with torch.device("cpu" if arch == "vit_micro" else "meta"):
        backbone = build_backbone(arch, patch_size=patch_size, img_size=img_size)
        encoder = encoder_from_state(backbone.state_dict())
    assert isinstance(encoder, VisionTransformer)
    assert {k: p.shape for k, p in encoder.state_dict().items()} == {
        k: p.shape for k, p in backbone.state_dict().items()
    }
    assert encoder.patch_size == patch_size
    assert isinstance(backbone, VisionTransformer)
    assert num_heads(encoder) == num_heads(backbone)
    if arch == "vit_micro":
        encoder.load_state_dict(backbone.state_dict())
        x = images(2, 24)
        assert torch.equal(encoder(x), backbone(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fixed_positions_determine_the_number_of_heads(dtype: torch.dtype) -> None:
    """Networks of equal shapes have 12 heads with fixed positions and 6 without."""
    learned = VisionTransformer(embed_dim=384, depth=1, num_heads=6, img_size=64)
    for positions, heads in ((learned.pos_embed, 6), (sincos_positions(4, 384), 12)):
        encoder = encoder_from_state(learned.state_dict() | {"pos_embed": positions.to(dtype)})
        assert isinstance(encoder, VisionTransformer)
        assert num_heads(encoder) == heads


def test_fixed_positions_are_sines_and_cosines_of_row_and_column() -> None:
    table = sincos_positions(3, 8)
    assert table.shape == (1, 10, 8)
    assert not table[0, 0].any()
    row, column = 2, 1
    angles = [position * 10000 ** (-d / 2) for position in (row, column) for d in range(2)]
    expected = torch.tensor([f(a) for pair in (angles[:2], angles[2:]) for f in (math.sin, math.cos) for a in pair])
    torch.testing.assert_close(table[0, 1 + 3 * row + column], expected)
    with pytest.raises(ValueError, match="embed_dim is 6"):
        sincos_positions(3, 6)


@pytest.mark.parametrize("arch", CONVNETS)
def test_pooled_features_do_not_pass_through_fc(arch: str) -> None:
    network = CONVNETS[arch]().eval()
    x = images(2, 32)
    with torch.no_grad():
        expected = network(x)
        network.fc = nn.Linear(network.embed_dim, 3)
        assert torch.equal(network.pooled(x), expected)
        assert torch.equal(network(x), network.fc(expected))


def test_foreign_weights_are_not_recognised(micro: VisionTransformer) -> None:
    with torch.device("meta"):
        assert encoder_from_state(build_backbone("resnet50").state_dict()) is not None
        odd = VisionTransformer(embed_dim=24, depth=2, num_heads=2).state_dict()
    not_square = micro.state_dict() | {"pos_embed": torch.zeros(1, 1 + 12, 96)}
    resnet34 = CONVNETS["resnet18"]().state_dict() | {"layer4.2.conv2.weight": torch.empty(0)}
    wide_stem = CONVNETS["resnet18"]().state_dict() | {"conv1.weight": torch.empty(128, 3, 7, 7)}
    resnet101 = {"layer3.6.conv3.weight": torch.empty(0), "layer4.2.conv3.weight": torch.empty(0)}
    no_position = {key: p for key, p in micro.state_dict().items() if key != "pos_embed"}
    for state in ({}, odd, not_square, resnet34, wide_stem, resnet101, no_position, {"fc.weight": torch.zeros(2, 2)}):
        assert encoder_from_state(state) is None


def test_views_of_one_resolution_share_a_forward(micro: VisionTransformer) -> None:
    wrapper = MultiCropWrapper(micro, DINOHead(96, 10, hidden_dim=16, bottleneck_dim=8)).eval()
    batches = []
    micro.register_forward_pre_hook(lambda _, args: batches.append(list(args[0].shape)))
    views = [images(2, 32, 1), images(2, 32, 2), images(2, 16, 3), images(2, 16, 4), images(2, 16, 5)]
    output, _ = wrapper(views)
    assert batches == [[4, 3, 32, 32], [6, 3, 16, 16]]
    one_by_one = torch.cat([wrapper([view])[0] for view in views])
    torch.testing.assert_close(output, one_by_one)
    torch.testing.assert_close(wrapper.head.last_layer(wrapper.embed(views)), output)


def test_head_embeds_on_the_unit_sphere_and_keeps_the_gain() -> None:
    torch.manual_seed(0)
    head = DINOHead(6, 9, hidden_dim=12, bottleneck_dim=5)
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=1.0)
    x = torch.randn(4, 6)
    before = head.last_layer.weight_v.detach().clone()
    head(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, head.last_layer.weight_v)
    torch.testing.assert_close(head.embed(x).norm(dim=1), torch.ones(4))
    rows = head.last_layer(torch.eye(5)).T  # [K, D]: the layer's effective weight
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(9))


def test_frozen_layer_equals_the_layer() -> None:
    layer = WeightNormLinear(5, 9, train_gain=True)
    with torch.no_grad():
        layer.weight_g.uniform_(0.5, 2.0)
        x = torch.randn(3, 5)
        torch.testing.assert_close(layer.frozen()(x), layer(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            coarse = layer.frozen()(x)
        assert coarse.dtype == torch.float32  # the gain is not rounded
        torch.testing.assert_close(coarse, layer(x), rtol=2e-2, atol=2e-2)


@settings(max_examples=40)
@given(batch=st.integers(1, 4), ncrops=st.integers(2, 6), epoch=st.integers(0, 9), seed=st.integers(0, 2**16))
def test_loss_equals_the_sum_over_pairs(batch: int, ncrops: int, epoch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss_fn = DINOLoss(11, ncrops, 0.04, 0.07, 5, 10)
    loss_fn.center.copy_(torch.randn(1, 11, generator=generator))
    student = torch.randn(ncrops * batch, 11, generator=generator, requires_grad=True)
    teacher = torch.randn(2 * batch, 11, generator=generator)
    exact = student.detach().double().requires_grad_()
    targets = ((teacher.double() - loss_fn.center) / loss_fn.teacher_temp(epoch)).softmax(dim=1).chunk(2)
    terms = [
        -(targets[t] * (view / 0.1).log_softmax(dim=1)).sum(dim=1).mean()
        for v, view in enumerate(exact.chunk(ncrops))
        for t in range(2)
        if t != v
    ]
    expected = torch.stack(terms).mean()
    expected.backward()
    loss = loss_fn(student, teacher, epoch)
    loss.backward()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    assert exact.grad is not None
    torch.testing.assert_close(student.grad, exact.grad.float(), rtol=1e-4, atol=1e-5)


def test_loss_is_computed_in_float32() -> None:
    loss_fn = DINOLoss(50, 4, 0.04, 0.04, 0, 1)
    student, teacher = torch.randn(12, 50).bfloat16(), torch.randn(6, 50).bfloat16()
    expected = loss_fn(student.float(), teacher.float(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_fn(student, teacher, 0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_loss_refuses_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="ncrops is 1"):
        DINOLoss(5, 1, 0.04, 0.04, 0, 10)
    with pytest.raises(ValueError, match="30 of 10 epochs"):
        DINOLoss(5, 2, 0.04, 0.07, 30, 10)
    loss_fn = DINOLoss(5, 4, 0.04, 0.04, 0, 10)
    with pytest.raises(ValueError, match=r"student \[9, 5\] and teacher \[6, 5\]"):
        loss_fn(torch.zeros(9, 5), torch.zeros(6, 5), 0)
    with pytest.raises(ValueError, match="no rows were counted"):
        loss_fn.update_center()


def test_checkpoint_holds_only_the_centre() -> None:
    assert list(DINOLoss(5, 2, 0.04, 0.04, 0, 1).state_dict()) == ["center"]


def _center(world: World, report: Callable[[Any], None]) -> None:
    loss_fn = DINOLoss(3, 2, 0.04, 0.04, 0, 1)
    loss_fn.center_step(torch.full((2 + 4 * world.rank, 3), float(world.rank + 1)))  # 2 rows of 1, 6 rows of 2
    loss_fn.update_center()
    report(loss_fn.center)


def test_center_is_the_mean_over_all_processes(tmp_path: Path) -> None:
    for (center,) in in_two_processes(_center, tmp_path):
        torch.testing.assert_close(center, torch.full((1, 3), 0.1 * 14 / 8))


def test_normalize_of_the_bottleneck_has_a_finite_gradient_at_zero() -> None:
    """A head whose weights are all zero must not produce NaN gradients."""
    head = DINOHead(4, 5, nlayers=1, bottleneck_dim=3)
    nn.init.zeros_(head.mlp.get_parameter("weight"))
    F.mse_loss(head(torch.ones(2, 4)), torch.ones(2, 5)).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)
