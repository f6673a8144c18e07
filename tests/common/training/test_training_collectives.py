"""Differentiable collectives and batch norm over two processes, against one process with all the rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvp.common.training.collectives import gathered, summed
from hvp.common.training.distributed import World, data_parallel, synchronised
from tests.processes import Report, in_two_processes

CPU = torch.device("cpu")
ROWS = 12
"""Rows of both processes together; where the shares differ, the first process has SHARE of them."""
SHARE = 5


def rows_of(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(3)) * 2 + 5


def test_one_process_exchanges_nothing():
    x = torch.randn(3, requires_grad=True)
    assert gathered(x) is x
    assert summed(x) is x


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, x)
    return found


def _exchange(world: World, report: Report) -> None:
    x = rows_of(2)[world.rank * 6 :][:6].requires_grad_()
    everything = gathered(x)
    report(everything.detach())
    # each process's loss: its own rows against everyone's
    report(gradient((x @ everything.T).sin().mean(), x))
    total = summed(x)
    report(total.detach())
    report(gradient(total.square().sum() * (world.rank + 1), x))


def test_gathered_and_summed_rows_and_their_gradients(tmp_path: Path):
    reports = in_two_processes(_exchange, tmp_path)
    x = rows_of(2).requires_grad_()
    halves = x.chunk(2)
    of_gathered = gradient(sum(((half @ x.T).sin().mean() for half in halves), torch.zeros(())), x).chunk(2)
    total = halves[0] + halves[1]
    of_sum = gradient(total.square().sum() * 3, x).chunk(2)
    for rank, (everything, gathered_gradient, both, summed_gradient) in enumerate(reports):
        assert torch.equal(everything, x)
        torch.testing.assert_close(gathered_gradient, of_gathered[rank])
        assert torch.equal(both, total)
        torch.testing.assert_close(summed_gradient, of_sum[rank])


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1-D": (lambda: nn.BatchNorm1d(3), (3,)),
    "1-D, sequences": (lambda: nn.BatchNorm1d(3), (3, 4)),
    "not affine": (lambda: nn.BatchNorm1d(3, affine=False), (3,)),
    "2-D": (lambda: nn.BatchNorm2d(3), (3, 4, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (3, 4, 2)),
    "no statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (3,)),
}


def passed(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return output, gradients and state of a layer after two passes in training, and its output in evaluation."""
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.add_(torch.arange(3.0) * 0.1 + number)
        layer(x * 2)
    x = x.clone().requires_grad_()
    output = layer(x)
    (output.sin() * torch.arange(output[0].numel()).view_as(output[0])).sum().backward()
    found: dict[str, Any] = {"output": output.detach(), "gradient": x.grad}
    found |= {f"grad {name}": parameter.grad for name, parameter in layer.named_parameters()}
    found |= {f"state {name}": value.clone() for name, value in layer.state_dict().items()}
    return found | {"evaluated": layer.eval()(x).detach()}


def _normalise(world: World, report: Report) -> None:
    for make, shape in LAYERS.values():
        layer = make()
        before, keys = dict(layer.named_parameters()), list(layer.state_dict())
        layer = synchronised(layer, world, CPU)
        assert list(layer.state_dict()) == keys
        assert all(before[name] is parameter for name, parameter in layer.named_parameters())
        x = rows_of(*shape)
        report(passed(layer, x[:SHARE] if world.leader else x[SHARE:]))


def test_batch_norm_over_two_processes_normalises_by_all_rows(tmp_path: Path):
    """Shares of 5 and 7 rows. Tolerance: float32 sums in another order."""
    first, second = in_two_processes(_normalise, tmp_path)
    for number, (name, (make, shape)) in enumerate(LAYERS.items()):
        whole = passed(make(), rows_of(*shape))
        assert whole.keys() == first[number].keys()
        for key, expected in whole.items():
            parts = first[number][key], second[number][key]
            if key.startswith("state"):
                found = parts[0]
                assert torch.equal(*parts), (name, key)
            elif key.startswith("grad "):  # parameters' gradients: data_parallel() adds them up
                found = parts[0] + parts[1]
            else:
                found = torch.cat(parts)
            if (name, key) == ("no statistics", "evaluated"):
                continue  # without running statistics, each process uses those of its rows
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}, {key}: {m}")  # noqa: B023


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.BatchNorm1d(5, affine=False),
    )


def steps(model: nn.Module, x: Tensor) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(x).sin().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _train(world: World, report: Report) -> None:
    model = data_parallel(synchronised(convnet(), world, CPU), world, CPU)
    report(torch.stack(steps(model, rows_of(1, 4, 4).chunk(2)[world.rank])))


def test_a_network_trains_as_in_one_process(tmp_path: Path):
    losses = torch.stack([losses for (losses,) in in_two_processes(_train, tmp_path)]).mean(dim=0)
    torch.testing.assert_close(losses, torch.stack(steps(convnet(), rows_of(1, 4, 4))), rtol=1e-5, atol=1e-6)


def test_rows_without_channels_are_refused():
    layer = synchronised(nn.BatchNorm1d(3), World(0, 2), CPU)
    with pytest.raises(ValueError, match="channels"):
        layer(torch.zeros(3))


def test_one_row_is_refused_in_training():
    layer = synchronised(nn.BatchNorm2d(3), World(0, 2), CPU)
    with pytest.raises(ValueError, match="single row has no variance"):
        layer(torch.zeros(1, 3, 1, 1))
    assert layer.eval()(torch.zeros(1, 3, 1, 1)).shape == (1, 3, 1, 1)


def test_half_precision_is_kept_and_computed_in_float32():
    layer = synchronised(nn.BatchNorm1d(3), World(0, 2), CPU)
    x = rows_of(3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.state_dict()["running_mean"].dtype == torch.float32
