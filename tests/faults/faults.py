"""Faults. Each starts or resumes a run, strikes at a randomly drawn moment, and checks how the run ends.

    fault                              exit code    what is left
    ---------------------------------  -----------  ---------------------------------------
    SIGKILL, also inside a write       -9           a whole checkpoint, or none yet
    SIGTERM, SIGINT, SIGUSR1           143 130 75   the checkpoint of the step in progress
    SIGINT twice                       130          a whole checkpoint, or none yet
    SIGHUP                             -1           a whole checkpoint, or none yet
    SIGSTOP, SIGCONT                   0            the run continues
    a worker killed                    2            the last good checkpoint
    a worker stopped, then a signal    143 130      a checkpoint
    a full disk                        2            the last good checkpoint
    a damaged checkpoint               0, or 2      previous.pt takes its place, or both are kept
    an absurd number in the            0, or 2      nothing, or a run that stops on a signal
    configuration

A signal that arrives before a run has installed its handlers ends the process with minus the signal's number.
"""

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.faults.cases import SOON, WHOLE, Case, arguments_of
from tests.faults.commands import Command, Failure, children, send, until

Fault = Callable[[Case], None]


def kill(case: Case) -> None:
    """SIGKILL."""
    _signalled(case, case.train(anew=case.choose.random() < 0.2), signal.SIGKILL, {-signal.SIGKILL})


def kill_in_write(case: Case) -> None:
    """SIGKILL in the middle of a write; half of it reaches the disk."""
    size = sum(file.stat().st_size for file in case.reference.glob("last.pt"))
    after = int(case.choose.uniform(0, 4) * size)
    case.note(f"dies after {after} bytes")
    command = case.train(disk={"folder": str(case.out), "dies_after": after})
    case.ended(command, {0, -signal.SIGKILL}, WHOLE, workers_end=False)


def kill_on_slow_disk(case: Case) -> None:
    """SIGKILL on a disk so slow that most of the time goes into writing."""
    _signalled(case, case.train(disk=_slow(case)), signal.SIGKILL, {-signal.SIGKILL})


def sigterm(case: Case) -> None:
    """SIGTERM."""
    _signalled(case, case.train(disk=_maybe_slow(case)), signal.SIGTERM, {143, -signal.SIGTERM})


def sigint(case: Case) -> None:
    """SIGINT."""
    _signalled(case, case.train(disk=_maybe_slow(case)), signal.SIGINT, {130})


def sigint_twice(case: Case) -> None:
    """SIGINT, and a second one soon after."""
    command = case.train(disk=_maybe_slow(case))
    if case.moment(command):
        send(command.pid, signal.SIGINT)
        pause = case.choose.choice([0.0, case.choose.uniform(0, 0.1)])
        time.sleep(pause)
        send(command.pid, signal.SIGINT)
        case.note(f"SIGINT twice, {pause:.3f} s apart")
    case.ended(command, {0, 130})


def sigusr1(case: Case) -> None:
    """SIGUSR1."""
    _signalled(case, case.train(anew=case.choose.random() < 0.2), signal.SIGUSR1, {75, -signal.SIGUSR1})


def sighup(case: Case) -> None:
    """SIGHUP."""
    _signalled(case, case.train(), signal.SIGHUP, {129, -signal.SIGHUP})


def stop_and_continue(case: Case) -> None:
    """SIGSTOP, then SIGCONT soon after."""
    command = case.train()
    if case.moment(command):
        send(command.pid, signal.SIGSTOP)
        time.sleep(case.choose.uniform(0, 0.3))
        send(command.pid, signal.SIGCONT)
    case.ended(command, {0}, WHOLE)


def worker_killed(case: Case) -> None:
    """SIGKILL to a loader worker."""
    command = case.train(workers=case.choose.choice([1, 2]))
    if (worker := _worker(case, command)) is not None:
        send(worker, signal.SIGKILL)
    case.ended(command, {0, 2})


def worker_stopped(case: Case) -> None:
    """SIGSTOP to a loader worker, then a signal to the run, which waits for that worker."""
    number, code = case.choose.choice([(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 75)])
    command = case.train(workers=case.choose.choice([1, 2]))
    if (worker := _worker(case, command)) is not None:
        send(worker, signal.SIGSTOP)
        time.sleep(case.choose.uniform(0, 1))
        send(command.pid, number)
        case.note(f"worker stopped, then {number.name}")
    case.ended(command, {0, code, -number})


def full_disk(case: Case) -> None:
    """No space is left on the disk."""
    size = sum(file.stat().st_size for file in case.reference.glob("last.pt"))
    after = int(case.choose.uniform(0, 4) * size)
    case.note(f"full after {after} bytes")
    case.ended(case.train(disk={"folder": str(case.out), "full_after": after}), {0, 2}, WHOLE)


def largest_file(case: Case) -> None:
    """Files may not grow beyond a limit (`ulimit -f`)."""
    size = sum(file.stat().st_size for file in case.reference.glob("last.pt"))
    # workers share their batches through files in memory, and the limit would apply to those too
    case.ended(case.train(workers=0, limits={"FSIZE": int(case.choose.uniform(0, 1) * size)}), {0, 2}, WHOLE)


def ctrl_c_at_the_start(case: Case) -> None:
    """SIGINT, sometimes twice, in the first seconds of a new process, while it still imports."""
    command = case.train(anew=True)
    pause = case.choose.uniform(0.05, 4)
    time.sleep(pause)
    send(command.pid, signal.SIGINT)
    if case.choose.random() < 0.3:
        time.sleep(case.choose.uniform(0, 0.3))
        send(command.pid, signal.SIGINT)
    case.note(f"SIGINT {pause:.3f} s after Python's start")
    case.ended(command, {0, 130})


def damaged_checkpoint(case: Case) -> None:
    """A stopped run whose last checkpoint is damaged, and perhaps the one before as well."""
    case.save_every = 1
    command = case.train()
    until(lambda: (case.out / "previous.pt").exists() or command.wait(0) is not None, WHOLE)
    case.moment(command)
    send(command.pid, signal.SIGTERM)
    case.ended(command, {0, 143, -signal.SIGTERM})  # -SIGTERM if it arrives after the last step
    last, previous = case.out / "last.pt", case.out / "previous.pt"
    damaged = [last]
    if case.choose.random() < 0.3 and previous.exists():
        damaged.append(previous)
    before = {path: path.read_bytes() for path in damaged}
    kind = case.choose.choice(list(DAMAGES))
    for path in damaged:
        DAMAGES[kind](path, case.choose)
    case.note(f"{kind}: {', '.join(path.name for path in damaged)}")
    if len(damaged) == 1 and previous.exists():
        return  # the run must resume from the other
    left = {path: path.read_bytes() for path in damaged if path.exists()}
    # code 0: a flipped bit may lie in unused bytes
    code = case.ended(case.train(), {0, 2}, WHOLE)
    if code == 2 and any(path.read_bytes() != content for path, content in left.items()):
        raise Failure("a damaged checkpoint was replaced")
    if code == 2:
        for path, content in before.items():
            path.write_bytes(content)


def evaluation(case: Case) -> None:
    """A k-NN evaluation is interrupted; the next one finds the figures of an undisturbed one."""
    case.out.mkdir()
    for name in ("last.pt", "config.yaml", "run.json"):
        (case.out / name).write_bytes((case.reference / name).read_bytes())
    workers = case.choose.choice([1, 2])
    result = case.folder / "knn.json"
    words = knn_arguments(case.out, workers=workers, result=result)
    strike = case.choose.choice(["SIGINT", "SIGTERM", "SIGKILL", "SIGHUP", "worker"])
    command = case.start(words)
    time.sleep(case.choose.uniform(0, 1.5))
    if strike == "worker":
        until(lambda: bool(children(command.pid)) or command.wait(0) is not None, WHOLE)
        for worker in children(command.pid)[:1]:
            send(worker, signal.SIGKILL)
        codes = {0, 2}
    else:
        number = signal.Signals[strike]
        send(command.pid, number)
        codes = {0, 128 + number, -number}
    case.note(f"eval: {strike}")
    case.ended(command, codes, workers_end=strike not in ("SIGKILL", "SIGHUP"))
    result.unlink(missing_ok=True)
    case.ended(case.start(words), {0}, WHOLE)
    if _figures(result) != _figures(case.reference / "knn.json"):
        raise Failure(f"the evaluation finds {_figures(result)}, not {_figures(case.reference / 'knn.json')}")


def knn_arguments(run: Path, *, workers: int, result: Path) -> list[str]:
    """Return the command line of an evaluation."""
    words = ["eval", "knn", str(run), "--data", "shapes", "--batch-size", "8", "--k", "5"]
    return [*words, "--workers", str(workers), "--out", str(result)]


def absurd_value(case: Case) -> None:
    """One number of the configuration has any size: the run refuses it, or trains and stops on a signal."""
    numbers = dict(_numbers(yaml.safe_load((case.reference / "config.yaml").read_text())))
    key = case.choose.choice(sorted(numbers))
    number = _any_number(case.choose)
    value: float | list[float] = number
    if isinstance(numbers[key], list):
        value = sorted([number, case.choose.choice([number, _any_number(case.choose)])])
    words = [*arguments_of(case.method), "--workers", "0", "--out", str(case.out), "--set", f"{key}={value}"]
    command = case.start(words, limits={"AS": 4 << 30})
    if command.wait(5) is None:
        send(command.pid, signal.SIGTERM)
    case.ended(command, {0, 2, 143, -signal.SIGTERM})


def flip_bit(path: Path, choose: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    path.write_bytes(content)


def zero_block(path: Path, choose: random.Random) -> None:
    """Zero a block of the disk."""
    content = bytearray(path.read_bytes())
    start = choose.randrange(len(content)) // 4096 * 4096
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    path.write_bytes(content)


def truncate(path: Path, choose: random.Random) -> None:
    """Cut off the end."""
    content = path.read_bytes()
    path.write_bytes(content[: choose.randrange(len(content))])


def empty(path: Path, choose: random.Random) -> None:
    """Leave an empty file."""
    path.write_bytes(b"")


def noise(path: Path, choose: random.Random) -> None:
    """Replace the content with random bytes."""
    path.write_bytes(choose.randbytes(10_000))


def remove(path: Path, choose: random.Random) -> None:
    """Delete the file."""
    path.unlink()


DAMAGES = {damage.__name__: damage for damage in (flip_bit, flip_bit, zero_block, truncate, empty, noise, remove)}

IN_TRAINING: tuple[Fault, ...] = (
    *(kill, kill_in_write, kill_on_slow_disk, sigterm, sigint, sigint_twice, sigusr1, sighup, stop_and_continue),
    *(worker_killed, worker_stopped, full_disk, largest_file, ctrl_c_at_the_start, damaged_checkpoint),
)
FAULTS: tuple[Fault, ...] = (*IN_TRAINING, evaluation, absurd_value)


def _signalled(case: Case, command: Command, number: signal.Signals, codes: set[int]) -> None:
    if case.moment(command):
        send(command.pid, number)
    case.ended(command, {0, *codes}, SOON, workers_end=number not in (signal.SIGKILL, signal.SIGHUP))


def _numbers(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a configuration whose values are numbers or pairs of numbers."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | list) and not isinstance(value, bool):
            yield prefix + key, value


def _any_number(choose: random.Random) -> float:
    whole = choose.choice([0, -1, 1, 2, 3, 5, 2 ** choose.randrange(80), 10 ** choose.randrange(26)])
    return choose.choice([whole, whole, float(whole), 10.0 ** choose.randint(-300, 300), choose.random()])


def _slow(case: Case) -> dict[str, object]:
    return {"folder": str(case.out), "delay": case.choose.uniform(0.0005, 0.005)}


def _maybe_slow(case: Case) -> dict[str, object] | None:
    return _slow(case) if case.choose.random() < 0.3 else None


def _worker(case: Case, command: Command) -> int | None:
    """Wait for a randomly drawn moment and return one of the run's workers, or None if the run is over."""
    if not case.moment(command):
        return None
    until(lambda: bool(children(command.pid)) or command.wait(0) is not None, WHOLE)
    workers = children(command.pid)
    return case.choose.choice(workers) if workers else None


def _figures(path: Path) -> object:
    return json.loads(path.read_text())["results"]
