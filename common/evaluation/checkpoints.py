"""Weights for evaluation, from this project's checkpoints, the upstream's, and bare state dicts."""

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hvp.common.errors import UserError
from hvp.common.evaluation.descriptions import described_in, read_description
from hvp.common.networks import Encoder, encoder_from_state
from hvp.common.networks.libraries import from_libraries
from hvp.common.networks.vision_transformer import VisionTransformer
from hvp.common.training.archive import DamagedCheckpoint, read_archive, require_file
from hvp.common.training.checkpoint import FORMAT, Header, check_content

log = logging.getLogger(__name__)

LAST = "last.pt"

Which = Literal["teacher", "student", "base_encoder", "momentum_encoder", "model"]
"""The networks of a checkpoint: those of a method with a teacher or a momentum encoder, or the only one."""

ORDER: tuple[Which, ...] = ("teacher", "student", "base_encoder", "momentum_encoder", "model")
"""The first of these that a file holds is what an evaluation takes unasked."""

USUAL_SIZE = 224
"""Side of an evaluation's images in pixels, where nothing says what the network was pretrained on."""

EXPECTED = "Give a checkpoint of `hvp pretrain` or of the upstream trainer, or a state dict."

# Left by DistributedDataParallel.
WRAPPER = "module."
# Where a backbone stands within a network.
BACKBONES = ("backbone.", "encoder.", "base_encoder.", "momentum_encoder.")
# Encoders that one module holds, so that they lie in one state dict: MoCo v3's.
ENCODERS: tuple[Which, ...] = ("base_encoder", "momentum_encoder")
# What a network has beside its backbone during pretraining: heads, losses, a token for masked patches.
HEADS = (
    *("head.", "heads.", "projection_head.", "projector.", "backbone.fc.", "encoder.fc.", "predictor."),
    *("dino_loss.", "masked_embed", "backbone.masked_embed"),
    *("base_encoder.fc.", "base_encoder.head.", "momentum_encoder.fc.", "momentum_encoder.head."),
    *("dino_head.", "ibot_head."),
)
# Names of the same layer elsewhere: HVP's own ResNet for CIFAR calls a block's projection so, torchvision's not.
RENAMED = {".shortcut.": ".downsample."}
# The upstream's DINOv2 names a block by its chunk, too: blocks.<chunk>.<block>.
CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(\d+)\.")

# Upstream's checkpoints hold their arguments, and learning rates that are numpy numbers. These types are data and
# nothing else; every other type in a file is refused. numpy 1 wrote the function's name in another module.
SCALAR = np.float64(0).__reduce__()[0]
PLAIN_TYPES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    (SCALAR, "numpy.core.multiarray.scalar"),
    (SCALAR, "numpy._core.multiarray.scalar"),
]


@dataclass(frozen=True)
class BackboneMeta:
    """Where a backbone's weights came from."""

    path: Path
    """The file; the one inside, where a run's folder was given."""
    format: Literal["hvp", "upstream", "bare"]
    which: Which | Literal["bare"]
    """The network; `bare` where the file holds one that it gives no name."""
    method: str | None = None
    """The method that trained it; None where the file does not say."""
    epoch: int | None = None
    step: int | None = None
    config: Mapping[str, Any] | None = None
    """The resolved configuration, or the upstream's arguments; None where the file has neither."""
    dropped: tuple[str, ...] = ()
    """Keys of the projection head, which were left out."""
    networks: tuple[str, ...] = ()
    """Every network that the file holds by name."""
    prefix: str = ""
    """Prefix of the backbone's own names in the file."""
    described: Path | None = None
    """The file beside it that says what it does not: `hvp convert` writes one."""
    note: str = ""
    """Why such a file is not used, where there is one."""

    @property
    def image_size(self) -> int | None:
        """Side of the views that the encoder was pretrained on, pixels; None where the file does not say it. Read from
        what is there rather than by the method's configuration, whose other keys may have changed since."""
        views = (self.config or {}).get("views")
        size = views.get("global_crops_size", views.get("crop_size")) if isinstance(views, Mapping) else None
        return size if isinstance(size, int) and size > 0 else None

    def summary(self) -> dict[str, Any]:
        """What an evaluation's result says of its checkpoint."""
        return {
            "path": str(self.path),
            "format": self.format,
            "which": self.which,
            "method": self.method,
            "epoch": self.epoch,
            "step": self.step,
            "described_in": None if self.described is None else str(self.described),
        }

    @property
    def origin(self) -> str:
        """Where the weights came from, in a sentence for the user."""
        of = "the only network" if self.which == "bare" else f"the {self.which}"
        others = [name for name in self.networks if name != self.which]
        parts = [f"{self.path}: {of}" + (f" of {self.method}" if self.method else "")]
        parts += [f"{name} {number}" for name, number in (("epoch", self.epoch), ("step", self.step)) if number]
        if others:
            parts.append(f"not the {' or the '.join(others)}")
        if self.prefix:
            parts.append(f"its keys {self.prefix}*")
        if self.dropped:
            parts.append(f"without {len(self.dropped)} tensors of heads")
        if self.described is not None:
            parts.append(f"described in {self.described.name}")
        return ", ".join(parts)


@dataclass(frozen=True)
class BackboneState:
    """A backbone's weights under the backbone's own names, and where they came from."""

    state: dict[str, Tensor]
    meta: BackboneMeta


def read_backbone_state(path: Path, which: Which | None = None) -> BackboneState:
    """The backbone's weights in a file, without running anything the file holds.

    Understood are this project's checkpoints; the upstream's training checkpoints (`student` and `teacher`, with or
    without `module.`, or both in one `model`, or MoCo v3's two encoders under `state_dict`); state dicts, bare or under
    `state_dict` or `model` (SimSiam's and HVP's released ones), with or without `module.` and `backbone.` or
    `encoder.`; and `.safetensors`. Keys of what sits on the backbone during pretraining are left out and listed in
    `meta.dropped`.

    Args:
        path: the file, or the folder of a run, whose last checkpoint is read.
        which: the network; None takes the teacher or the base encoder where there is one, and else the only network.

    Raises:
        UserError: there is no such file, it is damaged, it holds no weights, or not the network asked for.
    """
    path = checkpoint_file(path)
    return backbone_in(read_content(path), path, which)


def backbone_in(content: dict[str, Any], path: Path, which: Which | None = None) -> BackboneState:
    """As `read_backbone_state()`, of a file that is read already: the tensors are those of `content`."""
    content = _with_networks(content)
    description, note = (None, "") if content.get("format") == FORMAT else read_description(path)
    ours = content.get("format") == FORMAT
    if ours:
        check_content(content, path, Header)
    nested = [content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)]
    whole = nested[0] if nested else content
    encoders = _encoders(whole)
    networks = encoders or {name: content[name] for name in ORDER if content.get(name) is not None}
    form: Literal["hvp", "upstream", "bare"]
    found: Which | Literal["bare"]
    if ours or encoders or "teacher" in networks or "student" in networks:
        form = "hvp" if ours else "upstream"
        found = which if which is not None else next(iter(networks), "model")
        if found not in networks:
            raise UserError(
                f"{path}: this checkpoint has no {found}. It has: {', '.join(networks) or 'no network'}."
                " Choose one that is there."
            )
        weights = networks[found]
    else:
        form, found = "bare", (description.which if description else None) or "bare"
        if which not in (None, found):
            raise UserError(
                f"{path}: this file does not say which of its weights are the {which}'s. It has one network: ask for"
                " none by name."
            )
        weights = whole
    if not _is_state(weights):
        raise UserError(f"{path}: this file holds {_kind(weights)}, no weights. {EXPECTED}")
    state, dropped, prefix = _backbone(path, weights)
    config = content.get("config" if ours else "args")
    config = vars(config) if isinstance(config, argparse.Namespace) else config
    meta = BackboneMeta(
        path=path,
        format=form,
        which=found,
        method=content["method"] if ours else None,
        epoch=content["epoch"] if isinstance(content.get("epoch"), int) else None,
        step=content.get("step") if ours else None,
        config=config if isinstance(config, Mapping) else None,
        dropped=tuple(dropped),
        networks=tuple(networks) if form != "bare" else (),
        prefix=prefix,
        note=note,
    )
    if description is not None:
        known = {"method": meta.method, "epoch": meta.epoch, "step": meta.step}
        told = {name: getattr(description, name) for name, value in known.items() if value is None}
        config = description.config or meta.config
        meta = replace(meta, **told, config=config, described=described_in(path))
    log.info("%s: %d tensors of the backbone (%s), %d of the head left out", path, len(state), found, len(dropped))
    return BackboneState(state, meta)


def checkpoint_file(path: Path) -> Path:
    """The checkpoint itself, where a run's folder was given."""
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: there is no such file. Give a checkpoint, or the folder of a run.")
        return path
    last = path / LAST
    if not last.exists():
        raise UserError(f"{path}: this folder has no {LAST}. Give a checkpoint, or the folder of a run that has one.")
    return last


def read_content(path: Path) -> dict[str, Any]:
    """The dict in a file, without running anything it holds; tensors on the CPU.

    Raises:
        UserError: it cannot be read, is damaged, holds other objects than plain data, or is no dict.
    """
    if path.suffix == ".safetensors":
        require_file(path)
        try:
            return dict(load_file(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except Exception as error:  # the library has its own
            raise DamagedCheckpoint(f"{path}: is truncated, or no checkpoint. {EXPECTED}") from error
    try:
        with torch.serialization.safe_globals(PLAIN_TYPES):
            content = read_archive(path)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}. {EXPECTED}") from error.__cause__
    if not isinstance(content, dict):
        raise UserError(f"{path}: this file holds {_kind(content)}, no weights. {EXPECTED}")
    return content


def _with_networks(content: dict[str, Any]) -> dict[str, Any]:
    """The content, with student and teacher on their own where `model` holds both (the upstream's DINOv2)."""
    model = content.get("model")
    if not _is_state(model):
        return content
    networks = {
        name: {key.removeprefix(f"{name}."): value for key, value in model.items() if key.startswith(f"{name}.")}
        for name in ("student", "teacher")
    }
    found = {name: network for name, network in networks.items() if network}
    return {**{key: value for key, value in content.items() if key != "model"}, **found} if found else content


def _is_state(weights: object) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(weights, dict)
        and bool(weights)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items())
    )


def _encoders(weights: Mapping[Any, Any]) -> dict[Which, dict[str, Any]]:
    """The encoders that one state dict holds, each with what is not another's; none where it holds a single network."""
    owners = {
        key: name for key in weights for name in ENCODERS if str(key).removeprefix(WRAPPER).startswith(f"{name}.")
    }
    return {
        name: {key: value for key, value in weights.items() if owners.get(key, name) == name}
        for name in ENCODERS
        if name in owners.values()
    }


def _kind(content: object) -> str:
    if isinstance(content, dict):
        return f"a dict ({_first(list(map(str, content)))})"
    return f"a {type(content).__name__}"


def _backbone(path: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], str]:
    """The backbone's weights under its own names, the keys of what sits on it, and what the names began with."""
    names = from_libraries({key.removeprefix(WRAPPER): value for key, value in weights.items()})
    dropped = [name for name in names if name.startswith(HEADS)]
    rest = {name: value for name, value in names.items() if not name.startswith(HEADS)}
    if not rest:
        raise UserError(f"{path}: there is no backbone in this file, only a head: {_first(dropped)}.")
    prefix = next((prefix for prefix in BACKBONES if any(name.startswith(prefix) for name in rest)), "")
    outside = [name for name in rest if not name.startswith(prefix)]
    if outside:
        raise UserError(
            f"{path}: {len(outside)} tensors belong neither to the backbone nor to a known head: {_first(outside)}."
        )
    wrapper = WRAPPER if any(key.startswith(WRAPPER) for key in weights) else ""
    return {_own_name(name.removeprefix(prefix)): value for name, value in rest.items()}, dropped, wrapper + prefix


def _own_name(name: str) -> str:
    for foreign, own in RENAMED.items():
        name = name.replace(foreign, own)
    return CHUNKED_BLOCK.sub(r"blocks.\1.", name)


def evaluation_size(encoder: nn.Module, meta: BackboneMeta) -> tuple[int, str]:
    """Side of the images that an encoder is evaluated on unasked, and where that is from, in words.

    That of pretraining, where the checkpoint or the file that describes it says it. Else a ViT tells it by its position
    embedding; a larger one than 224 was made for dense tasks, and 224 is taken there, as for a ResNet.
    """
    if meta.image_size is not None:
        return meta.image_size, "as pretrained"
    if isinstance(encoder, VisionTransformer) and encoder.image_size < USUAL_SIZE:
        return encoder.image_size, "that of the position embedding"
    return USUAL_SIZE, "as nothing says what the network was pretrained on"


def load_encoder(path: Path, which: Which | None = None) -> tuple[Encoder, BackboneMeta]:
    """The encoder in a checkpoint of ours, of an upstream trainer, or in a bare state dict, in evaluation mode.

    Args:
        path, which: as for `read_backbone_state()`.

    Raises:
        UserError: the file cannot be read, is of no architecture that is known here, or does not fit it completely.
    """
    backbone = read_backbone_state(path, which)
    encoder = encoder_from_state(backbone.state)
    if encoder is None:
        raise UserError(
            f"{backbone.meta.path}: is no ViT or ResNet as the methods here train them; its {len(backbone.state)} "
            f"entries begin with {_first(list(backbone.state), 4)}"
        )
    load_complete(encoder, backbone.state, str(backbone.meta.path))
    return encoder.eval(), backbone.meta


def load_complete(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Loads weights that fit completely, and changes nothing if they do not.

    Args:
        module: the network; keeps its types and its device.
        state: weights under the network's names.
        what: what messages call the checkpoint, normally its path.

    Raises:
        UserError: keys are missing, are left over, or have other shapes. A `pos_embed` for another grid is another
            shape: build the network for the grid that the checkpoint has.
    """
    if problem := misfits(module.state_dict(), state):
        raise UserError(
            f"{what}: the checkpoint does not fit the network completely, and is not used.{problem}"
            "\n    Check that the architecture and the patch size are the checkpoint's."
        )
    module.load_state_dict(dict(state))


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Lines that say which keys are missing from `state`, left over, or of another shape than in `own`; empty where it
    fits."""
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
        f"\n    missing ({len(missing)}): {_first(missing)}"
        f"\n    left over ({len(left_over)}): {_first(left_over)}"
        f"\n    other shapes ({len(shapes)}): {_first(shapes)}"
    )


def _first(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") if names else "none"
