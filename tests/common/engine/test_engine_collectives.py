"""Exchanges and batch norm of two processes, against one process that has all their rows.

The run's loss is the mean over the processes of each one's share, L = (L_0 + L_1) / 2, so that a process's gradients of
its inputs are twice, and those of shared parameters the mean of both processes' are, the single process's.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import in_two_processes
from torch import Tensor, nn

from hvp.common.engine.batch_norm import SharedBatchNorm, share_batch_norm
from hvp.common.engine.collectives import gathered, summed
from hvp.common.engine.distributed import World


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_alone_they_are_the_identity():
    x = numbers(3, 2)
    assert gathered(x) is x
    assert summed(x) is x


def loss_of(rows: Tensor, rank: int) -> Tensor:
    """A loss of one process that all rows enter, differently."""
    return (numbers(*rows.shape, seed=rank) * rows).sum().square()


def _exchange(world: World, say: Callable[[Any], None]) -> None:
    for exchange in (gathered, summed):
        x = numbers(3, 2, 2, seed=10 + world.rank).transpose(1, 2).requires_grad_()
        rows = exchange(x)
        say(rows.detach())
        loss_of(rows, world.rank).backward()
        say(x.grad)
    half = gathered(torch.full((1, 2), world.rank + 0.5, dtype=torch.bfloat16))
    say(half)


def test_values_and_gradients_of_exchanges(tmp_path):
    xs = [numbers(3, 2, 2, seed=10 + rank).transpose(1, 2).requires_grad_() for rank in range(2)]
    said = in_two_processes(_exchange, tmp_path)
    for place, together in ((0, torch.cat(xs)), (2, xs[0] + xs[1])):
        gradients = torch.autograd.grad(loss_of(together, 0) + loss_of(together, 1), xs)
        for rank in range(2):
            torch.testing.assert_close(said[rank][place], together.detach(), rtol=0, atol=0)
            torch.testing.assert_close(said[rank][place + 1], gradients[rank], rtol=1e-5, atol=1e-5)
    assert torch.equal(said[0][4], torch.tensor([[0.5, 0.5], [1.5, 1.5]], dtype=torch.bfloat16))


class ConvNet(nn.Module):
    """Both kinds of batch norm, each behind what makes its inputs uneven."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2))
        self.head = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.LazyLinear(6))
        self.last = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.head(self.stem(x)))
        return y


def module_of(case: str) -> tuple[nn.Module, Tensor]:
    """A module with batch norm, and the inputs of both processes."""
    torch.manual_seed(0)
    if case == "conv net":
        net, images = ConvNet(), numbers(7, 3, 9, 9)
        net(images)  # makes the lazy layer
        return net, images
    kind, affine = case.split()
    norm = nn.BatchNorm2d if kind == "maps" else nn.BatchNorm1d
    module = norm(5, affine=affine == "affine", momentum=None if kind == "sequences" else 0.2)
    if affine == "affine":
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    # a mean that is large beside the deviation
    return module, 30 + numbers(*{"rows": (7, 5), "sequences": (7, 5, 3), "maps": (7, 5, 3, 2)}[kind])


CASES = ["rows affine", "rows plain", "sequences affine", "maps affine", "maps plain", "conv net"]
OWN = [slice(0, 2), slice(2, 7)]
"""The rows of each process."""


def two_steps(module: nn.Module, x: Tensor, own: slice) -> dict[str, Tensor]:
    """Outputs, gradients and buffers; running statistics move, and then move from where they are."""
    for seed in (1, 2):
        inputs = x[own].clone().requires_grad_()
        module.zero_grad()
        outputs = module(inputs)
        weights = numbers(len(x), *outputs.shape[1:], seed=seed)[own]
        (weights * outputs).square().sum().backward()
    assert inputs.grad is not None
    seen = {"outputs": outputs.detach(), "inputs": inputs.grad}
    seen |= {f"gradient of {name}": parameter.grad for name, parameter in module.named_parameters()}
    seen |= {f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()}
    seen["evaluated"] = module.eval()(x).detach()
    return seen


def _normalise(world: World, say: Callable[[Any], None]) -> None:
    for case in CASES:
        module, x = module_of(case)
        shared = share_batch_norm(module)
        assert any(isinstance(part, SharedBatchNorm) for part in shared.modules())
        say(two_steps(shared, x, OWN[world.rank]))
    shared.train()
    with torch.autocast("cpu", torch.bfloat16):
        say(shared(x[OWN[world.rank]]).dtype)


def test_batch_norm_of_two_processes_is_that_of_one(tmp_path):
    first, second = in_two_processes(_normalise, tmp_path)
    for number, case in enumerate(CASES):
        one = two_steps(*module_of(case), slice(None))
        assert one.keys() == first[number].keys()
        for name, expected in one.items():
            a, b = first[number][name], second[number][name]
            if name in ("outputs", "inputs"):
                ours = torch.cat([a, b])
            elif name.startswith("gradient"):
                ours = a + b
            else:
                ours = a
                assert name == "evaluated" or torch.equal(a, b)
            # float32 rounding, of sums that are as large as the largest of them
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * scale, msg=f"{case}: {name}")
    assert first[-1] == second[-1] == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_one_row_has_no_variance(shape):
    with pytest.raises(ValueError, match="more than 1 row"):
        SharedBatchNorm(3)(torch.zeros(shape))
    assert SharedBatchNorm(3).eval()(torch.zeros(shape)).shape == shape
    with pytest.raises(ValueError, match=r"3 channels, got \[2, 4\]"):
        SharedBatchNorm(3)(torch.zeros(2, 4))
