"""A network sharded over two processes, against the whole network."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hvp.common.training.distributed import World, exchange_gradients
from hvp.common.training.optimizers import build_optimizer, squared_gradient_norm
from hvp.common.training.sharding import Whole, local, release, shard
from tests.processes import Report, in_two_processes

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two nested units, and a method that reads a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.full((1, 4), 2.0))

    def scaled(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x).square()


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def images() -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def gradients(network: nn.Module) -> list[Tensor]:
    found = [p.grad for p in network.parameters() if p.grad is not None]
    return [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in found]


def _two(world: World, report: Report) -> None:
    sharded = net()
    shard([(sharded.inner, ()), (sharded, ("scaled",))], world, CPU)
    report([p.numel() for p in local(sharded.parameters())])
    optimizer = build_optimizer("adamw", [{"params": list(sharded.parameters()), "lr": 0.1}])
    with torch.no_grad():
        report(sharded.scaled(images()))  # before its first forward pass
    release(sharded)

    # a batch in two parts; only the last one averages gradients
    parts = images().chunk(2)[world.rank].chunk(2)
    for number, part in enumerate(parts):
        exchange_gradients(sharded, number == 1)
        loss = sharded(part).mean() / 2
        loss.backward()
    release(sharded)
    report(gradients(sharded))
    report(world.sum([squared_gradient_norm(optimizer, world.size).item()]))
    optimizer.step()
    states = Whole(sharded, world).state_dict(), Whole(optimizer, world).state_dict()
    report(states if world.leader else [value for value in states[0].values() if value is not None])

    # an overflow in one process skips the step in both
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    scaler.scale(sharded(images()).mean()).backward()
    release(sharded)
    if world.rank == 1:
        shares = [p.grad.to_local() for p in sharded.parameters() if isinstance(p.grad, DTensor)]
        next(share for share in shares if share.numel()).fill_(torch.inf)
    before = Whole(sharded, world).state_dict()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    after = Whole(sharded, world).state_dict()
    report((scaler.get_scale(), not world.leader or all(torch.equal(before[k], after[k]) for k in before)))

    # load the whole state of another run
    other, other_optimizer = stepped(net())
    Whole(sharded, world).load_state_dict(other.state_dict())
    Whole(optimizer, world).load_state_dict(other_optimizer.state_dict())
    states = Whole(sharded, world).state_dict(), Whole(optimizer, world).state_dict()
    report(states if world.leader else None)


def stepped(network: Net) -> tuple[Net, torch.optim.Optimizer]:
    """Return a network and its optimiser after one step on the whole batch."""
    optimizer = build_optimizer("adamw", [{"params": list(network.parameters()), "lr": 0.1}])
    network(images()).mean().backward()
    optimizer.step()
    return network, optimizer


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[list[Any]]:
    return in_two_processes(_two, tmp_path_factory.mktemp("two"))


def test_each_process_has_a_share(reports):
    sizes = [p.numel() for p in net().parameters()]
    shares = zip(reports[0][0], reports[1][0], strict=True)
    assert [a + b for a, b in shares] == sizes
    assert all(sum(reports[rank][0]) < sum(sizes) for rank in (0, 1))


def test_a_method_that_reads_parameters_finds_them_whole(reports):
    for rank in (0, 1):
        torch.testing.assert_close(reports[rank][1], net().scaled(images()))


def test_gradients_of_parts_are_those_of_the_batch(reports):
    whole, _ = stepped(net())
    for rank in (0, 1):
        for ours, expected in zip(reports[rank][2], gradients(whole), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_norm_of_the_shares_is_that_of_the_gradients(reports):
    whole, _ = stepped(net())
    expected = sum(gradient.square().sum().item() for gradient in gradients(whole))
    assert reports[0][3] == reports[1][3] == pytest.approx([expected], rel=1e-5)


def test_the_leader_collects_the_whole_state(reports):
    network, optimizer = stepped(net())
    state, moments = reports[0][4]
    assert reports[1][4] == []
    for name, value in network.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4)
    expected = optimizer.state_dict()
    assert moments["param_groups"] == expected["param_groups"]
    for number, values in expected["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(moments["state"][number][key], value, rtol=1e-4, atol=1e-6)


def test_an_overflow_in_one_process_skips_the_step_in_all(reports):
    assert reports[0][5] == reports[1][5] == (2.0, True)


def test_a_whole_state_is_loaded(reports):
    network, optimizer = stepped(net())
    state, moments = reports[0][6]
    for name, value in network.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-7)
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(moments["state"][number][key], value, rtol=1e-6, atol=1e-7)
