"""Adapters: configuration values become flags of the originals' command lines."""

import pytest

from hvp.common.errors import UserError
from hvp.methods.simsiam.config import SimSiamConfig
from hvp.patches import get_adapter
from hvp.patches.adapter import Adapter, as_flags
from hvp.patches.patching import patches


def test_values_become_flags():
    config = SimSiamConfig()
    names = {"optim.base_lr": "--lr", "optim.fix_pred_lr": "--fix", "views.crop_scale": "--scale"}
    assert as_flags(config, names, switches=True) == ["--lr", "0.05", "--scale", "0.2", "1.0"]
    assert as_flags(config, names, switches=False) == ["--lr", "0.05", "--fix", "false", "--scale", "0.2", "1.0"]


@pytest.mark.parametrize("method", patches())
def test_every_patch_has_an_adapter(method):
    assert isinstance(get_adapter(method), Adapter)


def test_a_method_without_a_patch_is_one_message():
    with pytest.raises(UserError, match=r"there is no patch for nosuch\. Known: dino, dinov2, "):
        get_adapter("nosuch")
