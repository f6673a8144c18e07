"""`hvp bench select simsiam` and `hvp bench overhead simsiam`: what selection costs, against the plain procedure.

# B images, N = 4 candidate views, D projection dim
"""

from itertools import combinations
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hvp.benchmarks.timing import Row, benchmark_settings, interleaved, overhead_row, peak_memory_mb, ratio
from hvp.common.hardviews import Selection, Slots, select
from hvp.common.training.precision import Precision
from hvp.common.training.selecting import ViewSelector
from hvp.methods.simsiam.config import SimSiamConfig
from hvp.methods.simsiam.main_simsiam import build_model, symmetric_loss
from hvp.methods.simsiam.score import negative_cosines, pair_losses

NUM_VIEWS, DIM, SIZE = 4, 2048, 224
SLOTS = Slots.from_counts((NUM_VIEWS,), (2,))


def select_rows(rounds: int = 5) -> list[Row]:
    """Scoring and selecting with the pixels, on one thread: the pair matrix and one gather, against the loop over
    pairs."""
    with benchmark_settings(torch.device("cpu")), torch.no_grad():
        return [_selection_row(64, rounds)]


def _selection_row(batch: int, rounds: int) -> Row:
    p, z = torch.randn(2, NUM_VIEWS, batch, DIM)
    views = torch.randn(NUM_VIEWS, batch, 3, SIZE, SIZE)

    def ours() -> Tensor:
        return select([views], negative_cosines(p, z), SLOTS).views[0]

    def plain() -> Tensor:
        return _plain_selection(p, z, views)

    equal = torch.equal(ours(), plain())
    memory = peak_memory_mb(ours)
    seconds, reference = interleaved([ours, plain], rounds)
    case = (
        f"SimSiam scoring and picking, {batch} images of {SIZE} px, 6 pairs, against the loop over pairs with `where`"
    )
    return Row(
        "select", case, ratio(reference, seconds), None, False, memory, median(seconds), median(reference), equal
    )


def _plain_selection(p: Tensor, z: Tensor, views: Tensor) -> Tensor:
    """The procedure as the paper describes it: for every pair the loss of its views, and the pixels of the harder one
    kept.

    Returns:
        [2, B, 3, H, W], the pair of each image.
    """
    best = torch.full((p.shape[1],), torch.inf)
    kept = [views[0], views[0]]
    for i, j in combinations(range(NUM_VIEWS), 2):
        similarity = 0.5 * (cosine_similarity(p[i], z[j]) + cosine_similarity(p[j], z[i]))
        harder = similarity < best
        best = torch.where(harder, similarity, best)
        kept = [torch.where(harder[:, None, None, None], views[v], k) for v, k in zip((i, j), kept, strict=True)]
    return torch.stack(kept)


def overhead_rows(rounds: int = 5, device: torch.device | None = None, batch: int | None = None) -> list[Row]:
    """The training step with HVP over the vanilla step, without the loader: ResNet-50, in fp32 on a CPU, in bf16 on a
    GPU."""
    device = device or torch.device("cpu")
    gpu = device.type == "cuda"
    name: Literal["fp32", "bf16"] = "bf16" if gpu else "fp32"
    batch = batch or (64 if gpu else 4)
    with benchmark_settings(device):
        step = _Step(SimSiamConfig(), batch, Precision(name, device))
        case = f"SimSiam step with HVP (4 views) over vanilla (2), resnet50, {name}, {batch} images, {device.type}"
        return [overhead_row(step, case, 1.60 if gpu else 1.75, 10 * rounds if gpu else rounds, device)]


class _Step:
    """Forward and backward of one batch of noise, with and without selection."""

    def __init__(self, config: SimSiamConfig, batch: int, precision: Precision):
        self.precision = precision
        self.model = build_model(config, precision.device)
        self.selector = ViewSelector(config, total_steps=1)
        # as `normalize()` leaves them, channels last
        pixels = torch.randn(NUM_VIEWS, batch, SIZE, SIZE, 3, device=precision.device)
        self.views = [pixels.movedim(-1, -3)]

    def select(self) -> Selection:
        with self.precision.autocast():
            with self.selector.scoring(self.model):
                losses = pair_losses(self.model, self.views)
            return self.selector.keep(self.views, losses, step=0)

    def hard(self) -> None:
        self._train(self.select().views)

    def vanilla(self) -> None:
        self._train(self.selector.first(self.views))

    def _train(self, views: list[Tensor]) -> None:
        self.model.zero_grad(set_to_none=True)
        x1, x2 = views[0]
        with self.precision.autocast():
            loss = symmetric_loss(*self.model(x1, x2)[:4])
        loss.backward()
