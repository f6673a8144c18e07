"""LayerScale ViTs: stochastic depth on subsets, registers, and recognition. Numbers are in tests/parity."""

import pytest
import torch

from hvp.common.errors import UserError
from hvp.common.networks import encoder_from_state
from hvp.common.networks.register_vision_transformer import (
    RegisterVisionTransformer,
    SubsetBlock,
    build_register_vit,
)
from hvp.common.networks.vision_transformer import build_vit


@pytest.mark.parametrize(("rate", "kept"), [(0.3, 7), (0.5, 5), (0.99, 1)])
def test_stochastic_depth_computes_a_subset_and_scales_it(rate, kept):
    torch.manual_seed(0)
    block = SubsetBlock(8, 2, drop_path=rate, init_values=1.0)
    x = torch.randn(10, 3, 8)
    seen = []

    def branch(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return torch.ones_like(rows)

    added = block._add_to_subset(x, branch) - x
    assert seen == [kept]
    assert sorted(added[:, 0, 0].tolist()) == pytest.approx([0.0] * (10 - kept) + [10 / kept] * kept, abs=1e-5)


def test_stochastic_depth_is_off_in_evaluation_and_random_in_training():
    torch.manual_seed(0)
    plain, dropping = SubsetBlock(8, 2, init_values=1.0), SubsetBlock(8, 2, drop_path=0.5, init_values=1.0)
    dropping.load_state_dict(plain.state_dict())
    x = torch.randn(10, 3, 8)
    torch.testing.assert_close(dropping.eval()(x), plain(x))
    dropping.train()
    assert not torch.equal(dropping(x), dropping(x))
    dropping(x).sum().backward()
    assert all(p.grad is not None for p in dropping.parameters())


def test_uniform_and_growing_rates():
    for uniform, expected in ((True, [0.2, 0.2, 0.2]), (False, [0.0, 0.1, 0.2])):
        vit = build_register_vit("vit_micro", patch_size=8, img_size=32, drop_path_rate=0.2, drop_path_uniform=uniform)
        assert [block.drop_rate for block in vit.blocks] == pytest.approx(expected)


def test_registers_affect_outputs_but_are_not_returned():
    vit = build_register_vit("vit_micro", patch_size=8, img_size=32, num_registers=5).eval()
    x = torch.randn(2, 3, 32, 32)
    assert vit.prepare_tokens(x).shape == (2, 1 + 5 + 16, 96)
    assert vit.all_tokens(x).shape == (2, 17, 96)
    assert [layer.shape for layer in vit.get_intermediate_layers(x, 2)] == [(2, 17, 96)] * 2
    before = vit(x)
    assert vit.register_tokens is not None
    torch.nn.init.normal_(vit.register_tokens)
    assert not torch.allclose(vit(x), before)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.0}, {"swiglu": True, "num_registers": 3}])
def test_a_network_is_recognised_by_its_state(options):
    vit = build_register_vit("vit_micro", patch_size=8, img_size=32, **options)
    found = encoder_from_state(vit.state_dict())
    assert isinstance(found, RegisterVisionTransformer)
    found.load_state_dict(vit.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found.eval()(x), vit.eval()(x))
    other = build_vit("vit_micro", patch_size=8, img_size=32)
    assert type(encoder_from_state(other.state_dict())) is type(other)


@pytest.mark.parametrize(("arch", "patch_size"), [("vit_small", 14), ("vit_micro", 12)])
def test_patch_sizes_that_do_not_fit(arch, patch_size):
    with pytest.raises(UserError, match=f"patch_size = {patch_size} does not suit"):
        build_register_vit(arch, patch_size=patch_size, img_size=48 if arch == "vit_micro" else 32)
