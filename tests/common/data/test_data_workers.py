"""Every wait for a worker ends, and every failure gives one message with a remedy."""

import ctypes
import errno
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import numpy as np
import pytest
import torch

from hvp.common.data import workers
from hvp.common.data.workers import Batches, Hanging, NoBatch, WaitInterrupted, WatchedSource, shared_empty
from hvp.common.errors import UserError
from hvp.common.evaluation.features import extract

COUNT, BATCH = 12, 4


class Pictures:
    """An ImageSource whose pixels are the image's number; calls `on_read` with each number."""

    classes, name = None, "pictures"

    def __init__(self, on_read: Callable[[int], object] = lambda index: None) -> None:
        self.on_read = on_read

    def __len__(self) -> int:
        return COUNT

    def read(self, index: int) -> np.ndarray:
        self.on_read(index)
        return np.full((2, 2, 3), index, dtype=np.uint8)

    def labels(self) -> None:
        return None

    def describe(self, index: int) -> str:
        return f"picture {index}"


class Stacked:
    """Make a batch of pictures, in a worker."""

    def __init__(self, source: WatchedSource) -> None:
        self.source = source

    def __call__(self, indices: range) -> torch.Tensor:
        batch = shared_empty((len(indices), 64, 64, 3), torch.uint8)
        for row, index in enumerate(indices):
            batch[row] = int(self.source.read(index)[0, 0, 0])
        return batch


def batches_of(
    on_read: Callable[[int], object] = lambda index: None, *, num_workers: int = 1, **options
) -> Batches[torch.Tensor]:
    source = WatchedSource(Pictures(on_read), num_workers)
    tasks = [range(start, start + BATCH) for start in range(0, COUNT, BATCH)]
    return Batches(Stacked(source), tasks, source, workers=num_workers, **options)


def values(batches: Iterable[torch.Tensor]) -> list[int]:
    return [value for batch in batches for value in batch[:, 0, 0, 0].tolist()]


def only_worker(batches: Batches[torch.Tensor]) -> int:
    """Return the process id of the worker."""
    processes = batches._loader.processes
    assert processes is not None
    (worker,) = processes._workers
    return worker.pid


@pytest.fixture(autouse=True)
def _frequent_checks(monkeypatch):
    monkeypatch.setattr(workers, "TICK", 0.1)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    others = set(multiprocessing.active_children())
    before = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGCHLD)
    yield
    assert set(multiprocessing.active_children()) <= others
    assert (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGCHLD)) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def stop_at_five(index: int) -> None:
    if index == 5:
        os.kill(os.getpid(), signal.SIGSTOP)


def hang_at_five(index: int) -> None:
    if index == 5:
        time.sleep(600)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_come_in_order_in_every_pass(num_workers):
    batches = batches_of(num_workers=num_workers)
    for _ in range(2):
        assert values(batches.one_pass()) == list(range(COUNT))
    batches.close()


@pytest.mark.parametrize(
    ("hang", "num_workers", "message"),
    [
        (stop_at_five, 1, r"loader worker \d+ \(stopped\), whose last image is picture 5"),
        (hang_at_five, 2, r"loader worker \d+, whose last image is picture 5"),
        (hang_at_five, 0, "The last image begun is picture 5"),
    ],
)
def test_a_hanging_reader_is_named_and_ended(hang, num_workers, message):
    batches = batches_of(hang, num_workers=num_workers, timeout=1)
    with pytest.raises(Hanging, match=rf"No image was read for 1 seconds. .*{message}"):
        values(batches.one_pass())


@pytest.mark.parametrize(("hang", "num_workers"), [(stop_at_five, 1), (hang_at_five, 1), (hang_at_five, 0)])
def test_a_wait_can_be_stopped(hang, num_workers):
    began = time.monotonic()
    with pytest.raises(WaitInterrupted):
        values(batches_of(hang, num_workers=num_workers, timeout=0).one_pass(lambda: time.monotonic() > began + 0.5))


def test_a_worker_may_be_stopped_before_its_batch_is_fetched():
    """A connection to the worker opens, but gets no answer."""
    batches = batches_of(timeout=1)
    one_pass = batches.one_pass()
    next(one_pass)
    time.sleep(0.5)  # the worker makes the next batches
    os.kill(only_worker(batches), signal.SIGSTOP)
    with pytest.raises(Hanging, match=r"\(stopped\)"):
        values(one_pass)


def test_a_slow_batch_is_not_a_hang():
    batches = batches_of(lambda index: time.sleep(0.4), timeout=1)
    assert values([next(batches.one_pass())]) == [0, 1, 2, 3]
    batches.close()


def test_a_forked_process_leaves_the_workers_alone():
    batches = batches_of()
    one_pass = batches.one_pass()
    next(one_pass)
    child = multiprocessing.get_context("fork").Process(target=batches.close)
    child.start()
    child.join()
    assert values(one_pass) == list(range(BATCH, COUNT))
    batches.close()


def test_the_callers_timer_keeps_running():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        values(batches_of(num_workers=0).one_pass())
        assert not rang
        time.sleep(0.3)
        assert rang
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("moment", ["before the next pass", "before its batch is fetched"])
def test_a_dead_worker_is_explained(moment):
    batches = batches_of()
    one_pass = batches.one_pass()
    if moment == "before the next pass":
        values(one_pass)
        one_pass = batches.one_pass()
    else:
        next(one_pass)
        time.sleep(0.3)
    pid = only_worker(batches)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(NoBatch, match=rf"process {pid} was killed by SIGKILL.*(\n.*)*--workers, now 1"):
        values(one_pass)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGBUS, "killed by SIGBUS. .*picture 5.\n.*shm-size"),
        (signal.SIGSEGV, "killed by SIGSEGV. .*picture 5."),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_crash_names_the_image_and_prints_nothing_else(number, message, capfd):
    def crash_at_five(index: int) -> None:
        if index == 5:
            os.kill(os.getpid(), number)

    with pytest.raises(NoBatch, match=message):
        values(batches_of(crash_at_five).one_pass())
    assert capfd.readouterr().err == ""


def confined(limit: Callable[[], object], act: Callable[[], object]) -> str:
    """Run `act` in a process whose resources `limit` restricts; return the message of its error."""
    ours, theirs = multiprocessing.Pipe()

    def body() -> None:
        try:
            limit()
        except PermissionError:
            theirs.send(None)
            return
        try:
            act()
            theirs.send("nothing")
        except UserError as error:
            theirs.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    try:
        assert ours.poll(60), "hangs"
        message = ours.recv()
    finally:
        process.kill()
        process.join()
    if message is None:
        pytest.skip("needs the right to mount")
    return message


def shared_memory(options: str) -> Callable[[], None]:
    def limit() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x00020000):  # CLONE_NEWNS
            raise PermissionError(ctypes.get_errno(), "unshare")
        for command in ("mount --make-rprivate /", f"mount -t tmpfs -o {options} tmpfs /dev/shm"):
            if subprocess.run(command.split(), capture_output=True).returncode:
                raise PermissionError("mount")

    return limit


def files(number: int) -> Callable[[], None]:
    """Let a process open only this many more files."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        opened = []
        with suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        for file in opened[len(opened) - number :]:
            os.close(file)

    return limit


def read() -> None:
    values(batches_of(num_workers=2).one_pass())


def evaluate() -> None:
    extract(torch.nn.Flatten(), Pictures(), resolution=64, batch_size=BATCH, workers=2)


@pytest.mark.parametrize("act", [read, evaluate])
@pytest.mark.parametrize("options", ["size=4k", "size=64k", "ro"])
def test_too_little_shared_memory(options, act, capfd):
    message = confined(shared_memory(options), act)
    assert message.startswith("A loader worker failed")
    assert "make /dev/shm writable and larger (in a container: --shm-size" in message
    assert "Traceback" not in message + capfd.readouterr().err


@pytest.mark.parametrize("number", [2, 10, 15])
def test_too_few_open_files(number, capfd):
    """The limit is reached at the start, or later by batches that are kept."""

    def keep() -> None:
        source = WatchedSource(Pictures(), 2)
        tasks = [range(index, index + 1) for index in range(COUNT)]
        list(Batches(Stacked(source), tasks, source, workers=2).one_pass())

    message = confined(files(number), keep)
    assert message.startswith("A loader worker failed")
    assert "Allow more open files (`ulimit -n`, now" in message
    assert "Traceback" not in message + capfd.readouterr().err


def no_more(*_: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("limit", [files(0), lambda: setattr(socket.socket, "accept", no_more)])
def test_too_few_open_files_in_a_worker(limit, capfd):
    """The worker cannot pack a batch, or cannot hand one over."""
    with pytest.raises(NoBatch, match=r"Too many open files\n.*ulimit -n"):
        values(batches_of(lambda index: index != 5 or limit(), timeout=5).one_pass())
    assert capfd.readouterr().err == ""
