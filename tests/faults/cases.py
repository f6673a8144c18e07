"""A case of the campaign: a tiny run of one method, the faults it meets, and the state it must end in."""

import json
import random
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.faults.commands import Anew, Command, Failure, Starter, alive, check_said, end_all, until

STEPS = 10
WHOLE = 300.0
"""Seconds allowed for an undisturbed command; it takes two or three."""
SOON = 60.0
"""Seconds allowed for a command to end once it should. Generous, so that a loaded machine is no failure."""

SMALL = (
    *("--epochs", "2", "--batch-size", "8", "--set", "train.log_every=1", "--set", "selection.start=0"),
    *("--set", "data.shapes.train=40", "--set", "data.shapes.val=16", "--set", "data.shapes.size=32"),
)
TWO_HEADS = ("dino.head_hidden_dim=32", "ibot.head_hidden_dim=32")
OWN = {
    "dino": ("optim.warmup_epochs=1", "model.drop_path_rate=0.1", "model.head_hidden_dim=32"),
    "ibot": ("optim.warmup_epochs=1", "model.drop_path_rate=0.1", "model.head_hidden_dim=32"),
    "simclr": ("optim.warmup_epochs=1", "rescue.enabled=true"),
    "mocov3": ("optim.warmup_epochs=1", "model.mlp_dim=64"),
    "dinov2": ("optim.warmup_epochs=1", "model.drop_path_rate=0.3", *TWO_HEADS),
}
"""Settings that a `tiny` preset needs for so short a run, and ones that draw random numbers in a step."""

ABOUT = ("format", "version", "versions", "method", "config")
"""Entries of a checkpoint that describe the run rather than the state of training."""


def arguments_of(method: str) -> list[str]:
    """Return the command line of a run of ten steps, without its folder."""
    own = [word for value in OWN.get(method, ()) for word in ("--set", value)]
    return ["pretrain", method, "--preset", "tiny", *SMALL, *own]


@dataclass
class Case:
    """One case."""

    seed: int
    method: str
    folder: Path
    """Folder of this case; removed if it passes."""
    reference: Path
    """Folder of the same run without a fault."""
    zygote: Starter
    choose: random.Random = field(init=False)
    """Generator for every random choice of the case."""
    save_every: int = field(init=False)
    notes: list[str] = field(default_factory=list)
    """Steps so far, for the report."""

    def __post_init__(self) -> None:
        self.choose = random.Random(self.seed)
        self.save_every = self.choose.choice([1, 1, 2, 3])
        self.folder.mkdir(parents=True)

    @property
    def out(self) -> Path:
        return self.folder / "run"

    @property
    def finished(self) -> bool:
        """Whether the last step is logged and nothing is left to disturb."""
        return rows_in(self.out) >= STEPS

    def note(self, what: str) -> None:
        """Note a step for the report."""
        self.notes.append(what)

    def train(self, *, workers: int | None = None, anew: bool = False, **surroundings: Any) -> Command:
        """Start the run, or resume it.

        Args:
            workers: number of loader processes; drawn if not given.
            anew: start a new process, which has its imports still to do.
            surroundings: `disk` and `limits` for `Zygote.start()`.
        """
        workers = self.choose.choice([0, 1, 2]) if workers is None else workers
        if (self.out / "run.json").exists() and self.choose.random() < 0.5:
            words = ["resume", str(self.out), "--workers", str(workers)]
        else:
            words = [*arguments_of(self.method), "--save-every", str(self.save_every), "--workers", str(workers)]
            words += ["--out", str(self.out), "--resume"]
        return self.start(words, anew=anew, **surroundings)

    def start(self, words: list[str], *, anew: bool = False, **surroundings: Any) -> Command:
        """Start any `hvp` command, with its own log."""
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}.log"
        self.note(f"{'process' if anew else 'fork'} {log.name}: hvp {words[0]} {' '.join(words[-4:])} {surroundings}")
        return Anew(words, log) if anew else self.zygote.start(words, log, **surroundings)

    def moment(self, command: Command) -> bool:
        """Wait for a random moment of a run, before its first step or in a later one; return False if it is over."""
        before = rows_in(self.out)
        rows = self.choose.randrange(before, STEPS) if before < STEPS else before
        pause = self.choose.uniform(0, 0.5 if rows == before else 0.1)
        until(lambda: rows_in(self.out) >= rows or command.wait(0) is not None, WHOLE)
        time.sleep(pause)
        over = command.wait(0) is not None
        self.note(f"{pause:.3f} s after step {rows}{', which was too late' if over else ''}")
        return not over

    def ended(
        self, command: Command, codes: Collection[int], seconds: float = SOON, *, workers_end: bool = True
    ) -> int:
        """Wait for a command to end, and check that it ends cleanly.

        Args:
            command: the command.
            codes: allowed exit codes.
            seconds: time allowed.
            workers_end: also require that no process of it is left running.

        Returns:
            The exit code.

        Raises:
            Failure: it hangs, has another exit code, or prints a traceback.
        """
        try:
            code = command.wait(seconds)
            if code is None:
                raise Failure(f"{command.log.name}: still running after {seconds:.0f} s")
            self.note(f"{command.log.name}: code {code}")
            check_said(command.log)
            if code not in codes:
                raise Failure(f"{command.log.name}: code {code}, not one of {sorted(codes)}")
            if workers_end and not until(lambda: not alive(command.pid), SOON):
                raise Failure(f"{command.log.name}: processes of it were left running")
            return code
        finally:
            end_all(command.pid)
            command.wait(SOON)

    def finish(self) -> None:
        """Resume to the end, undisturbed, and compare with the reference.

        Raises:
            Failure: it does not end cleanly, or differs from the run without a fault.
        """
        self.ended(self.train(), {0}, WHOLE)
        self.compare()

    def compare(self) -> None:
        """Compare every tensor of the checkpoint bit for bit, and every step's loss, logged once.

        Raises:
            Failure: something differs.
        """
        ours, theirs = (dict(tensors(folder / "last.pt")) for folder in (self.out, self.reference))
        if missing := [path for path in theirs if path not in ours]:
            raise Failure(f"last.pt lacks {', '.join(missing[:5])}")
        if differing := [path for path, value in theirs.items() if not torch.equal(value, ours[path])]:
            raise Failure(f"{len(differing)} tensors differ from those of the undisturbed run: {differing[:5]}")
        logged = [[(row["step"], row["loss"]) for row in rows_of(folder)] for folder in (self.out, self.reference)]
        if logged[0] != logged[1]:
            raise Failure(f"metrics.jsonl differs from that of the undisturbed run: {logged[0]}, not {logged[1]}")

    def clear(self) -> None:
        """Remove the case's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def rows_in(out: Path) -> int:
    """Return the number of steps a run has logged so far."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint that training changes, with their places."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    yield from _tensors({key: value for key, value in content.items() if key not in ABOUT}, "")


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _tensors(item, f"{path}/{number}")
