"""Optimisers, their parameter groups, and gradient clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

OptimizerName = Literal["adamw", "sgd", "lars"]


def split_weight_decay(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Split parameters into two groups: those with weight decay, then biases and 1-D tensors, without it.

    Frozen parameters are left out. The caller sets the first group's decay, every step if it is scheduled. Position
    embeddings and class tokens have three dimensions and do decay, as upstream.

    Source: facebookresearch/dino utils.py get_params_groups.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (exempt if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]


class LARS(Optimizer):
    """SGD with momentum and a learning rate scaled per tensor, relative to the tensor's norm.

    For a tensor p with gradient g: d = g + weight_decay * p; q = eta * |p| / |d|, or 1 where a norm is 0;
    mu = momentum * mu + q * d; p = p - lr * mu. 1-D tensors (biases, norms) have neither decay nor scaling, unless
    `exempt_vectors` is off.

    Args:
        params: tensors or parameter groups.
        lr, weight_decay, momentum: as in SGD; the learning rate multiplies after the momentum.
        eta: trust coefficient.
        exempt_vectors: exempt 1-D tensors from decay and scaling. Pretraining does; SimSiam's linear probe does not
            (apex LARC without clipping).

    Source: You et al. (arXiv:1708.03888); facebookresearch/dino utils.py LARS; NVIDIA/apex parallel/LARC.py.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        exempt_vectors: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})
        self.exempt_vectors = exempt_vectors

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; parameters without a gradient are skipped."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim != 1 or not self.exempt_vectors:
                    update = update.add(p, alpha=group["weight_decay"])
                    p_norm, update_norm = p.norm(), update.norm()
                    trust = group["eta"] * p_norm / update_norm
                    update = update * torch.where((p_norm > 0) & (update_norm > 0), trust, 1.0)
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                p.add_(state["mu"].mul_(group["momentum"]).add_(update), alpha=-group["lr"])
        return loss


def build_optimizer(name: OptimizerName, groups: list[dict[str, Any]]) -> Optimizer:
    """Build one of the upstream trainers' optimisers, with learning rate 0; the schedule sets it before every step.

    AdamW has PyTorch's defaults (betas 0.9 and 0.999, eps 1e-8); SGD and LARS have momentum 0.9. AdamW and SGD use
    their fused kernels on CPU and GPU.

    Args:
        name: adamw, sgd or lars.
        groups: parameter groups, such as those of `split_weight_decay()`.

    Raises:
        ValueError: unknown name.
    """
    if name == "lars":
        return LARS(groups)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"])
    if name == "adamw":
        return AdamW(groups, lr=0.0, fused=fused)
    if name == "sgd":
        return SGD(groups, lr=0.0, momentum=0.9, fused=fused)
    raise ValueError(f"build_optimizer: unknown optimiser {name!r}")


@torch.no_grad()
def squared_gradient_norm(optimizer: Optimizer, num_processes: int = 1) -> Tensor:
    """Compute this process's part of the squared L2 norm of all gradients; the processes' parts add up to it.

    Args:
        optimizer: its parameters' gradients, already averaged over the processes, are whole or sharded (FSDP2).
        num_processes: processes of the run.

    Returns:
        Scalar float64, on the gradients' device.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    device = gradients[0].device if gradients else torch.device("cpu")
    part = torch.zeros((), dtype=torch.float64, device=device)
    for tensors, copies in ((whole, num_processes), (shards, 1)):
        if tensors:
            part += torch.stack(torch._foreach_norm(tensors)).double().square().sum() / copies
    return part


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, by: Literal["tensor", "global"] = "tensor"
) -> Tensor:
    """Clip gradients to L2 norm `max_norm`, in place: each tensor separately (upstream), or all as one vector.

    Args:
        parameters: those without a gradient are skipped.
        max_norm: largest L2 norm, greater than 0.
        by: "tensor" as in DINO and iBOT, or "global" as in PyTorch and HVP's released code.

    Returns:
        L2 norms before clipping, on the gradients' device: [number of gradients], or a scalar for "global".

    Source: facebookresearch/dino utils.py clip_gradients; torch.nn.utils.clip_grad_norm_.
    """
    if by == "global":
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(0)
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, list(factors.unbind()))
    return norms
