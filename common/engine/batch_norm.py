"""Batch norm over the images of all processes, on CPUs, where PyTorch's SyncBatchNorm does not run.

# N rows over all processes (images, times positions of a feature map), C channels
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hvp.common.engine.collectives import summed


class SharedBatchNorm(_BatchNorm):
    """Batch norm whose training statistics are those of the rows of all processes.

    Several processes then compute what one would that has all their rows: outputs, running statistics, and gradients
    once DistributedDataParallel has averaged those of the parameters. In evaluation mode it is PyTorch's batch norm.

    A forward pass in training mode talks to the other processes, without gradients too: all of them score the same
    candidates in the same steps, so all make the same passes.

    Source: Ioffe & Szegedy (arXiv:1502.03167), Algorithm 1, with its sums over all processes.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected rows of {self.num_features} channels, got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Args:
            input: [B, C] or [B, C, ...], any float dtype; B may differ between processes.

        Returns:
            Like the input; computed in float32 at least.
        """
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        positions = [0, *range(2, x.dim())]
        channels = (1, -1, *[1] * (x.dim() - 2))

        own_rows = x.new_tensor([x.numel() // self.num_features])
        totals = summed(torch.cat([x.sum(positions), own_rows]))
        num_rows = totals[-1]
        if num_rows < 2:
            raise ValueError(f"expected more than 1 row over all processes, got {list(input.shape)}")
        mean = totals[:-1] / num_rows  # [C]
        # centred first: the difference of E[x^2] and E[x]^2 loses digits where the mean is large
        centred = x - mean.view(channels)
        var = summed(centred.square().sum(positions)) / num_rows  # [C]
        if self.training and self.track_running_stats:
            self._track(mean.detach(), var.detach() * num_rows / (num_rows - 1))

        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        output = centred * scale.view(channels)
        if self.bias is not None:
            output = output + self.bias.view(channels)
        return output.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics. `var` is the unbiased one, [C]."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)


def share_batch_norm(module: nn.Module) -> nn.Module:
    """The module with SharedBatchNorm for every batch norm in it, which takes over parameters, buffers and names."""
    if isinstance(module, _BatchNorm):
        shared = SharedBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        shared.weight, shared.bias = module.weight, module.bias
        shared.running_mean, shared.running_var = module.running_mean, module.running_var
        shared.num_batches_tracked = module.num_batches_tracked
        return shared.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, share_batch_norm(child))
    return module
