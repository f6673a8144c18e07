"""Tiny runs: their configurations, batches and logs, and events in the middle of a step."""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from rich.console import Console

from hvp.common.config.resolving import read_yaml, resolve
from hvp.common.config.sections import RunConfig
from hvp.common.training.checkpoint import load_checkpoint
from hvp.common.training.loading import Masks, build_loader, open_training_data
from hvp.common.training.run import Run
from hvp.common.views import ViewBatch
from hvp.methods import get_method, get_preset

ConfigT = TypeVar("ConfigT", bound=RunConfig)

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "data.workers": 0,
    "data.shapes.size": 32,
    "train.batch_size": 8,
    "train.log_every": 1,
    "selection.start": 0.0,
}
"""Values that a run of a few steps takes on top of the `tiny` preset."""

ABOUT = {"format", "version", "versions", "method", "config"}
"""Entries of a checkpoint that describe the run rather than the state of training."""
CLOCK = {"seconds", "images_per_s", "wait_share", "select_share", "peak_memory"}
"""Values of the log that depend on the machine."""


def tiny(config_class: type[ConfigT], method: str, *layers: Mapping[str, Any], **values: Any) -> ConfigT:
    """Return the `tiny` preset with layers of dotted keys on top; in keywords, `__` stands for a key's dot."""
    given = {key.replace("__", "."): value for key, value in values.items()}
    named: list[tuple[str, Mapping[str, Any]]] = [("preset", read_yaml(get_preset(method, "tiny")))]
    named += [("test", layer) for layer in (*layers, given)]
    config: ConfigT = resolve(config_class, named).config
    return config


def first_batch(config: RunConfig, masks: Masks | None = None) -> ViewBatch:
    """Return the first batch of a run on the CPU."""
    (batch,) = next(build_loader(config, open_training_data(config), CPU, masks=masks).epoch(0))
    return batch


@dataclass(frozen=True)
class Trained:
    """A finished run: its folder and what it printed."""

    out: Path
    said: str

    @cached_property
    def checkpoint(self) -> dict[str, Any]:
        """The last checkpoint."""
        return load_checkpoint(self.out / "last.pt")

    @property
    def state(self) -> dict[str, Any]:
        """Everything in the checkpoint that training changes."""
        return {key: part for key, part in self.checkpoint.items() if key not in ABOUT}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the log, without time and memory."""
        return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows_of(self.out)]


def train(method: str, config: RunConfig, out: Path, **options: Any) -> Trained:
    """Train on this process."""
    said = io.StringIO()
    path = get_method(method).train(config, out, console=Console(file=said, width=200), **options)
    assert path == out / "last.pt"
    return Trained(out, said.getvalue())


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def at_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Call `act` while this step (counted from 1) is in progress, before it is recorded."""
    record = Run.record

    def recording(run: Run, **values: Any) -> None:
        if run.step + 1 == step:
            act()
        record(run, **values)

    patch.setattr(Run, "record", recording)


def constant_batch_norm(norm: torch.nn.BatchNorm1d) -> None:
    """Initialise a batch norm to map everything to ones; in place of `reset_parameters()` it collapses a projector."""
    norm.reset_running_stats()
    if norm.affine:
        torch.nn.init.zeros_(norm.weight)
        torch.nn.init.ones_(norm.bias)


class Killed(Exception):
    """An exception that no trainer handles."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Expect the run in the block to end abruptly while this step is in progress."""

    def kill() -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, kill)
        with pytest.raises(Killed):
            yield
