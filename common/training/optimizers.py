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
    """Two parameter groups: those with weight decay, then biases and 1-D tensors, which have none.

    Parameters that are not trained are left out. The decay of the first group is the caller's to set, every step if it
    is scheduled. Position embeddings and class tokens, of three dimensions, do decay, as upstream.

    Source: facebookresearch/dino utils.py get_params_groups.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (exempt if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]


class LARS(Optimizer):
    """SGD with momentum whose step is scaled per tensor: the rate is relative to the tensor's own length.

    For a tensor p with gradient g: d = g + weight_decay * p; q = eta * |p| / |d|, or 1 where a norm is 0;
    mu = momentum * mu + q * d; p = p - lr * mu. 1-D tensors (biases, norms) have neither decay nor scale, unless
    `exempt_vectors` is off.

    Args:
        params: tensors or groups.
        lr, weight_decay, momentum: as in SGD; the rate multiplies after the momentum.
        eta: trust coefficient.
        exempt_vectors: pretraining leaves 1-D tensors alone; SimSiam's linear probe does not (apex' LARC without clip).

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
        """One step; parameters without gradient are left alone."""
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
    """The upstream's optimisers. Rates start at 0: the schedule sets them before every step.

    AdamW has torch's defaults (betas 0.9 and 0.999, eps 1e-8), SGD and LARS a momentum of 0.9. AdamW and SGD are the
    fused ones, one kernel for all tensors, wherever the parameters are.

    Args:
        name: adamw, sgd or lars.
        groups: parameter groups, as `split_weight_decay` makes them.
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
    """This process's part of the squared L2 norm of all gradients; over the processes, the parts add up to it.

    Args:
        optimizer: its parameters' gradients, averaged over the processes: whole in each, or a share in each (FSDP2).
        num_processes: of the run.

    Returns:
        Scalar float64, on the gradients' device.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    shares = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    device = gradients[0].device if gradients else torch.device("cpu")
    part = torch.zeros((), dtype=torch.float64, device=device)
    for tensors, copies in ((whole, num_processes), (shares, 1)):
        if tensors:
            part += torch.stack(torch._foreach_norm(tensors)).double().square().sum() / copies
    return part


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, by: Literal["tensor", "global"] = "tensor"
) -> Tensor:
    """Shorten gradients to at most `max_norm`, in place: each tensor's own (upstream), or all as one vector.

    Args:
        parameters: those without gradient are skipped.
        max_norm: largest L2 norm, greater than 0.
        by: "tensor" is DINO's and iBOT's clipping, "global" torch's and HVP's released code's.

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
