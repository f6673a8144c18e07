"""Images whose colour shows the class, and an encoder that sees only colour."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvp.common.data import BadImage


@dataclass(frozen=True)
class ToySource:
    """Noisy images with one colour per class; the classes alternate."""

    name: str = "toy (train, 60 images)"
    classes: tuple[str, ...] | None = ("blue", "green", "red")
    length: int = 60
    size: tuple[int, int] = (20, 24)
    seed: int = 0
    bad: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> NDArray[np.uint8]:
        if index in self.bad:
            raise BadImage(self.describe(index), "is not an image")
        rng = np.random.default_rng((self.seed, index))
        image = rng.integers(0, 60, (*self.size, 3), dtype=np.uint8)
        if self.classes is not None:
            image[..., index % len(self.classes) % 3] += 100
        return image

    def labels(self) -> NDArray[np.int64] | None:
        return None if self.classes is None else np.arange(self.length) % len(self.classes)

    def describe(self, index: int) -> str:
        return f"toy {index}"


class ToyEncoder(nn.Module):
    """Encoder of the mean colour; it has layers that would reveal training mode, and counts the images it sees."""

    embed_dim = 6
    num_blocks = 2

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(3, 6, generator=generator))
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.dropout.eval()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.dropout(self.norm(x.mean(dim=(2, 3)) @ self.mix))

    def probe_features(self, x: Tensor, n_last_blocks: int, avgpool: bool) -> Tensor:
        return torch.cat([self(x)] * (n_last_blocks + avgpool), dim=1)
