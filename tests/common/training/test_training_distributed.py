"""Several processes: their places in the environment, their agreement, and the modules made for them."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hvp.common.errors import LostProcess, SharedError, UserError
from hvp.common.training import distributed
from hvp.common.training.batch_norm import SharedBatchNorm
from hvp.common.training.distributed import (
    World,
    data_parallel,
    environment_world,
    exchange_gradients,
    first_host,
    joined,
    rendezvous,
    share_of_batch,
    synchronised,
)
from tests.processes import Report, in_two_processes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, World(3, 8, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World(1, 2, 0, 1)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, World(5, 8, 1, 1)),
        # the script of sbatch is one process, however many tasks the job has
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, World()),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, World()),
    ],
)
def test_a_process_reads_its_place_from_the_environment(environment, world):
    assert environment_world(environment) == world


@pytest.mark.parametrize("environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "one", "WORLD_SIZE": "2"}])
def test_a_wrong_environment_is_a_user_error(environment):
    with pytest.raises(UserError, match="RANK = "):
        environment_world(environment)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("gpu[003-007,009],login1", "gpu003"),
        ("gpu[12]", "gpu12"),
        ("rack1-n[1,4]-ib", "rack1-n1-ib"),
        ("", ""),
    ],
)
def test_the_first_machine_of_a_slurm_list(nodes, host):
    assert first_host(nodes) == host


def test_the_rendezvous_address():
    assert rendezvous({"MASTER_ADDR": "here", "MASTER_PORT": "5"}) == ("here", "5")
    assert rendezvous({"SLURM_JOB_ID": "1234567", "SLURM_STEP_NODELIST": "n[3-4]"}) == ("n3", "34567")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        rendezvous({"RANK": "0", "WORLD_SIZE": "2"})


def test_a_batch_must_divide_evenly():
    assert share_of_batch(64, 2, World(0, 4)) == 8
    with pytest.raises(UserError, match="Set a multiple of 8, for example 64"):
        share_of_batch(60, 2, World(0, 4))


def test_modules_of_a_single_process_stay_unwrapped():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert data_parallel(module, World(), CPU) is module
    assert synchronised(module, World(), CPU) is module
    assert synchronised(module[0], World(0, 2), CPU) is module[0]


@pytest.mark.parametrize(("device", "kind"), [("cuda", nn.SyncBatchNorm), ("cpu", SharedBatchNorm)])
def test_synchronised_batch_norm_keeps_parameters_and_names(device, kind):
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = dict(module.named_parameters())
    after = synchronised(module, World(0, 2), torch.device(device))
    assert isinstance(after[1], kind)
    assert all(before[name] is parameter for name, parameter in after.named_parameters())


def _agree(world: World, report: Report) -> None:
    report(world.mean([float(world.rank), 3.0]))
    report(world.broadcast(f"from {world.rank}"))
    for who in (0, 1, None):
        try:
            with world.agreeing():
                if who in (world.rank, None):
                    raise UserError("the disk is full")
        except SharedError as error:
            report((str(error), error.leader))
    with world.agreeing():
        report("on")


def test_an_error_in_one_process_is_raised_in_all(tmp_path):
    for rank, reported in enumerate(in_two_processes(_agree, tmp_path)):
        leader = rank == 0
        assert reported == [
            [0.5, 3.0],
            "from 0",
            ("rank 0: the disk is full", leader),
            ("rank 1: the disk is full", leader),
            ("the disk is full", leader),
            "on",
        ]


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_processes_that_train_on_the_cpu_need_no_gpu(monkeypatch, device):
    """The second process of two, on a machine with one GPU."""
    backends: list[str] = []
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(World, "agreeing", lambda _: nullcontext())
    if device == "cpu":
        with joined(device) as world:
            assert world.rank == 1
        assert backends == ["gloo"]
    else:
        with pytest.raises(LostProcess, match=r"no GPU: there are 1\. Start fewer processes, or use --device cpu"):
            joined(device).__enter__()


def gradient_of(layer: nn.Linear) -> Tensor:
    assert layer.weight.grad is not None
    return layer.weight.grad.clone()


def _accumulate(world: World, report: Report) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 1, bias=False)
    model = data_parallel(layer, world, CPU)
    assert isinstance(model, DistributedDataParallel)
    first, second = inputs_of(world.rank)
    exchange_gradients(model, False)
    model(first).sum().backward()
    report(gradient_of(layer))
    exchange_gradients(model, True)
    model(second).sum().backward()
    report(gradient_of(layer))
    layer(first).sum().backward()
    report(gradient_of(layer))
    with torch.no_grad():
        layer.weight += world.rank
    with pytest.raises(SharedError, match="different weights"):
        distributed.assert_equal_weights(layer, world)


def inputs_of(rank: int) -> Tensor:
    """Return two inputs of a process; they are also the gradients of a linear layer's summed outputs."""
    return torch.arange(12.0).reshape(2, 2, 1, 3)[rank]


def test_gradients_are_averaged_once_a_step_and_unequal_weights_refused(tmp_path):
    mean = torch.stack([inputs_of(rank).sum(0) for rank in range(2)]).mean(0)
    for rank, gradients in enumerate(in_two_processes(_accumulate, tmp_path)):
        first, _ = inputs_of(rank)
        assert torch.equal(gradients[0], first)  # its own until the last part
        assert torch.equal(gradients[1], mean)  # averaged in the last part
        assert torch.equal(gradients[2], mean + first)  # a pass through the module itself exchanges nothing
