"""Checkpoints: written whole or not at all, checked and read without executing anything."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from hvp.common.data import ShapesOptions
from hvp.common.errors import UserError
from hvp.common.training.archive import DamagedCheckpoint, read_archive, save_sealed

FORMAT = "hvp-checkpoint"
VERSION = 1


class Entry(BaseModel):
    """An entry of a checkpoint. Entries of its own that it does not name are left alone."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def _random_state(value: Tensor) -> Tensor:
    if value.dtype != torch.uint8 or value.ndim != 1:
        raise ValueError(f"is no generator's state, but {value.dtype} {list(value.shape)}")
    return value


RandomState = Annotated[Tensor, AfterValidator(_random_state)]


class Progress(Entry):
    """Loss since the log's last row, and since the epoch's start."""

    loss_sum: float
    loss_count: int = Field(ge=0)
    epoch_loss_sum: float = 0.0
    """Not in checkpoints of early versions, as the next."""
    epoch_loss_count: int = Field(0, ge=0)


class Stream(Entry):
    """A process's random numbers, and the images that it replaced."""

    torch: RandomState
    cuda: RandomState | None
    skipped: list[str]


class ScalerState(Entry):
    """fp16's gradient scaler."""

    scale: float = Field(gt=0)
    growth_factor: float = Field(gt=0)
    backoff_factor: float = Field(gt=0)
    growth_interval: int = Field(ge=1)
    growth_tracker: int = Field(ge=0, alias="_growth_tracker")


class NoScaler(Entry):
    """The place of a gradient scaler's state without fp16."""

    model_config = ConfigDict(extra="forbid")


class PrecisionState(Entry):
    scaler: ScalerState | NoScaler
    skipped_steps: int = Field(ge=0)


class Group(Entry):
    """Parameters with hyperparameters of their own."""

    params: list[int]
    lr: float
    weight_decay: float


class OptimizerState(Entry):
    state: dict[int, dict[str, Any]]
    param_groups: list[Group]

    @model_validator(mode="after")
    def _of_its_parameters(self) -> "OptimizerState":
        known = {number for group in self.param_groups for number in group.params}
        if strange := sorted(self.state.keys() - known):
            raise ValueError(f"state of parameter {strange[0]}, which is in no group")
        names = {frozenset(moments) for moments in self.state.values()}
        if len(names) > 1:
            raise ValueError(f"a state that lacks {', '.join(sorted(frozenset.union(*names) - min(names, key=len)))}")
        return self


class Images(Entry):
    """The images of a run."""

    name: str
    """Folder and number of images, for messages."""
    images: int = Field(ge=1)


class Views(Entry):
    global_crops_size: int | None = Field(None, ge=1)
    crop_size: int | None = Field(None, ge=1)


class Data(Entry):
    shapes: ShapesOptions = ShapesOptions()


class Config(Entry):
    """A configuration: sections, and of their values those that are read without its method's class."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]] = Field(init=False)

    views: Views = Views()
    data: Data = Data()


class Header(Entry):
    """Entries that every reader of a checkpoint relies on."""

    method: str
    config: Config
    step: int = Field(ge=0)
    epoch: int = Field(ge=0)


class Content(Header):
    """Further entries that a resume relies on; networks and losses are checked by whoever loads them."""

    steps_per_epoch: int = Field(ge=1)
    log: Progress
    processes: list[Stream]
    precision: PrecisionState
    optimizer: OptimizerState
    versions: dict[str, str]
    data: Images | None = None
    """Not in checkpoints of early versions."""

    @model_validator(mode="after")
    def _epochs_of_steps(self) -> "Content":
        if self.epoch != self.step // self.steps_per_epoch:
            raise ValueError(f"epoch {self.epoch} at step {self.step}, with {self.steps_per_epoch} steps per epoch")
        return self


def write_atomically(path: Path, write: Any, previous: Path | None = None) -> None:
    """Calls `write(file)` on a file beside `path`, then renames it: readers see the old content or the new one.

    Args:
        path: the file.
        write: writes to an open binary file.
        previous: where the old content goes. At every moment one of the two names stands for a whole file.

    Raises:
        UserError: the folder cannot be written, or the disk is full; what stood at `path` is still there.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(beside)):
                raise UserError(f"{path}: cannot be written: {path.parent} was replaced by another folder meanwhile")
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        kept = f" The previous {path.name} is intact." if path.exists() else ""
        raise UserError(f"{path}: cannot be written: {_reason(error)}.{kept}") from error


def _reason(error: BaseException) -> str:
    """What the operating system said. torch.save raises a RuntimeError of its own after the OSError of a full disk."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)


def save_checkpoint(path: Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """Writes tensors, numbers, text and containers of these, atomically, with the format's name and version; the
    checkpoint that stood there becomes `previous`."""
    whole = {"format": FORMAT, "version": VERSION, **content}
    write_atomically(path, lambda file: save_sealed(whole, file), previous)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads one of our checkpoints to the CPU, with `weights_only=True`, and checks it.

    Raises:
        DamagedCheckpoint: truncated, changed, or not a checkpoint of hvp; or it lacks something.
        UserError: missing, or of a version that this release does not know.
    """
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    content = read_archive(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path}: is not a checkpoint written by hvp")
    check_content(content, path)
    return content


def check_content(content: Mapping[Any, Any], path: Path, entries: type[Header] = Content) -> None:
    """Checks a checkpoint of ours after it was read.

    Args:
        content: of the file; its format is FORMAT.
        path: what messages call it.
        entries: those that the reader relies on, with their types.

    Raises:
        DamagedCheckpoint: entries are missing or of another type.
        UserError: of a version that this release does not know.
    """
    number = content.get("version")
    problems = []
    if type(number) is not int:
        problems.append("version is missing" if number is None else f"version is {type(number).__name__}, no number")
    elif number != VERSION:
        raise UserError(f"{path}: has format version {number}, but this hvp reads version {VERSION}")
    try:
        entries.model_validate(dict(content))
    except ValidationError as error:
        problems += [_said(details) for details in error.errors(include_url=False)]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DamagedCheckpoint(f"{path}: is damaged: {'; '.join(problems[:3])}{more}")


def _said(details: Any) -> str:
    """A part of a sentence for one of pydantic's errors."""
    place = ".".join(map(str, details["loc"]))
    if details["type"] == "missing":
        return f"{place} is missing"
    message = str(details["ctx"]["error"]) if details["type"] == "value_error" else details["msg"]
    return f"{place}: {message[0].lower()}{message[1:]}" if place else message


MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}
"""Numbers that an optimiser keeps for each that it trains."""


def checkpoint_bytes(config: Any, build_modules: Callable[[Any, torch.device], Sequence[nn.Module]]) -> int:
    """Bytes of the tensors in a checkpoint of a configuration, without the memory to train it: those of the modules,
    and the optimiser's moments of what has a gradient in them.

    Args:
        config: a method's, whose `optim.optimizer` is one of MOMENTS.
        build_modules: the method's, as in `hvp.methods.Method`.
    """
    meta = torch.device("meta")
    with meta:
        modules = build_modules(config, meta)
    trained = sum(p.numel() * p.element_size() for m in modules for p in m.parameters() if p.requires_grad)
    states = sum(t.numel() * t.element_size() for m in modules for t in m.state_dict().values())
    return states + MOMENTS[config.optim.optimizer] * trained
