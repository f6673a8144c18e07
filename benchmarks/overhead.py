"""Cost of hard views and of Rescue: the trainer's own step with them over its vanilla step, without the loader."""

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from hvp.benchmarks.given_steps import GivenSteps, noise
from hvp.benchmarks.loading import Jpegs
from hvp.benchmarks.timing import Row, benchmark_settings, interleaved, keep_freed_memory, peak_memory_mb, ratio
from hvp.common.config.resolving import resolve
from hvp.common.training.distributed import World
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import images_to_rescue, strong_transform
from hvp.common.views.strong import StrongViews
from hvp.methods import Method


@dataclass(frozen=True)
class Case:
    """Networks and sizes of a method's steps: small ones on the CPU, in fp32; those of the papers on a GPU, in bf16."""

    network: tuple[str, str]
    """`model.arch` on the CPU and on a GPU."""

    batch: tuple[int, int]
    """Images of a step with hard views, on the CPU and on a GPU."""

    target: tuple[float, float] | None
    """Largest ratio allowed for hard views, on the CPU and on a GPU; None: no bound is set."""

    both: Mapping[str, Any] = field(default_factory=dict)
    """Further values, by dotted key."""

    small: Mapping[str, Any] = field(default_factory=dict)
    """Further values on the CPU."""

    rescue_batch: tuple[int, int] | None = None
    """Images of a step with Rescue; None: it is not measured."""

    rescue_small: Mapping[str, Any] = field(default_factory=dict)
    """Further values on the CPU for the step with Rescue."""


# The vanilla step of MoCo v3 costs 8 forward passes of a view: both encoders on two views, and two backward passes of
# twice a forward pass each. Scoring adds both encoders on four views, another 8, so the expected ratio is 2.
CASES = {
    "dino": Case(("vit_tiny", "vit_small"), (4, 64), (1.8, 1.7)),
    "ibot": Case(
        ("vit_tiny", "vit_small"),
        (4, 64),
        (2.13, 2.13),
        both={"masks.pred_ratio": [0.0, 0.3], "masks.pred_ratio_var": [0.0, 0.2]},
    ),
    "simsiam": Case(("resnet50", "resnet50"), (4, 64), (1.75, 1.6)),
    "simclr": Case(
        ("resnet50", "resnet50"),
        (8, 64),
        (1.75, 1.6),
        small={"views.crop_size": 96},
        rescue_batch=(128, 256),
        rescue_small={"views.crop_size": 64},
    ),
    "mocov3": Case(
        ("resnet50", "resnet50"),
        (8, 64),
        (2.1, 2.1),
        small={"views.crop_size": 96},
        rescue_batch=(128, 256),
        rescue_small={"views.crop_size": 64},
    ),
    "dinov2": Case(
        ("vit_small", "vit_large"),
        (4, 32),
        None,
        small={"dino.head_n_prototypes": 8192},
        rescue_batch=(64, 64),
        rescue_small={
            "dino.head_n_prototypes": 8192,
            "views.global_crops_size": 96,
            "views.local_crops_size": 48,
        },
    ),
}

HARD = {"selection.hard_views": "hvp", "selection.start": 0.0, "selection.every": 1, "rescue.enabled": False}
VANILLA = {"selection.hard_views": "none", "rescue.enabled": False}
RESCUE = {"selection.hard_views": "none", "rescue.enabled": True}


def overhead_rows(method: Method[Any], rounds: int, device: torch.device, batch: int | None = None) -> list[Row]:
    """Time the step with hard views against the vanilla step.

    Args:
        method: the method.
        rounds: measurements of each side; ten times as many on a GPU.
        device: device of the step.
        batch: images of a step; a few on the CPU if left out, those of `CASES` on a GPU.
    """
    case, gpu = CASES[method.name], device.type == "cuda"
    values = {"model.arch": case.network[gpu], "train.batch_size": batch or case.batch[gpu], **case.both}
    values |= {} if gpu else case.small
    target = case.target and case.target[gpu]
    with benchmark_settings(device):
        row = _row(method, "overhead", "hard views", {**values, **HARD}, {**values, **VANILLA}, target, rounds, device)
    return [row]


def rescue_rows(method: Method[Any], rounds: int, device: torch.device) -> list[Row]:
    """Time the step with Rescue of a 64th of the batch against the step without; strong views are loaded for it.

    Args:
        method, rounds, device: as for `overhead_rows()`.

    Raises:
        KeyError: the method is not measured with Rescue.
    """
    case, gpu = CASES[method.name], device.type == "cuda"
    if case.rescue_batch is None:
        raise KeyError(method.name)
    values = {"model.arch": case.network[gpu], "train.batch_size": case.rescue_batch[gpu], **case.both}
    values |= {} if gpu else case.rescue_small
    with benchmark_settings(device):
        row = _row(method, "rescue", "Rescue", {**values, **RESCUE}, {**values, **VANILLA}, 1.05, rounds, device)
    return [row]


def _row(
    method: Method[Any],
    benchmark: str,
    name: str,
    with_it: Mapping[str, Any],
    vanilla: Mapping[str, Any],
    target: float | None,
    rounds: int,
    device: torch.device,
) -> Row:
    gpu = device.type == "cuda"
    precision: Literal["fp32", "bf16"] = "bf16" if gpu else "fp32"
    with ExitStack() as held:
        step, batch = _step(method, with_it, precision, device, held)
        plain, _ = _step(method, vanilla, precision, device, held)
        step()  # what is allocated once belongs to neither side
        plain()
        extra = None
        before, after = peak_memory_mb(plain, device), peak_memory_mb(step, device)
        if before is not None and after is not None:
            extra = after - before
        keep_freed_memory()
        seconds, reference = interleaved([step, plain], 10 * rounds if gpu else rounds, device)
    case = f"{method.name} step with {name} over vanilla, {with_it['model.arch']}, {precision}, {batch}, {device.type}"
    middle = statistics.median
    return Row(benchmark, case, ratio(seconds, reference), target, True, extra, middle(seconds), middle(reference))


def _step(
    method: Method[Any],
    values: Mapping[str, Any],
    precision: Literal["fp32", "bf16"],
    device: torch.device,
    held: ExitStack,
) -> tuple[Callable[[], None], str]:
    """Return a function that makes one step of a configuration on a batch of noise, and the size of the batch.

    What must be closed after the last step goes to `held`.
    """
    config = resolve(method.config, [("benchmark", values)]).config
    number_format = Precision(precision, device)
    torch.manual_seed(0)
    parts = method.build(config, World(), device)
    batch = noise(config, device, method.build_masks and method.build_masks(config))
    strong = None
    if count := images_to_rescue(config):
        source = Jpegs(config.train.batch_size)
        views = StrongViews(source, strong_transform(config), seed=0, threads=min(2, count))
        strong = held.enter_context(closing(views))
    run = GivenSteps(config, parts[0], [[batch]], number_format, strong)
    shapes = " + ".join(f"{pixels.shape[0]} x {pixels.shape[2]} px" for pixels in batch.pixels)
    return lambda: method.train_one_epoch(run, parts, 0, config), f"{config.train.batch_size} images of {shapes}"
