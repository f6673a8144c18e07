"""The overhead benchmarks run the trainer's own steps; how fast those are is for the benchmarks to say."""

from dataclasses import replace

import pytest
import torch

from hvp.benchmarks import overhead
from hvp.methods import METHODS, get_method

MICRO = {name: "convnet_micro" if name in ("simsiam", "simclr", "mocov3") else "vit_micro" for name in METHODS}
PATCHES = {"dino": {"model.patch_size": 8}, "ibot": {"model.patch_size": 8}, "dinov2": {"model.patch_size": 8}}


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, case in overhead.CASES.items():
        sizes = {key: size for key, size in case.small.items() if not key.startswith("views.")}
        sizes |= (
            {"views.global_crops_size": 32, "views.local_crops_size": 16}
            if name in PATCHES
            else {"views.crop_size": 32}
        )
        small = {**sizes, **PATCHES.get(name, {})}
        rescue_batch = case.rescue_batch and (4, 4)
        changed = replace(
            case,
            network=(MICRO[name], MICRO[name]),
            batch=(2, 2),
            small=small,
            rescue_batch=rescue_batch,
            rescue_small=small,
        )
        monkeypatch.setitem(overhead.CASES, name, changed)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", METHODS)
def test_hard_views_are_timed_against_the_vanilla_step(name: str) -> None:
    before = torch.get_rng_state()
    (row,) = overhead.overhead_rows(get_method(name), 1, torch.device("cpu"))
    assert row.ratio > 0
    assert row.case.startswith(f"{name} step with hard views over vanilla, {MICRO[name]}, fp32, 2 images of ")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", [name for name, case in overhead.CASES.items() if case.rescue_batch])
def test_rescue_is_timed_against_the_vanilla_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "RESCUE", {**overhead.RESCUE, "rescue.k": 2})
    (row,) = overhead.rescue_rows(get_method(name), 1, torch.device("cpu"))
    assert (row.benchmark, row.target) == ("rescue", 1.05)
    assert "step with Rescue over vanilla" in row.case
