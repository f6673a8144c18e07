"""Several processes that train one network.

A run is one process, or as many as a launcher started: `hvp pretrain --devices N` on one machine, `torchrun`, or
`srun`. All run the same command and read their place from the environment. Each has its own part of every batch, a
copy of the networks, and its own stream of random numbers; rank 0, the leader, alone writes and prints.

The sequence of images does not depend on the processes. Epoch e goes through a permutation of the data set that
follows from (train.seed, e). Step s of the epoch takes images s * train.batch_size up to (s + 1) * train.batch_size of
it; what does not fill a batch at the end is left out. Rank r of W takes the r-th W-th of the batch, in order, and goes
through it in `train.accumulate` parts, in order. The views of an image follow from (train.seed, e, image). So a run may
be resumed with another number of processes: it sees the same images, in the same views, in the same steps. What does
depend on the process is stochastic depth: a run that is resumed with as many processes as before continues every
stream, and a process that the checkpoint knows nothing of starts one that follows from (train.seed, rank, step).

Whatever one process cannot go on from must end all. `World.agreeing()` encloses what may fail in one process; what is
raised inside then ends every process, with one message. A process that dies without a word is noticed by the others
when they next talk to it.
"""

import atexit
import gc
import hashlib
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
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
    """The processes of a run, and which of them this is. What one of them calls, all must call, in the same order."""

    rank: int = 0
    size: int = 1

    local_rank: int = 0
    """Number of this process on its machine; the GPU that it takes."""

    local_size: int = 1
    """Processes that share this one's cores. 1 under srun, which gives each task its own."""

    @property
    def leader(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A section that every process goes through; a UserError in one of them is raised in all.

        Raises:
            SharedError: with several processes, in all of them.
        """
        mistake: UserError | None = None
        try:
            yield
        except UserError as error:
            if self.size == 1 or isinstance(error, SharedError):
                raise
            mistake = error
        if self.sum([float(mistake is not None)])[0] == 0:
            return
        messages = self.gather(None if mistake is None else str(mistake))
        first = next(rank for rank, message in enumerate(messages) if message is not None)
        everywhere = all(message == messages[first] for message in messages)
        shown = messages[first] if everywhere else f"rank {first}: {messages[first]}"
        raise SharedError(str(shown), self.leader) from mistake

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over all processes, in float64; over one process the numbers themselves."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def mean(self, values: Sequence[float]) -> list[float]:
        """The means of numbers over all processes."""
        return [value / self.size for value in self.sum(values)]

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """The leader's value, in every process."""
        return self.gather(value)[0]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_beside_loader(cores: int) -> int:
    """Threads to train with on a CPU: all cores but those of as many loader workers as `available_workers()` starts.

    It does not follow the workers that are asked for, since PyTorch's results depend on its number of threads.
    """
    return max(1, cores - max(1, cores // 4))


def environment_world(environment: Mapping[str, str] = os.environ) -> World:
    """The place that a launcher gave this process: torchrun's variables, or srun's. Without either, alone.

    Under srun the step's variables count, not the job's: `sbatch` sets SLURM_NTASKS for its script too, which is one
    process.

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
    # A launcher that does not say the local rank starts one process a machine.
    values = {name: environment.get(name, "0" if "LOCAL_RANK" in name else "1") for name in names}
    bad = [f"{name} = {value!r}" for name, value in values.items() if not value.isdecimal()]
    if bad or int(values[names[0]]) >= int(values[names[1]]):
        shown = ", ".join(bad) or ", ".join(f"{name} = {values[name]}" for name in names[:2])
        raise UserError(f"the environment says {shown}. Start the processes by torchrun, srun, or hvp's --devices")
    return World(*(int(value) for value in values.values()))


def rendezvous(environment: Mapping[str, str]) -> tuple[str, str]:
    """Address and port where the processes meet: MASTER_ADDR and MASTER_PORT, or what srun's variables amount to, the
    first machine of the step and a port that follows from the job's number.

    Raises:
        UserError: neither is there.
    """
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    address = environment.get("MASTER_ADDR") or first_host(nodes) or environment.get("SLURM_LAUNCH_NODE_IPADDR")
    job = environment.get("SLURM_JOB_ID", "")
    port = environment.get("MASTER_PORT") or (str(20000 + int(job) % 20000) if job.isdecimal() else None)
    if not address or not port:
        raise UserError("MASTER_ADDR and MASTER_PORT are not set, and no srun says where the processes are to meet")
    return address, port


def first_host(nodes: str) -> str:
    """The first machine of a list as Slurm writes it: `gpu003` of `gpu[003-007,009],login1`."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""


_GROUPS: list[Any] = []
"""The groups that this process joined, which it holds until it exits; see `_let_go()`."""


@atexit.register
def _let_go() -> None:
    """Ends the threads of the groups while the interpreter still runs, and without holding it up.

    A thread of gloo's may be the last to hold a tensor that was exchanged, and needs the interpreter to free it. Where
    that has ended meanwhile, PyTorch aborts. Where DistributedDataParallel, in a cycle of references, is a group's last
    owner, it waits for the threads without letting them have the interpreter, for ever. The group itself does let them.
    """
    if _GROUPS:
        gc.collect()
        _GROUPS.clear()


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """The processes of this run, in touch with each other until the end of the block.

    Args:
        device: `cpu` leaves the GPUs of the machine alone; otherwise each process takes one where there are any.

    Raises:
        UserError: the environment is not complete, or the others cannot be reached.
        LostProcess: another process died, or this one met a mistake outside `World.agreeing()`.
    """
    world = environment_world()
    if world.size == 1:
        yield World()
        return
    address, port = rendezvous(os.environ)
    # Numbers that live on the host go through gloo, so that agreeing on something never waits for a GPU.
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
        # DistError, but for gloo, which raises plain RuntimeErrors
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
    # a launcher may show each process its own GPU only
    number = 0 if visible == 1 and world.local_size == 1 else world.local_rank
    if number >= visible:
        raise UserError(
            f"process {number} of this machine has no GPU: there are {visible}. Start fewer processes, or use "
            "--device cpu"
        )
    torch.cuda.set_device(number)


def leave_together() -> None:
    """Waits for the other processes, all of which end now: a launcher kills the rest when the first one is gone, and
    the leader may have something to say still."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # nobody is left to wait for
            dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()


def share_of_batch(batch_size: int, accumulate: int, world: World) -> int:
    """Images of one part of one process's share of a batch.

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
    """The module with batch norm over the images of all processes; the module itself where there is nothing to do.
    State-dict keys, parameters and buffers stay what they are."""
    if world.size == 1 or not has_batch_norm(module):
        return module
    if device.type == "cuda":
        return cast(ModuleT, nn.SyncBatchNorm.convert_sync_batchnorm(module))
    return cast(ModuleT, shared_batch_norm(module))


def data_parallel(module: ModuleT, world: World, device: torch.device) -> ModuleT | DistributedDataParallel:
    """The module whose backward pass averages gradients over the processes; alone, the module itself.

    Raises:
        SharedError: the processes do not hold equal weights.
    """
    if world.size == 1:
        return module
    assert_equal_weights(module, world)
    # 1 x 1 convolutions on channels-last images: their gradients' strides differ in name only.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        module,
        device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def unwrapped(module: ModuleT | DistributedDataParallel) -> ModuleT:
    """The module inside `data_parallel()`, for forward passes that end in no backward pass of their own."""
    inside: Any = module.module if isinstance(module, DistributedDataParallel) else module
    return inside


@contextmanager
def averaging(module: nn.Module, on: bool) -> Iterator[None]:
    """The context of a forward pass; `on` is False for all but the last part of an accumulated batch, whose gradients
    then wait for the last one's to be averaged with. For modules of `data_parallel()`, and with sharded parts."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(on, recurse=False)
    with module.no_sync() if isinstance(module, DistributedDataParallel) and not on else nullcontext():
        yield


def assert_equal_weights(module: nn.Module, world: World) -> None:
    """Sees to it that all processes hold the same numbers, bit by bit.

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
    """16 hexadecimal digits that stand for every bit of a state dict."""
    whole = hashlib.blake2b(digest_size=8)
    for tensor in module.state_dict().values():
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs `python ARGUMENTS` in several processes on this machine, by PyTorch's elastic launcher.

    A signal that asks a run to stop is passed on as often as it comes, and the processes have the time that they need
    for their step and checkpoint. (Where there is no /proc: the launcher's grace of 30 seconds, or
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT, and a second signal leaves them to themselves.)

    Returns:
        The exit code: 0, or that of the process that failed first.

    Raises:
        UserError: a process was killed, so that it could say nothing itself.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from hvp.common.training.signals import EXIT_CODES

    logging.disable()  # the launcher reports signals and exit codes; the processes say themselves what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_beside_loader(available_cores() // processes)))
    pass_on = Path("/proc/self/task").is_dir() and threading.current_thread() is threading.main_thread()
    handled = [signal.SIGHUP] if pass_on else [*EXIT_CODES, signal.SIGHUP]
    with tempfile.TemporaryDirectory(prefix="hvp-") as folder, _passing_on(EXIT_CODES if pass_on else ()):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle=",".join(number.name for number in handled),
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                name = signal.Signals(-failure.exitcode).name
                raise UserError(f"rank {rank} was killed by {name}, and the others with it") from None
            return failure.exitcode
        except SignalException as error:
            number = signal.Signals(error.sigval)
            return EXIT_CODES.get(number, 128 + number)
        finally:
            logging.disable(logging.NOTSET)
    return 0


@contextmanager
def _passing_on(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Sends signals on to the processes that this one has launched, which do not belong to its terminal's group."""
    from torch.distributed.elastic.multiprocessing import SignalException

    def pass_on(number: int, _: FrameType | None) -> None:
        launched = [child for child in _children() if _leads_a_group(child)]
        if not launched:
            raise SignalException("before the processes were there", signal.Signals(number))
        for child in launched:
            with suppress(ProcessLookupError):
                os.killpg(child, number)

    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children() -> list[int]:
    """This process's children, as Linux knows them."""
    files = Path("/proc/self/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def _leads_a_group(process: int) -> bool:
    try:
        return os.getpgid(process) == process
    except ProcessLookupError:
        return False
