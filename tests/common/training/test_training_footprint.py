"""A run's minimum memory, and the refusal of a run that cannot fit."""

import pytest
import torch

from hvp.common.errors import UserError
from hvp.common.training import footprint as footprints
from hvp.common.training.checkpoint import checkpoint_bytes
from hvp.common.training.distributed import World
from hvp.common.training.footprint import check_fits, footprint
from hvp.methods import METHODS, get_method
from tests import runs


def tiny(method, **values):
    return runs.tiny(get_method(method).config, method, **values)


@pytest.mark.parametrize("method", METHODS)
def test_networks_are_counted_as_they_are_built(method):
    """Networks on the meta device are counted like real ones; a checkpoint lacks the gradients."""
    config = tiny(method)
    build = get_method(method).build_modules
    modules = build(config, torch.device("cpu"))
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}.values()
    gradients = sum(t.numel() * t.element_size() for t in tensors if t.requires_grad)
    moments = {"adamw": 2, "sgd": 1, "lars": 1}[config.optim.optimizer]
    held = sum(t.numel() * t.element_size() for t in tensors) + (1 + moments) * gradients
    assert footprint(config, build).networks == held
    assert checkpoint_bytes(config, build) + gradients == held


def test_the_estimate_adds_up_the_tensors_of_a_step():
    """DINO tiny: 2 + 2 global crops of 32 pixels and 4 local ones of 16; 2 + 2 of them are trained on."""
    pixels = 16 * 3 * (4 * 32**2 + 4 * 16**2)
    needs = footprint(tiny("dino", train__accumulate=2), get_method("dino").build_modules)
    assert (needs.pixels, needs.views) == (pixels, 4 * pixels)
    assert needs.objective == 4 * 16 * 4 * 128  # float32, images, crops, prototypes
    assert needs.selection == 4 * 16 * 24 * 6  # 2 * 2 * C(4, 2) combinations of 2 * 3 terms
    shared = footprint(tiny("dino"), get_method("dino").build_modules, World(size=2))
    assert shared.pixels == needs.pixels
    vanilla = footprint(tiny("dino", selection__hard_views="none"), get_method("dino").build_modules)
    assert (vanilla.pixels, vanilla.selection) == (32 * 3 * (2 * 32**2 + 2 * 16**2), 0)
    never = footprint(tiny("dino", selection__start=1.0), get_method("dino").build_modules)
    assert (never.pixels, never.selection) == (vanilla.pixels, 0)
    exact = footprint(tiny("dino", selection__search="exact"), get_method("dino").build_modules)
    assert exact.selection == 4 * 32 * 4 * 8  # choices of targets, views


@pytest.mark.parametrize(
    ("method", "values", "largest"),
    [
        ("dino", {"model__out_dim": 2**24, "model__head_bottleneck_dim": 4096}, "networks"),
        ("ibot", {"views__global_crops_size": 4096, "model__patch_size": 16, "train__batch_size": 4096}, "views"),
        ("simclr", {"train__batch_size": 2**20, "views__crop_size": 8}, "objective"),
        ("mocov3", {"train__batch_size": 2**20, "views__crop_size": 8}, "objective"),
    ],
)
def test_a_run_that_cannot_fit_is_refused_with_the_setting_to_lower(method, values, largest, monkeypatch):
    monkeypatch.setattr(footprints, "host_memory", lambda: 2**38)
    with pytest.raises(
        UserError, match=rf"the run needs at least .* this machine has 256\.0 GiB \({largest}"
    ) as caught:
        check_fits(tiny(method, train__device="cpu", **values), get_method(method).build_modules)
    assert footprints.SETTINGS[largest] in str(caught.value)


def test_a_run_that_just_fits_is_accepted(monkeypatch):
    assert footprints.host_memory(), "this machine's memory is known"
    config, build = tiny("dino", train__device="cpu"), get_method("dino").build_modules
    needs = footprint(config, build)
    for memory in (needs.device + needs.pixels, None):
        monkeypatch.setattr(footprints, "host_memory", lambda memory=memory: memory)
        check_fits(config, build)
    monkeypatch.setattr(footprints, "host_memory", lambda: needs.device + needs.pixels - 1)
    with pytest.raises(UserError):
        check_fits(config, build)
