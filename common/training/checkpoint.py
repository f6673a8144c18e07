"""Checkpoints: written atomically, checked, and read without executing anything."""

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
    """Base of a checkpoint's entries. Nested entries without a field here are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def _random_state(value: Tensor) -> Tensor:
    if value.dtype != torch.uint8 or value.ndim != 1:
        raise ValueError(f"is not a random generator's state, but {value.dtype} {list(value.shape)}")
    return value


RandomState = Annotated[Tensor, AfterValidator(_random_state)]


class Progress(Entry):
    """Sum and count of the loss since the log's last row, and since the epoch's start."""

    loss_sum: float
    loss_count: int = Field(ge=0)
    epoch_loss_sum: float = 0.0
    """Missing from checkpoints of early versions, like the next one."""
    epoch_loss_count: int = Field(0, ge=0)


class Stream(Entry):
    """Random generators of one process, and the images it skipped."""

    torch: RandomState
    cuda: RandomState | None
    skipped: list[str]


class ScalerState(Entry):
    """Gradient scaler, with fp16."""

    scale: float = Field(gt=0)
    growth_factor: float = Field(gt=0)
    backoff_factor: float = Field(gt=0)
    growth_interval: int = Field(ge=1)
    growth_tracker: int = Field(ge=0, alias="_growth_tracker")


class NoScaler(Entry):
    """Empty state of the gradient scaler, without fp16."""

    model_config = ConfigDict(extra="forbid")


class PrecisionState(Entry):
    """State of `Precision`."""

    scaler: ScalerState | NoScaler
    skipped_steps: int = Field(ge=0)


class Group(Entry):
    """Parameter group of an optimiser."""

    params: list[int]
    lr: float
    weight_decay: float


class OptimizerState(Entry):
    """State of an optimiser: the moments of each parameter, and the groups."""

    state: dict[int, dict[str, Any]]
    param_groups: list[Group]

    @model_validator(mode="after")
    def _state_fits_groups(self) -> "OptimizerState":
        known = {number for group in self.param_groups for number in group.params}
        if strange := sorted(self.state.keys() - known):
            raise ValueError(f"has state for parameter {strange[0]}, which is in no group")
        names = {frozenset(moments) for moments in self.state.values()}
        if len(names) > 1:
            raise ValueError(f"has a state without {', '.join(sorted(frozenset.union(*names) - min(names, key=len)))}")
        return self


class Images(Entry):
    """Training images of a run."""

    name: str
    """Folder and number of images, for messages."""

    images: int = Field(ge=1)


class Views(Entry):
    """Sizes of the views, pixels."""

    global_crops_size: int | None = Field(None, ge=1)
    crop_size: int | None = Field(None, ge=1)


class Data(Entry):
    """Options of the embedded dataset."""

    shapes: ShapesOptions = ShapesOptions()


class Config(Entry):
    """Configuration of a run, with the fields that are read without its method's class."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]] = Field(init=False)

    views: Views = Views()
    data: Data = Data()


class Header(Entry):
    """Entries that every reader of a checkpoint needs."""

    method: str
    config: Config
    step: int = Field(ge=0)
    epoch: int = Field(ge=0)


class Content(Header):
    """Entries that resuming needs; networks and losses are checked where they are loaded."""

    steps_per_epoch: int = Field(ge=1)
    log: Progress
    processes: list[Stream]
    precision: PrecisionState
    optimizer: OptimizerState
    versions: dict[str, str]
    data: Images | None = None
    """Missing from checkpoints of early versions."""

    @model_validator(mode="after")
    def _epoch_fits_step(self) -> "Content":
        if self.epoch != self.step // self.steps_per_epoch:
            raise ValueError(f"epoch {self.epoch} at step {self.step}, with {self.steps_per_epoch} steps per epoch")
        return self


def write_atomically(path: Path, write: Any, previous: Path | None = None) -> None:
    """Call `write(file)` on a file beside `path`, then rename it, so readers see either the old content or the new.

    Args:
        path: the file.
        write: writes to an open binary file.
        previous: new name of the old content. At least one of the two names always refers to a complete file.

    Raises:
        UserError: the folder cannot be written, or the disk is full; the old content of `path` is intact.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(beside)):
                raise UserError(f"{path}: cannot be written: another folder has replaced {path.parent}")
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        kept = f" The previous {path.name} is intact." if path.exists() else ""
        raise UserError(f"{path}: cannot be written: {_reason(error)}.{kept}") from error


def _reason(error: BaseException) -> str:
    """Return the operating system's message. After the OSError of a full disk, torch.save raises a RuntimeError."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)


def save_checkpoint(path: Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint atomically, with the format's name and version; an existing one is renamed to `previous`.

    Args:
        path: the file.
        content: tensors, numbers, strings and containers of these.
        previous: new name of an existing checkpoint at `path`.

    Raises:
        UserError: as `write_atomically()`.
    """
    whole = {"format": FORMAT, "version": VERSION, **content}
    write_atomically(path, lambda file: save_sealed(whole, file), previous)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint written by hvp to the CPU, with `weights_only=True`, and check it.

    Raises:
        DamagedCheckpoint: it is truncated, altered or incomplete, or hvp did not write it.
        UserError: it does not exist, or this release does not know its format version.
    """
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    content = read_archive(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path}: is not a checkpoint written by hvp")
    check_content(content, path)
    return content


def check_content(content: Mapping[Any, Any], path: Path, entries: type[Header] = Content) -> None:
    """Check the content of a checkpoint written by hvp.

    Args:
        content: as read from the file; its format is FORMAT.
        path: the file, for messages.
        entries: the entries that the reader needs, with their types.

    Raises:
        DamagedCheckpoint: entries are missing or have the wrong type.
        UserError: this release does not know the format version.
    """
    number = content.get("version")
    problems = []
    if type(number) is not int:
        problems.append(
            "version is missing" if number is None else f"version is {type(number).__name__}, not a whole number"
        )
    elif number != VERSION:
        raise UserError(f"{path}: has format version {number}, but this hvp reads version {VERSION}")
    try:
        entries.model_validate(dict(content))
    except ValidationError as error:
        problems += [_problem(details) for details in error.errors(include_url=False)]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DamagedCheckpoint(f"{path}: is damaged: {'; '.join(problems[:3])}{more}")


def _problem(details: Any) -> str:
    """Return one of Pydantic's errors as part of a sentence."""
    place = ".".join(map(str, details["loc"]))
    if details["type"] == "missing":
        return f"{place} is missing"
    message = str(details["ctx"]["error"]) if details["type"] == "value_error" else details["msg"]
    return f"{place}: {message[0].lower()}{message[1:]}" if place else message


MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}
"""Moments that each optimiser keeps per trained parameter."""


def checkpoint_bytes(config: Any, build_modules: Callable[[Any, torch.device], Sequence[nn.Module]]) -> int:
    """Compute the size of a checkpoint's tensors, in bytes, without allocating them.

    It counts the modules' parameters and buffers, and the optimiser's moments of the trained parameters.

    Args:
        config: the method's configuration; its `optim.optimizer` is one of MOMENTS.
        build_modules: the method's, as in `hvp.methods.Method`.
    """
    meta = torch.device("meta")
    with meta:
        modules = build_modules(config, meta)
    trained = sum(p.numel() * p.element_size() for m in modules for p in m.parameters() if p.requires_grad)
    states = sum(t.numel() * t.element_size() for m in modules for t in m.state_dict().values())
    return states + MOMENTS[config.optim.optimizer] * trained
