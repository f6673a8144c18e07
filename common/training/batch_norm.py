"""Synchronised batch norm on CPUs, which PyTorch's SyncBatchNorm does not support.

# C channels
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hvp.common.training.collectives import summed


class SharedBatchNorm(_BatchNorm):
    """Batch norm with training statistics over the rows of all processes, in float32.

    The mean and then the centred variance take one exchange each, since a difference of two large sums would lose
    precision. Every process must make the same forward passes, including those of a selection.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SharedBatchNorm: the input is {list(input.shape)}, expected channels, [B, C, ...]")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise an input [B, C, ...], in any float dtype; B may differ between processes.

        Raises:
            ValueError: the input has no channels, or all processes together have a single row.
        """
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            x = input.float()
            over = [dim for dim in range(x.dim()) if dim != 1]
            shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
            # The number of rows travels with the sum.
            total = summed(torch.cat((x.sum(over), x.new_tensor([x.numel() / x.shape[1]]))))
            count = total[-1].detach()
            if count < 2:
                raise ValueError(f"SharedBatchNorm: the input is {list(input.shape)}, but a single row has no variance")
            mean = total[:-1] / count
            centred = x - mean.view(shape)
            variance = summed(centred.square().sum(over)) / count
            normalised = centred * (variance + self.eps).rsqrt().view(shape)
            self._follow(mean.detach(), variance.detach() * count / (count - 1))
            if self.affine:
                normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics as `nn.BatchNorm1d` does."""
        if not self.track_running_stats:  # inside `running_statistics_kept()`
            return
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def shared_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every batch norm of a module by SharedBatchNorm, keeping its parameter and buffer objects; return it."""
    if isinstance(module, _BatchNorm):
        shared = SharedBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta"
        )
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(shared, name, getattr(module, name))
        return shared.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, shared_batch_norm(child))
    return module


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether a module contains batch norm, so that an image's output depends on its batch."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Context manager for forward passes in training mode that leave batch norm's running statistics unchanged."""
    tracking = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    for part in tracking:
        part.track_running_stats = False
    try:
        yield
    finally:
        for part in tracking:
            part.track_running_stats = True
