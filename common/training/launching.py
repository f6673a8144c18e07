"""Starting several processes of a run on this machine."""

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from hvp.common.errors import UserError
from hvp.common.training.distributed import available_cores, threads_beside_loader
from hvp.common.training.signals import EXIT_CODES


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `python ARGUMENTS` in several processes on this machine, by PyTorch's elastic launcher.

    Signals that ask a run to stop are forwarded every time, and the processes have all the time that they need for
    their step and checkpoint. (Without /proc they have the launcher's grace of 30 seconds, or
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT, and a second signal abandons them.)

    Returns:
        The exit code: 0, or that of the process that failed first.

    Raises:
        UserError: a process was killed, so it could print no message.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # the launcher would report signals and exit codes; the processes print their own errors
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_beside_loader(available_cores() // processes)))
    pass_on = Path("/proc/self/task").is_dir() and threading.current_thread() is threading.main_thread()
    handled = [signal.SIGHUP] if pass_on else [*EXIT_CODES, signal.SIGHUP]
    with tempfile.TemporaryDirectory(prefix="hvp-") as folder, _forwarding(EXIT_CODES if pass_on else ()):
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
def _forwarding(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Forward signals to the launched processes, which are not in the terminal's process group."""
    from torch.distributed.elastic.multiprocessing import SignalException

    def forward(number: int, _: FrameType | None) -> None:
        launched = [child for child in _children() if _leads_a_group(child)]
        if not launched:
            raise SignalException("before the processes were there", signal.Signals(number))
        for child in launched:
            with suppress(ProcessLookupError):
                os.killpg(child, number)

    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children() -> list[int]:
    """Return the process numbers of this process's children, from /proc."""
    files = Path("/proc/self/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def _leads_a_group(process: int) -> bool:
    try:
        return os.getpgid(process) == process
    except ProcessLookupError:
        return False
