"""Detection of collapse, where a network has the same output for every image.

# B images, D dimensions
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class CollapseWatch:
    """Warn once that training has collapsed, after `steps` consecutive steps that look collapsed.

    Args:
        note: receives the message.
        steps: consecutive steps before the warning.
    """

    def __init__(self, note: Callable[[str], None], steps: int = 100) -> None:
        self.note, self.steps = note, steps
        self._in_a_row = 0

    def see(self, step: int, collapsed: bool, message: str) -> None:
        """Record whether a step looked collapsed.

        Args:
            step: counted from 0.
            collapsed: whether this step looks collapsed.
            message: observation and advice, to follow "step ...: the network has collapsed: ".
        """
        self._in_a_row = self._in_a_row + 1 if collapsed else 0
        if self._in_a_row == self.steps:
            self.note(f"step {step + 1}: the network has collapsed: {message}")


@torch.no_grad()
def feature_spread(z: Tensor) -> float:
    """Measure the spread of features over the unit sphere: 1 isotropic, 0 collapsed to one point.

    Args:
        z: features [B, D], any float dtype, B at least 2.

    Returns:
        The standard deviation over the batch of the L2-normalised features, mean over channels, times sqrt(D).

    Source: SimSiam (arXiv:2011.10566), section 4.1 and Figure 2.
    """
    return F.normalize(z.float(), dim=-1).std(dim=0).mean().item() * z.shape[-1] ** 0.5
