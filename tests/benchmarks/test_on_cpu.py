"""Stand-ins for what a small machine lacks."""

import torch
from torch import nn

from hvp.benchmarks.originals.on_cpu import Unsharded, keep_on_cpu


def test_an_unsharded_module_is_the_module():
    inner = nn.Linear(3, 2)
    model = nn.ModuleDict({"head": Unsharded(inner, sharding_strategy="any", use_orig_params=True)})
    x = torch.randn(4, 3)
    assert torch.equal(model["head"](x), inner(x))
    assert model["head"].weight is inner.weight
    assert list(model.state_dict()) == ["head.weight", "head.bias"]
    (found,) = Unsharded.fsdp_modules(model)
    assert found is model["head"]
    assert [id(p) for p in found.params] == [id(p) for p in inner.parameters()]


def test_gradients_of_an_unsharded_module_are_clipped_by_their_common_norm():
    module = Unsharded(nn.Linear(3, 2))
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 5.0)
    assert torch.isclose(module.clip_grad_norm_(2.0), torch.tensor(5.0 * 8**0.5))
    norm = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(norm, torch.tensor(2.0))


def test_a_move_to_cuda_does_nothing_and_others_work():
    to = keep_on_cpu(nn.Module.to)
    module = nn.Linear(1, 1)
    assert to(module, torch.device("cuda")) is module
    assert to(module, "cuda:1").weight.device.type == "cpu"
    assert to(module, torch.float64).weight.dtype == torch.float64
