"""Training one network in several processes.

A run is one process, or as many as a launcher started: `hvp pretrain --devices N` on one machine, `torchrun`, or
`srun`. All run the same command and read their rank from the environment. Each has its own part of every batch, a copy
of the networks, and its own stream of random numbers. Only rank 0, the leader, writes and prints.

The sequence of images does not depend on the processes. Epoch e goes through a permutation of the data set that is a
function of (train.seed, e). Step s of the epoch takes images s * train.batch_size to (s + 1) * train.batch_size of it;
an incomplete batch at the end is dropped. Rank r of W takes the r-th of W equal shares of the batch, and goes through
it in `train.accumulate` parts. The views of an image are a function of (train.seed, e, image). A run can therefore be
resumed with another number of processes: it sees the same images, in the same views, in the same steps. Only stochastic
depth depends on the process. A run that is resumed with as many processes as before continues every stream; a process
without a stream in the checkpoint starts one from (train.seed, rank, step).

An error that stops one process must stop all. `World.agreeing()` encloses code that may fail in one process; an error
inside it stops every process, with one message. A process that dies silently is noticed when the others next exchange
data with it.
"""

import atexit
import gc
import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from hvp.common.errors import LostProcess, SharedError, UserError
from hvp.common.training.batch_norm import has_batch_norm, shared_batch_norm

T = TypeVar("T")
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them. All must make the same calls in the same order."""

    rank: int = 0
    size: int = 1

    local_rank: int = 0
    """Number of this process on its machine, and of its GPU."""

    local_size: int = 1
    """Processes that share this one's cores; 1 under srun, which gives each task its own cores."""

    @property
    def leader(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Enclose a section that every process goes through; a UserError in one of them is raised in all.

        Raises:
            SharedError: with several processes, in all of them.
        """
        own: UserError | None = None
        try:
            yield
        except UserError as error:
            if self.size == 1 or isinstance(error, SharedError):
                raise
            own = error
        if self.sum([float(own is not None)])[0] == 0:
            return
        messages = self.gather(None if own is None else str(own))
        first = next(rank for rank, message in enumerate(messages) if message is not None)
        everywhere = all(message == messages[first] for message in messages)
        shown = messages[first] if everywhere else f"rank {first}: {messages[first]}"
        raise SharedError(str(shown), self.leader) from own

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the means of numbers over all processes."""
        return [value / self.size for value in self.sum(values)]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return the leader's value, in every process."""
        return self.gather(value)[0]


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_beside_loader(cores: int) -> int:
    """Return the number of threads to train with on a CPU: the cores that `available_workers()` leaves by default.

    It does not depend on the number of workers that the user asks for, as PyTorch's results depend on the number of
    threads.
    """
    return max(1, cores - max(1, cores // 4))


def available_workers(asked: int | None, device: torch.device, world: World = World()) -> int:
    """Return the number of loader processes: as asked, or as many as suit this process's share of the cores, up to 16.

    On the CPU, which trains as well, that is a quarter of the share.
    """
    if asked is not None:
        return asked
    share = available_cores() // world.local_size
    return max(1, share // 4) if device.type == "cpu" else min(16, max(1, share))


def environment_world(environment: Mapping[str, str] = os.environ) -> World:
    """Return the place that a launcher gave this process by torchrun's or srun's variables; alone without either.

    Under srun the variables of the step count, not those of the job: `sbatch` sets SLURM_NTASKS for its script as well,
    which is one process.

    Raises:
        UserError: a variable is missing or is no number.
    """
    names: tuple[str, ...]
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return World()
    # A launcher that sets no local rank starts one process per machine.
    values = {name: environment.get(name, "0" if "LOCAL_RANK" in name else "1") for name in names}
    bad = [f"{name} = {value!r}" for name, value in values.items() if not value.isdecimal()]
    if bad or int(values[names[0]]) >= int(values[names[1]]):
        shown = ", ".join(bad) or ", ".join(f"{name} = {values[name]}" for name in names[:2])
        raise UserError(f"the environment says {shown}. Start the processes by torchrun, srun, or hvp's --devices")
    return World(*(int(value) for value in values.values()))


def rendezvous(environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the address and port where the processes meet: MASTER_ADDR and MASTER_PORT, or srun's equivalent.

    Under srun these are the first machine of the step, and a port derived from the job's number.

    Raises:
        UserError: neither is set.
    """
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    address = environment.get("MASTER_ADDR") or first_host(nodes) or environment.get("SLURM_LAUNCH_NODE_IPADDR")
    job = environment.get("SLURM_JOB_ID", "")
    port = environment.get("MASTER_PORT") or (str(20000 + int(job) % 20000) if job.isdecimal() else None)
    if not address or not port:
        raise UserError(
            "neither MASTER_ADDR and MASTER_PORT nor srun's variables are set. Start the processes by torchrun, srun, "
            "or hvp's --devices"
        )
    return address, port


def first_host(nodes: str) -> str:
    """Return the first machine of a list in Slurm's notation: `gpu003` of `gpu[003-007,009],login1`."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""


_GROUPS: list[Any] = []
"""Process groups that this process joined, held until it exits; see `_release_groups()`."""


@atexit.register
def _release_groups() -> None:
    """Stop the groups' threads while the interpreter still runs, without holding the interpreter lock.

    One of gloo's threads may be the last owner of an exchanged tensor, and needs the interpreter to free it; PyTorch
    aborts if the interpreter is gone by then. If DistributedDataParallel, in a reference cycle, is the last owner of a
    group, it waits for the threads while holding the lock, for ever. The group itself releases the lock.
    """
    if _GROUPS:
        gc.collect()
        _GROUPS.clear()


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Connect the processes of this run until the end of the block.

    Args:
        device: `cpu` leaves the machine's GPUs alone; otherwise each process takes one, if there are any.

    Raises:
        UserError: the environment is incomplete, or the other processes cannot be reached.
        LostProcess: another process died, or this one hit an error outside `World.agreeing()`.
    """
    world = environment_world()
    if world.size == 1:
        yield World()
        return
    address, port = rendezvous(os.environ)
    # Numbers on the host go through gloo, so agreeing on something never waits for a GPU.
    takes_gpu = device != "cpu" and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if takes_gpu else "gloo"
    try:
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)
        dist.init_process_group(backend, rank=world.rank, world_size=world.size)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"rank {world.rank} cannot reach the others at {address}:{port}: {error}") from error
    _GROUPS.append(dist.group.WORLD)
    try:
        with world.agreeing():
            if takes_gpu:
                _take_gpu(world)
        yield world
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors instead of DistError
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostProcess(f"rank {world.rank}: another process of the run has ended", world.leader) from error
        raise
    except SharedError:
        raise
    except UserError as error:
        raise LostProcess(f"rank {world.rank}: {error}", leader=True) from error
    dist.destroy_process_group()


def _take_gpu(world: World) -> None:
    visible = torch.cuda.device_count()
    # a launcher may show each process only its own GPU
    number = 0 if visible == 1 and world.local_size == 1 else world.local_rank
    if number >= visible:
        raise UserError(
            f"process {number} of this machine has no GPU: there are {visible}. Start fewer processes, or use "
            "--device cpu"
        )
    torch.cuda.set_device(number)


def leave_together() -> None:
    """Wait for the other processes, all of which are ending.

    A launcher kills the rest when the first process is gone, and the leader may still have a message to print.
    """
    if dist.is_initialized():
        with suppress(RuntimeError):  # nobody is left to wait for
            dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()


def share_of_batch(batch_size: int, accumulate: int, world: World) -> int:
    """Return the number of images in one part of one process's share of a batch.

    Raises:
        UserError: the batch does not divide.
    """
    parts = world.size * accumulate
    if batch_size % parts:
        raise UserError(
            f"train.batch_size = {batch_size} does not divide among {world.size} processes that go through their share "
            f"in train.accumulate = {accumulate} parts. Set a multiple of {parts}, for example "
            f"{max(1, round(batch_size / parts)) * parts}"
        )
    return batch_size // parts


def synchronised(module: ModuleT, world: World, device: torch.device) -> ModuleT:
    """Return the module with batch norm over the images of all processes.

    State-dict keys, parameters and buffers stay the same. Without batch norm or other processes, return the module
    itself.
    """
    if world.size == 1 or not has_batch_norm(module):
        return module
    if device.type == "cuda":
        return cast(ModuleT, nn.SyncBatchNorm.convert_sync_batchnorm(module))
    return cast(ModuleT, shared_batch_norm(module))


def data_parallel(module: ModuleT, world: World, device: torch.device) -> ModuleT | DistributedDataParallel:
    """Return the module with gradients averaged over the processes by its backward pass.

    With one process, or for a module with sharded parts, which does this already, it is the module itself.

    Raises:
        SharedError: the processes do not hold equal weights.
    """
    if world.size == 1 or any(isinstance(part, FSDPModule) for part in module.modules()):
        return module
    assert_equal_weights(module, world)
    # Gradients of 1 x 1 convolutions on channels-last images have other strides for the same layout.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        module,
        device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def exchange_gradients(model: nn.Module, on: bool) -> None:
    """Choose whether the backward passes of the next forward passes exchange gradients.

    Off for all but the last part of an accumulated batch: the gradients wait to be averaged with those of the last.

    Args:
        model: a module of `data_parallel()`, or one with sharded parts.
        on: whether to exchange.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(on, recurse=False)
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on


def assert_equal_weights(module: nn.Module, world: World) -> None:
    """Check that all processes hold the same weights, bit for bit.

    Raises:
        SharedError: they do not.
    """
    with world.agreeing():
        digests = world.gather(digest(module))
        if len(set(digests)) > 1:
            raise UserError(
                f"the processes hold different weights: {', '.join(digests)}. The same seed gave different numbers; do "
                "all machines have the same PyTorch?"
            )


def digest(module: nn.Module) -> str:
    """Return a digest of every bit of a state dict, 16 hexadecimal digits."""
    whole = hashlib.blake2b(digest_size=8)
    for tensor in module.state_dict().values():
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
