"""Reading encoders from checkpoints: ours, the upstream trainers', and bare state dicts."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hvp.common.errors import UserError
from hvp.common.evaluation.backbones import EXPECTED, BackboneMeta, BackboneState, backbone_in, kind_of, listed
from hvp.common.evaluation.descriptions import Which
from hvp.common.networks import Encoder, encoder_from_state
from hvp.common.networks.vision_transformer import VisionTransformer
from hvp.common.training.archive import DamagedCheckpoint, read_archive, require_file

LAST = "last.pt"

DEFAULT_SIZE = 224
"""Side of the evaluation images in pixels when the pretraining size is unknown."""

# Upstream checkpoints hold their arguments, and learning rates that are numpy numbers. These types are pure data; any
# other type in a file is refused. numpy 1 recorded the function's name under another module.
SCALAR = np.float64(0).__reduce__()[0]
PLAIN_TYPES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    (SCALAR, "numpy.core.multiarray.scalar"),
    (SCALAR, "numpy._core.multiarray.scalar"),
]


def checkpoint_file(path: Path) -> Path:
    """Return the checkpoint itself: the last one in the folder of a run, or else `path`.

    Raises:
        UserError: there is no such file, or the folder has no last checkpoint.
    """
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: there is no such file. Give a checkpoint, or the folder of a run.")
        return path
    last = path / LAST
    if not last.exists():
        raise UserError(f"{path}: this folder has no {LAST}. Give a checkpoint, or the folder of a run that has one.")
    return last


def read_content(path: Path) -> dict[str, Any]:
    """Read the dict in a file without running anything it holds; tensors are on the CPU.

    Raises:
        UserError: the file cannot be read, is damaged, holds objects other than plain data, or is not a dict.
    """
    if path.suffix == ".safetensors":
        require_file(path)
        try:
            return dict(load_file(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except Exception as error:  # safetensors raises an exception class of its own
            raise DamagedCheckpoint(f"{path}: is truncated, or no checkpoint. {EXPECTED}") from error
    try:
        with torch.serialization.safe_globals(PLAIN_TYPES):
            content = read_archive(path)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}. {EXPECTED}") from error.__cause__
    if not isinstance(content, dict):
        raise UserError(f"{path}: this file holds {kind_of(content)}, no weights. {EXPECTED}")
    return content


def read_backbone_state(path: Path, which: Which | None = None) -> BackboneState:
    """Read the backbone's weights from a file without running anything it holds.

    Supported are our checkpoints; the upstreams' training checkpoints (`student` and `teacher`, with or without
    `module.`, or both in one `model`, or MoCo v3's two encoders under `state_dict`); state dicts, bare or under
    `state_dict` or `model` (SimSiam's and HVP's released ones), with or without `module.` and `backbone.` or
    `encoder.`; and `.safetensors`. Keys of heads and losses are left out and listed in `meta.dropped`.

    Args:
        path: the file, or the folder of a run, for its last checkpoint.
        which: the network; None takes the teacher or the base encoder if there is one, or else the only network.

    Raises:
        UserError: there is no such file, it is damaged, or it lacks weights or the requested network.
    """
    path = checkpoint_file(path)
    return backbone_in(read_content(path), path, which)


def load_encoder(path: Path, which: Which | None = None) -> tuple[Encoder, BackboneMeta]:
    """Load the encoder from one of our checkpoints, an upstream trainer's, or a bare state dict, in evaluation mode.

    Args:
        path, which: as for `read_backbone_state()`.

    Raises:
        UserError: the file cannot be read, has an unknown architecture, or does not fit it completely.
    """
    backbone = read_backbone_state(path, which)
    encoder = encoder_from_state(backbone.state)
    if encoder is None:
        raise UserError(
            f"{backbone.meta.path}: is no ViT or ResNet as the methods here train them; its {len(backbone.state)} "
            f"entries begin with {listed(list(backbone.state), 4)}"
        )
    load_complete(encoder, backbone.state, str(backbone.meta.path))
    return encoder.eval(), backbone.meta


def load_complete(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load weights that fit completely; if they do not, change nothing.

    Args:
        module: the network; keeps its dtypes and its device.
        state: weights under the network's names.
        what: name of the checkpoint in messages, normally its path.

    Raises:
        UserError: keys are missing or left over, or shapes differ. A `pos_embed` for another grid has another shape:
            build the network for the checkpoint's grid.
    """
    if problem := misfits(module.state_dict(), state):
        raise UserError(
            f"{what}: the checkpoint does not fit the network completely, and was not loaded.{problem}"
            "\n    Check that the architecture and the patch size are the checkpoint's."
        )
    module.load_state_dict(dict(state))


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """List keys of `state` that are missing, left over, or differ in shape from `own`, for messages; empty if none."""
    missing = [key for key in own if key not in state]
    left_over = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    if not (missing or left_over or shapes):
        return ""
    return (
        f"\n    missing ({len(missing)}): {listed(missing)}"
        f"\n    left over ({len(left_over)}): {listed(left_over)}"
        f"\n    other shapes ({len(shapes)}): {listed(shapes)}"
    )


def evaluation_size(encoder: nn.Module, meta: BackboneMeta) -> tuple[int, str]:
    """Default side of the evaluation images in pixels, and the reason for it, for the user.

    It is the pretraining size if the checkpoint or its description says so. Otherwise a ViT's position embedding shows
    it. An embedding for more than 224 pixels was made for dense tasks, so 224 is used then, as for a ResNet.
    """
    if meta.image_size is not None:
        return meta.image_size, "as pretrained"
    if isinstance(encoder, VisionTransformer) and encoder.image_size < DEFAULT_SIZE:
        return encoder.image_size, "from the position embedding"
    return DEFAULT_SIZE, "the default, as the pretraining size is unknown"
