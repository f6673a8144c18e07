"""Parameter groups, LARS against its formula, and clipping."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hvp.common.training.optimizers import (
    LARS,
    build_optimizer,
    clip_gradients,
    split_weight_decay,
    squared_gradient_norm,
)

By = Literal["tensor", "global"]


def test_weight_decay_applies_to_matrices_only() -> None:
    module = nn.ModuleDict({"linear": nn.Linear(2, 3), "norm": nn.LayerNorm(3), "conv": nn.Conv2d(1, 2, 3)})
    module.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 3)))
    module.register_parameter("fixed", nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    module["norm"].bias = nn.Parameter(torch.zeros(1, 3))  # a bias is also recognised by its name
    decayed, exempt = split_weight_decay(module.named_parameters())
    names = {id(p): name for name, p in module.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["token", "linear.weight", "conv.weight"]
    assert "weight_decay" not in decayed
    assert [names[id(p)] for p in exempt["params"]] == ["linear.bias", "norm.weight", "norm.bias", "conv.bias"]
    assert exempt["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        ("lars", LARS, {"momentum": 0.9, "eta": 0.001}),
    ],
)
def test_optimizers_and_their_settings(name: Any, kind: type, expected: dict[str, Any]) -> None:
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(name, [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}])
    assert type(optimizer) is kind
    assert len(optimizer.param_groups) == 2
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    for group in optimizer.param_groups:
        assert {key: group[key] for key in expected} == expected
        assert group["lr"] == 0.0  # nothing moves before the schedule sets the rate


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="'adam'"):
        build_optimizer("adam", [{"params": [nn.Parameter(torch.ones(2, 2))]}])  # type: ignore[arg-type]


@settings(max_examples=30)
@given(
    steps=st.integers(1, 4),
    weight_decay=st.floats(0, 0.5),
    momentum=st.floats(0, 0.99),
    eta=st.floats(1e-4, 1.0),
    lr=st.floats(0, 1.0),
    start_at_zero=st.booleans(),
    exempt=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_lars_equals_its_formula(
    steps: int,
    weight_decay: float,
    momentum: float,
    eta: float,
    lr: float,
    start_at_zero: bool,
    exempt: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.zeros(2, 3) if start_at_zero else torch.randn(2, 3, generator=generator)
    vector = torch.randn(3, generator=generator)
    parameters = [nn.Parameter(matrix.clone()), nn.Parameter(vector.clone())]
    optimizer = LARS(parameters, lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta, exempt_vectors=exempt)

    slow = [matrix.flatten().tolist(), vector.tolist()]
    speed = [[0.0] * 6, [0.0] * 3]
    for _ in range(steps):
        drawn = [torch.randn(parameter.shape, generator=generator) for parameter in parameters]
        for parameter, value in zip(parameters, drawn, strict=True):
            parameter.grad = value
        gradients = [value.flatten().tolist() for value in drawn]
        optimizer.step()
        for i, gradient in enumerate(gradients):
            update = gradient
            if i == 0 or not exempt:
                decayed = [g + weight_decay * p for g, p in zip(gradient, slow[i], strict=True)]
                length, step_length = math.hypot(*slow[i]), math.hypot(*decayed)
                trust = eta * length / step_length if length > 0 and step_length > 0 else 1.0
                update = [trust * d for d in decayed]
            speed[i] = [momentum * m + u for m, u in zip(speed[i], update, strict=True)]
            slow[i] = [p - lr * m for p, m in zip(slow[i], speed[i], strict=True)]
        for parameter, expected in zip(parameters, slow, strict=True):
            torch.testing.assert_close(parameter.detach().flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_lars_resumes_from_its_state() -> None:
    def run(interrupt: bool) -> torch.Tensor:
        p = nn.Parameter(torch.ones(2, 2))
        optimizer = LARS([p], lr=0.5)
        for step in range(4):
            if interrupt and step == 2:
                state = optimizer.state_dict()
                optimizer = LARS([p], lr=0.0)
                optimizer.load_state_dict(state)
            p.grad = torch.full_like(p, step + 1.0)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(interrupt=True), run(interrupt=False))


def test_lars_leaves_parameters_without_gradient_and_calls_the_closure() -> None:
    still, moved = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = LARS([still, moved], lr=0.1, weight_decay=1.0)

    def closure() -> float:
        loss = moved.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert torch.equal(still.detach(), torch.ones(2, 2))
    assert torch.equal(moved.detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize("by", ["tensor", "global"])
@settings(max_examples=40)
@given(
    max_norm=st.floats(0.01, 100.0), scales=st.lists(st.floats(0, 50), min_size=1, max_size=5), seed=st.integers(0, 99)
)
def test_clipping_shortens_and_never_turns(by: By, max_norm: float, scales: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = [scale * torch.randn(3, 2, generator=generator) for scale in scales]
    parameters = [nn.Parameter(torch.zeros(3, 2)) for _ in before]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient.clone()
    norms = clip_gradients(parameters, max_norm, by=by)
    lengths = torch.stack([g.norm() for g in before])
    if by == "global":
        torch.testing.assert_close(norms, lengths.norm())
        factors = [min(1.0, max_norm / (lengths.norm().item() + 1e-6))] * len(before)
    else:
        torch.testing.assert_close(norms, lengths)
        factors = [min(1.0, max_norm / (length + 1e-6)) for length in lengths.tolist()]
    for parameter, gradient, factor in zip(parameters, before, factors, strict=True):
        torch.testing.assert_close(parameter.grad, factor * gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["tensor", "global"])
def test_clipping_skips_parameters_without_gradient(by: By) -> None:
    without, small, large = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    small.grad, large.grad = torch.full((4,), 0.1), torch.full((4,), 10.0)
    norms = clip_gradients(iter([without, small, large]), 1.0, by=by)
    assert without.grad is None
    assert large.grad.norm().item() == pytest.approx(1.0, abs=1e-3)
    if by == "tensor":
        torch.testing.assert_close(norms, torch.tensor([0.2, 20.0]))
        assert torch.equal(small.grad, torch.full((4,), 0.1))  # a short one is not touched
    assert clip_gradients([without], 1.0, by=by).numel() == (0 if by == "tensor" else 1)


def test_the_squared_norm_of_all_gradients_is_divided_among_the_processes() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    optimizer = build_optimizer("sgd", [{"params": parameters[:1]}, {"params": parameters[1:]}])
    assert squared_gradient_norm(optimizer).item() == 0
    parameters[0].grad, parameters[1].grad = torch.full((2, 3), 2.0), torch.full((4,), 3e15)
    expected = 6 * 4 + 4 * 9e30
    assert squared_gradient_norm(optimizer).item() == pytest.approx(expected, rel=1e-6)
    assert squared_gradient_norm(optimizer, num_processes=2).item() == pytest.approx(expected / 2, rel=1e-6)
    parameters[1].grad[0] = torch.nan
    assert math.isnan(squared_gradient_norm(optimizer).item())
