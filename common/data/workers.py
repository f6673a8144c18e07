"""Worker processes that make batches: PyTorch's DataLoader, except that every wait ends and every failure is explained.

A worker may die, be stopped, or hang on a network file that is gone. DataLoader then waits for ever, or raises whatever
error its queues ran into. Here

- a wait ends when a worker is found dead, when the waiting process is asked to stop, or when no worker has begun
  another image for `timeout` seconds. Images count, not batches, so large batches on slow cores do not look hung;
- every failure is one `NoBatch`, which names the worker, the image and the remedy;
- workers are ended by SIGKILL, which even a stopped one obeys. They hold nothing that would be lost.

With 0 workers, batches are made in this process, and its waits end in the same way.
"""

import errno
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import weakref
from _weakrefset import WeakSet
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import process
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data._utils.signal_handling import _remove_worker_pids
from torch.utils.data.dataloader import DataLoader, _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from hvp.common.data.source import ImageSource
from hvp.common.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

TIMEOUT = 300
"""Seconds without a new image after which a wait ends, where there is no `data.timeout`."""

TICK = 0.5
"""Seconds between two checks of a wait."""

FAREWELL = 5.0
"""Seconds to wait for killed workers to end; one that the system cannot end is left behind."""

LIMIT_REACHED = 64
"""Exit code of a worker that cannot hand over its batches, to which the error's number is added."""

FINALIZERS = {weakref.__file__, WeakSet.add.__code__.co_filename}
"""Files whose functions run when an object is finalised."""

METHOD = "fork" if sys.platform == "linux" else "spawn"


class NoBatch(UserError):
    """The workers made no batch: one died, hangs, or could not be started. Training up to here is intact."""


class Hanging(NoBatch):
    """No worker began another image for `timeout` seconds."""


class WaitInterrupted(BaseException):
    """`stopped()` came true while waiting for a batch. Not an Exception, because image readers catch those."""


class WatchedSource:
    """An `ImageSource` that tells the main process which image each worker is reading.

    Args:
        source: the images.
        workers: reading processes; 0 for this process alone.
    """

    def __init__(self, source: ImageSource, workers: int) -> None:
        self._source = source
        # two numbers per process: images begun, and the index of the last one
        with _explained(workers, starting=True):
            self._slots: Any = multiprocessing.get_context(METHOD).RawArray("q", 2 * max(1, workers))

    def __len__(self) -> int:
        return len(self._source)

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self._source.classes

    def read(self, index: int) -> NDArray[np.uint8]:
        """Record the image, and read it from the source."""
        worker = get_worker_info()
        slot = 0 if worker is None else 2 * worker.id
        self._slots[slot] += 1
        self._slots[slot + 1] = index
        return self._source.read(index)

    def labels(self) -> NDArray[np.int64] | None:
        """Return the source's labels."""
        return self._source.labels()

    def describe(self, index: int) -> str:
        """Name an image of the source."""
        return self._source.describe(index)

    @property
    def begun(self) -> int:
        """Number of images that all workers have begun so far."""
        return sum(self._slots[::2])

    def image_of(self, worker: int) -> str | None:
        """Name the image that a worker is reading or read last; None before its first."""
        begun, index = self._slots[2 * worker : 2 * worker + 2]
        return self._source.describe(index) if begun else None


def shared_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Make an empty tensor; in a worker it lies in shared memory, so that handing it over costs no copy."""
    tensor = torch.empty(shape, dtype=dtype)
    return tensor if get_worker_info() is None else tensor.share_memory_()


class Batches(Generic[T]):
    """Batches that worker processes make from tasks, in the order of the tasks.

    Args:
        make: turns a task into a batch, in the workers. It must be picklable, and read images from `source` alone.
        tasks: the tasks of one pass; iterated anew for each pass.
        source: the images that `make` reads.
        workers: worker processes; 0 makes the batches in this process.
        pin_memory: hand out batches in page-locked memory; without CUDA it has no effect.
        timeout: seconds that a wait may last without a new image; 0: for ever.
    """

    def __init__(
        self,
        make: Callable[[Any], T],
        tasks: Iterable[Any],
        source: WatchedSource,
        *,
        workers: int,
        pin_memory: bool = False,
        timeout: float = TIMEOUT,
    ) -> None:
        self._source, self._workers, self._timeout = source, workers, timeout
        self._loader = _Loader(
            _Maker(make),
            batch_sampler=cast(Any, tasks),  # not lists of indices, but tasks, which only `make` reads
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            multiprocessing_context=METHOD if workers else None,
            pin_memory=pin_memory and torch.cuda.is_available(),
            generator=torch.Generator(),  # its seeds are unused; without it, DataLoader would draw from the global one
        )
        # Workers ignore SIGTERM, with which multiprocessing would end those that are left when the interpreter exits.
        weakref.finalize(self, _end_workers, self._loader)

    def one_pass(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[T]:
        """Yield the batches of all tasks, once. Only one pass may be read at a time.

        Args:
            stopped: called twice a second while waiting for a batch; True ends the wait. Only in the main thread, as no
                other can be interrupted: elsewhere waits are DataLoader's.

        Raises:
            UserError: raised by `make`.
            NoBatch: a worker died, hangs, or could not be started.
            WaitInterrupted: `stopped()` was True.
        """
        batches = self._wait(self._start, stopped)
        while (batch := self._wait(lambda: next(batches, _END), stopped)) is not _END:
            yield cast(T, batch)

    def close(self) -> None:
        """End the workers, which otherwise wait for the next pass; a further pass starts new ones."""
        _end_workers(self._loader)

    def _start(self) -> Iterator[Any]:
        # DataLoader installs a SIGCHLD handler that raises a RuntimeError wherever the main process happens to be,
        # for example in a backward pass. Without it, a dead worker is found when its batch is due.
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(self._loader)
        if before is not None and threading.current_thread() is threading.main_thread():
            # the previous handler may itself belong to an earlier DataLoader
            from_loader = getattr(before, "__module__", "").startswith("torch.utils.data")
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if from_loader else before)
        return batches

    def _wait(self, get: Callable[[], R], stopped: Callable[[], bool]) -> R:
        """Return the result of `get` if it comes in time, or raise the error that stands for it."""
        watch = _Watch(self._loader, self._source, self._timeout, stopped)
        try:
            with _explained(self._workers, starting=self._loader.processes is None):
                try:
                    got = watch.over(get)
                    if isinstance(got, _Failed):
                        try:
                            raise got.error
                        finally:
                            del got  # the error's traceback holds this frame: the cycle would keep the loader alive
                    return got
                except (RuntimeError, OSError, EOFError) as error:
                    # If a worker dies before its tensors are fetched, the connection to it breaks.
                    if found := self._dead_worker(patience=0.0 if isinstance(error, RuntimeError) else 1.0):
                        raise NoBatch(found) from error
                    raise
                except _WorkerDied:
                    raise NoBatch(self._dead_worker() or "A loader worker died.") from None
                except _TimedOut:
                    raise Hanging(self._hang()) from None
        except BaseException:
            self.close()
            raise

    def _dead_worker(self, patience: float = 0.0) -> str | None:
        """Explain a worker's death, if one is dead or dies within `patience` seconds."""
        processes, until = self._loader.processes, time.monotonic() + patience
        while processes is not None and not processes._shutdown:  # after a shutdown, we ended them ourselves
            for number, worker in enumerate(processes._workers):
                if not worker.is_alive():
                    return _death(worker.exitcode or 0, worker.pid, self._source.image_of(number), self._workers)
            if time.monotonic() >= until:
                break
            time.sleep(0.01)
        return None

    def _hang(self) -> str:
        """Message for a hang, which names the workers and images waited for."""
        processes = self._loader.processes
        if processes is None:
            who = f"The last image begun is {self._source.image_of(0)}" if self._workers == 0 else "No worker starts"
        else:
            task = processes._task_info.get(processes._rcvd_idx)
            awaited = []
            for number, worker in enumerate(processes._workers):
                state, image = _state(worker.pid), self._source.image_of(number)
                # at the start of a pass, the loader waits for all workers
                if task is None or task[0] == number or state:
                    last = f"whose last image is {image}" if image else "which has not begun an image yet"
                    awaited.append(f"loader worker {worker.pid}{state}, {last}")
            who = "Waiting for " + "; ".join(awaited)
        return (
            f"No image was read for {self._timeout:g} seconds. {who}.\n"
            "    Its disk or network may be gone, or the process may have been stopped."
        )


class _WorkerDied(BaseException):
    """A watch found a dead worker."""


class _TimedOut(BaseException):
    """A watch ran out of time."""


class _Watch:
    """Timer that checks a wait at regular intervals, and ends it.

    The handler of its signal raises. The main thread may hang in any system call, such as fetching
    a tensor from a stopped worker, and most of them have no timeout.
    """

    def __init__(self, loader: "_Loader", source: WatchedSource, timeout: float, stopped: Callable[[], bool]) -> None:
        self._loader, self._source, self._timeout, self._stopped = loader, source, timeout, stopped
        self._on = False
        self._begun, self._waited = -1, 0.0

    def over(self, get: Callable[[], R]) -> R:
        """Return the result of `get`, unless the watch ends the wait first."""
        if threading.current_thread() is not threading.main_thread():
            return get()
        before = signal.signal(signal.SIGALRM, self._look)
        started = time.monotonic()
        delay, interval = signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        self._on = True
        try:
            return get()
        finally:
            self._on = False  # from here on, the handler raises nothing
            left = max(delay - (time.monotonic() - started), 1e-6) if delay else 0.0
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
            signal.setitimer(signal.ITIMER_REAL, left, interval)

    def _look(self, _number: int, frame: FrameType | None) -> None:
        if not self._on or _swallows(frame):
            return
        if self._stopped():
            raise WaitInterrupted
        processes = self._loader.processes
        if processes is not None and not all(worker.is_alive() for worker in processes._workers):
            raise _WorkerDied
        begun = self._source.begun
        if begun != self._begun:
            self._begun, self._waited = begun, 0.0
            return
        self._waited += TICK  # in ticks, so that the time during which this process was itself stopped does not count
        if 0 < self._timeout <= self._waited:
            raise _TimedOut


def _swallows(frame: FrameType | None) -> bool:
    """Whether an exception raised now would be printed and dropped, because an object is being finalised."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename in FINALIZERS:
            return True
        frame = frame.f_back
    return False


@contextmanager
def _explained(workers: int, *, starting: bool = False) -> Iterator[None]:
    """Turn errors from a machine's limits and lost workers into one message; any other error is a bug of ours."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if "items of ancdata" in reason:  # a file descriptor was dropped on its way
            reason = os.strerror(errno.EMFILE)
        remedy = _remedy(error, workers)
        lost = workers > 0 and (isinstance(error, (OSError, EOFError)) or "DataLoader worker (pid" in reason)
        if remedy is None and not lost:
            raise
        who = "A loader worker failed" if workers else "The loader failed"
        raise NoBatch(
            f"{who}{' to start' if starting and workers else ''}: {reason}\n    {remedy or _MEMORY.format(workers)}"
        ) from error


_MEMORY = (
    "Most likely the machine ran out of memory, or of shared memory (/dev/shm; in a container: --shm-size).\n"
    "    Use fewer workers (--workers, now {}) or a smaller batch size, or give it more memory."
)


def _remedy(error: BaseException, workers: int) -> str | None:
    """Advice on a limit of this machine; None for any other error."""
    number, text = getattr(error, "errno", None), str(error)
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text or "items of ancdata" in text:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"Allow more open files (`ulimit -n`, now {limit}), or use fewer workers (--workers, now {workers})."
    place = getattr(error, "filename", None)
    if number in (errno.ENOSPC, errno.EROFS, errno.EACCES) and place and not str(place).startswith("/dev/shm"):
        return (
            f"Workers need space for a few small files in {os.path.dirname(place)}: free some, or set TMPDIR to "
            "another folder."
        )
    if number in (errno.ENOSPC, errno.EROFS, errno.EACCES) or "shared memory" in text:
        return (
            "Workers hand over batches in shared memory: make /dev/shm writable and larger (in a container: --shm-size "
            f"or --ipc=host), or use fewer workers (--workers, now {workers}); --workers 0 needs no shared memory."
        )
    if number in (errno.EAGAIN, errno.ENOMEM):
        return (
            "The machine or its limits (`ulimit -u`, a container's memory) allow no more processes: use fewer workers "
            f"(--workers, now {workers})."
        )
    return None


def _death(exitcode: int, pid: int | None, image: str | None, workers: int) -> str:
    """Message for a dead worker: the cause, and a remedy."""
    last = f" The last image it began is {image}." if image else ""
    if exitcode > LIMIT_REACHED:
        error = OSError(exitcode - LIMIT_REACHED, os.strerror(exitcode - LIMIT_REACHED))
        return f"A loader worker failed: {error}\n    {_remedy(error, workers) or _MEMORY.format(workers)}"
    if exitcode >= 0:
        return f"A loader worker failed: process {pid} ended with exit code {exitcode}.{last}"
    name = signal.Signals(-exitcode).name
    head = f"A loader worker failed: process {pid} was killed by {name}.{last}\n    "
    if name == "SIGBUS":
        return head + str(_remedy(RuntimeError("shared memory"), workers))
    if name == "SIGKILL":
        return head + _MEMORY.format(workers)
    return head + "A library crashed, perhaps on that image; if it crashes again, remove the file."


def _state(pid: int | None) -> str:
    """State of an idle process, from /proc; empty if unknown."""
    with suppress(OSError, IndexError):
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return {"T": " (stopped)", "D": " (waiting for a disk)"}.get(letter, "")
    return ""


@dataclass(frozen=True)
class _Failed:
    """An error in place of a batch, on its way to the main process: DataLoader would wrap a raised one in text."""

    error: Exception


_END = object()


class _Parcel:
    """A batch on its way from a worker, pickled in the worker's main thread and unpickled without an exception.

    DataLoader would pickle it in a thread of the worker, which drops a batch that it cannot send, and unpickle it in a
    thread of the main process, which dies of a batch that it cannot receive.
    """

    def __init__(self, batch: Any) -> None:
        self._content = bytes(ForkingPickler.dumps(batch))

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return _unpacked, (self._content,)


def _unpacked(content: bytes) -> Any:
    try:
        return ForkingPickler.loads(content)
    except (OSError, EOFError, RuntimeError) as error:
        return _Failed(error)


class _Maker(Dataset[Any]):
    """Dataset whose items are batches; runs in the workers."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, task: Any) -> Any:
        return self.__getitems__(task)

    def __getitems__(self, task: Any) -> Any:
        worker = get_worker_info()
        try:
            batch = self._make(task)
            return batch if worker is None else _Parcel(batch)
        except UserError as error:
            return _Failed(error)
        except (OSError, RuntimeError) as error:
            if worker is None or _remedy(error, worker.num_workers) is None:
                raise
            return _Failed(error)


class _Processes(_MultiProcessingDataLoaderIter):
    """DataLoader's workers, except that they end at once."""

    _shutdown = True  # until there is something to end: a failure before that must not cause a second one

    def __init__(self, loader: "_Loader") -> None:
        loader.processes = self  # set while it still starts, for the watch
        self._workers: list[Any] = []
        self._owner = os.getpid()
        try:
            super().__init__(loader)
        except BaseException:
            self._shutdown_workers()
            raise

    def _shutdown_workers(self) -> None:
        # DataLoader asks its workers to end, waits five seconds for each in turn, and then sends a SIGTERM. A stopped
        # worker would stay, and the interpreter would wait for it on exit.
        if self._shutdown or os.getpid() != self._owner:  # a forked process has a copy of this object
            return
        self._shutdown = True
        for worker in self._workers:
            worker.kill()
        until = time.monotonic() + FAREWELL
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()))
            if worker.is_alive():
                process._children.discard(worker)  # type: ignore[attr-defined]
        if hasattr(self, "_pin_memory_thread"):
            self._pin_memory_thread_done_event.set()
            self._worker_result_queue.put((None, None))  # wakes the thread
            self._pin_memory_thread.join(FAREWELL)
        for queue in (self._worker_result_queue, *self._index_queues):
            queue.cancel_join_thread()
            queue.close()
        if self._worker_pids_set:
            _remove_worker_pids(id(self))
            self._worker_pids_set = False


class _Loader(DataLoader[Any]):
    """DataLoader with our `_Processes`."""

    processes: _Processes | None = None

    def _get_iterator(self) -> _BaseDataLoaderIter:
        if self.num_workers == 0:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        return _Processes(self)


def _end_workers(loader: _Loader) -> None:
    processes, loader.processes, loader._iterator = loader.processes, None, None
    if processes is not None:
        processes._shutdown_workers()


def _unchanged(batch: Any) -> Any:
    """Collate nothing: `make` returns whole batches."""
    return batch


def _start_worker(_: int) -> None:
    # One thread per worker: the workers are the parallelism. Signals that ask to stop reach whole process groups, but
    # are meant for the main process: it finishes its step, and then ends the workers.
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # PyTorch's handlers print a line of their own; the main process explains why a worker died.
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)
    sys.excepthook = _end_worker


def _end_worker(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """End a worker whose thread for handing over tensors cannot open another connection.

    The thread would print the error and try again for ever, while the main process waits.
    """
    os._exit(LIMIT_REACHED + (getattr(error, "errno", None) or 0))
