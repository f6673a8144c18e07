"""`hvp bench select mocov3` and `hvp bench overhead mocov3`: what selection costs, against the plain procedure.

# B images, V = 4 candidate views, D projection dim
"""

from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.benchmarks.loading import rescue_row
from hvp.benchmarks.timing import Row, benchmark_settings, interleaved, overhead_row, peak_memory_mb, ratio
from hvp.common.hardviews import Selection, Slots, select
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import Rescuer
from hvp.common.training.selecting import ViewSelector
from hvp.common.views import ViewBatch
from hvp.methods.mocov3.config import MoCoConfig
from hvp.methods.mocov3.contrastive_loss import contrastive_loss
from hvp.methods.mocov3.main_mocov3 import build_model
from hvp.methods.mocov3.score import pair_info_nce, pair_losses

NUM_VIEWS, DIM, TEMPERATURE = 4, 256, 1.0
SLOTS = Slots.from_counts((2, 2), (1, 1))
GIGABYTES_ALLOWED = 2.0
CPU = torch.device("cpu")


def select_rows(rounds: int = 5) -> list[Row]:
    """Scoring and selecting, on one thread: the pairs that are read against all similarities in one matrix; and the
    memory at the papers' batch."""
    with benchmark_settings(CPU), torch.no_grad():
        return [_scoring_row(1024, rounds), *_memory_rows(4096)]


def _scoring_row(batch: int, rounds: int) -> Row:
    q, k = torch.randn(2, NUM_VIEWS, batch, DIM)

    def ours() -> Tensor:
        return select([], pair_info_nce(q, k, SLOTS, TEMPERATURE), SLOTS).index

    def whole() -> Tensor:
        return select([], _whole_matrix(q, k), SLOTS).index

    equal = torch.equal(ours(), whole())
    memory = peak_memory_mb(ours)
    seconds, reference = interleaved([ours, whole], rounds)
    case = f"MoCo v3 scoring, {batch} images, 4 views of {DIM} dimensions, against all similarities in one matrix"
    return Row(
        "select", case, ratio(reference, seconds), None, False, memory, median(seconds), median(reference), equal
    )


def _whole_matrix(q: Tensor, k: Tensor) -> Tensor:
    """The losses of all ordered pairs, [B, V, V], those of a view with itself and of one transform included."""
    q, k = F.normalize(q, dim=-1) / TEMPERATURE, F.normalize(k, dim=-1)
    similarity = q.flatten(0, 1) @ k.flatten(0, 1).T  # [V B, V B]
    sums = similarity.unflatten(1, (NUM_VIEWS, -1)).logsumexp(dim=2).unflatten(0, (NUM_VIEWS, -1)).permute(1, 2, 0)
    return (sums - k.transpose(0, 1) @ q.permute(1, 2, 0)) * (2 * TEMPERATURE)


def _memory_rows(batch: int) -> list[Row]:
    """One row; none where memory cannot be told."""
    q, k = torch.randn(2, NUM_VIEWS, batch, DIM)
    memory = peak_memory_mb(lambda: pair_info_nce(q, k, SLOTS, TEMPERATURE))
    if memory is None:
        return []
    (seconds,) = interleaved([lambda: pair_info_nce(q, k, SLOTS, TEMPERATURE)], 1)
    case = f"MoCo v3 scoring, {batch} images, 8 times {batch} x {batch} similarities: gigabytes at the peak"
    return [Row("select", case, memory / 1e3, GIGABYTES_ALLOWED, True, memory, seconds[0], seconds[0])]


def overhead_rows(rounds: int = 5, device: torch.device | None = None, batch: int | None = None) -> list[Row]:
    """The training step with HVP over the vanilla step, without the loader: ResNet-50 in fp32 on small images on a CPU,
    in bf16 on a GPU.

    A step forwards two views through both encoders and takes two backward passes, each worth two forwards: 8 in all.
    Scoring forwards four views through both encoders, another 8, so that twice the time is what is to be expected.
    """
    device = device or CPU
    gpu = device.type == "cuda"
    name: Literal["fp32", "bf16"] = "bf16" if gpu else "fp32"
    batch, size = batch or (64 if gpu else 8), 224 if gpu else 96
    with benchmark_settings(device):
        step = _Step(MoCoConfig(), batch, size, Precision(name, device))
        case = (
            f"MoCo v3 step with HVP (4 views) over vanilla (2), resnet50, {name}, {batch} images of {size} px, "
            f"{device.type}"
        )
        return [overhead_row(step, case, 2.1, 10 * rounds if gpu else rounds, device)]


def rescue_rows(rounds: int = 3, device: torch.device | None = None) -> list[Row]:
    """The training step with Rescue of a 64th of the batch over the step without: ResNet-50 in fp32 on small images on
    a CPU, in bf16 on a GPU. Strong views are loaded for it, common ones are there."""
    device = device or CPU
    gpu = device.type == "cuda"
    name: Literal["fp32", "bf16"] = "bf16" if gpu else "fp32"
    batch, size = (256, 224) if gpu else (128, 64)
    config = MoCoConfig.model_validate(
        {"views": {"crop_size": size}, "train": {"batch_size": batch}, "rescue": {"enabled": True}}
    )
    with benchmark_settings(device):
        step = _Step(config, batch, size, Precision(name, device))
        case = (
            f"MoCo v3 step with Rescue (a 64th of {batch} images) over the step without, resnet50, {name}, {size} px, "
            f"{device.type}"
        )
        return [rescue_row(step.rescue, config, step.model, case, 10 * rounds if gpu else rounds, device)]


class _Step:
    """Forward and backward of one batch of noise, with and without selection."""

    def __init__(self, config: MoCoConfig, batch: int, size: int, precision: Precision):
        self.precision = precision
        self.model = build_model(config, precision.device)
        self.selector = ViewSelector(config, total_steps=1)
        self.views = [torch.randn(NUM_VIEWS, batch, 3, size, size, device=precision.device)]

    def select(self) -> Selection:
        with self.precision.autocast():
            with self.selector.scoring(self.model):
                losses = pair_losses(self.model, self.views, SLOTS, TEMPERATURE)
            return self.selector.keep(self.views, losses, step=0)

    def hard(self) -> None:
        self._train(self.select().views)

    def vanilla(self) -> None:
        self._train(self.selector.first(self.views))

    def rescue(self, rescuer: Rescuer | None, part: ViewBatch) -> None:
        self._train(self.selector.first(self.views), rescuer, part)

    def _train(self, views: list[Tensor], rescuer: Rescuer | None = None, part: ViewBatch | None = None) -> None:
        self.model.zero_grad(set_to_none=True)
        x1, x2 = views[0]
        with self.precision.autocast():
            out = self.model(x1, x2, 0.99)
            loss = contrastive_loss(out.q1, out.k2, TEMPERATURE) + contrastive_loss(out.q2, out.k1, TEMPERATURE)
            if rescuer is not None and part is not None:
                loss = loss + rescuer.loss(out.features, part)
        loss.backward()
