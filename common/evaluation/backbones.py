"""Finding a backbone in the content of a checkpoint: which network it belongs to, and the names of its tensors."""

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

from torch import Tensor

from hvp.common.errors import UserError
from hvp.common.evaluation.descriptions import Which, described_in, read_description
from hvp.common.networks.libraries import from_libraries
from hvp.common.training.checkpoint import FORMAT, Header, check_content

log = logging.getLogger(__name__)

ORDER: tuple[Which, ...] = ("teacher", "student", "base_encoder", "momentum_encoder", "model")
"""Networks by preference: without a request, an evaluation takes the first one that a file has."""

EXPECTED = "Give a checkpoint of `hvp pretrain` or of the upstream trainer, or a state dict."

# Added to keys by DistributedDataParallel.
WRAPPER = "module."
# Prefixes of a backbone within a network.
BACKBONES = ("backbone.", "encoder.", "base_encoder.", "momentum_encoder.")
# Encoders that share one state dict, as in MoCo v3.
ENCODERS: tuple[Which, ...] = ("base_encoder", "momentum_encoder")
# Parts of a network that only pretraining needs: heads, losses, the token for masked patches.
HEADS = (
    *("head.", "heads.", "projection_head.", "projector.", "backbone.fc.", "encoder.fc.", "predictor."),
    *("dino_loss.", "masked_embed", "backbone.masked_embed"),
    *("base_encoder.fc.", "base_encoder.head.", "momentum_encoder.fc.", "momentum_encoder.head."),
    *("dino_head.", "ibot_head."),
)
# HVP's own ResNet for CIFAR calls a block's projection `shortcut`, torchvision's calls it `downsample`.
RENAMED = {".shortcut.": ".downsample."}
# The DINOv2 upstream puts the chunk into a block's name: blocks.<chunk>.<block>.
CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(\d+)\.")


@dataclass(frozen=True)
class BackboneMeta:
    """Origin of a backbone's weights."""

    path: Path
    """The file; for the folder of a run, the checkpoint in it."""
    format: Literal["hvp", "upstream", "bare"]
    which: Which | Literal["bare"]
    """The network; `bare` if the file does not name it."""
    method: str | None = None
    """The method that trained it; None if the file does not say."""
    epoch: int | None = None
    step: int | None = None
    config: Mapping[str, Any] | None = None
    """The resolved configuration, or the upstream's arguments; None if the file has neither."""
    dropped: tuple[str, ...] = ()
    """Keys of heads and losses, which were left out."""
    networks: tuple[str, ...] = ()
    """All networks that the file names."""
    prefix: str = ""
    """Prefix of the backbone's keys in the file."""
    described: Path | None = None
    """The description that `hvp convert` wrote beside the file, if it was used."""
    note: str = ""
    """Why an existing description was not used."""

    @property
    def image_size(self) -> int | None:
        """Side of the pretraining views in pixels; None if unknown.

        It is read from the plain mapping rather than through the method's configuration class, whose other keys may
        have changed since.
        """
        views = (self.config or {}).get("views")
        size = views.get("global_crops_size", views.get("crop_size")) if isinstance(views, Mapping) else None
        return size if isinstance(size, int) and size > 0 else None

    def summary(self) -> dict[str, Any]:
        """Entries for the result of an evaluation."""
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
        """Origin of the weights as one line for the user."""
        network = "the only network" if self.which == "bare" else f"the {self.which}"
        parts = [f"{self.path}: {network}" + (f" of {self.method}" if self.method else "")]
        parts += [f"{name} {number}" for name, number in (("epoch", self.epoch), ("step", self.step)) if number]
        if others := [name for name in self.networks if name != self.which]:
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
    """A backbone's weights under its own names, and their origin."""

    state: dict[str, Tensor]
    meta: BackboneMeta


def backbone_in(content: dict[str, Any], path: Path, which: Which | None = None) -> BackboneState:
    """Find the backbone's weights in the content of a file; the tensors are shared with `content`.

    Args:
        content: content of the file, see `read_content()`.
        path: the file; its description is read if there is one.
        which: as for `read_backbone_state()`.

    Raises:
        UserError: the content has no weights, or not the requested network.
    """
    content = _with_networks(content)
    ours = content.get("format") == FORMAT
    if ours:
        check_content(content, path, Header)
    description, note = (None, "") if ours else read_description(path)

    whole = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    networks = _encoders(whole) or {name: content[name] for name in ORDER if content.get(name) is not None}
    found: Which | Literal["bare"]
    if bare := not ours and networks.keys() <= {"model"}:
        found = "bare" if description is None or description.which is None else description.which
        weights, networks = whole, {}
        if which not in (None, found):
            raise UserError(
                f"{path}: this file does not say which of its weights are the {which}'s. It has one network; do not"
                " choose one."
            )
    else:
        found = next(iter(networks), "model") if which is None else which
        if found not in networks:
            raise UserError(
                f"{path}: this checkpoint has no {found}. It has: {', '.join(networks) or 'no network'}."
                " Choose one that it has."
            )
        weights = networks[found]
    if not _is_state(weights):
        raise UserError(f"{path}: this file holds {kind_of(weights)}, no weights. {EXPECTED}")

    state, dropped, prefix = _backbone(path, weights)
    epoch, config = content.get("epoch"), content.get("config" if ours else "args")
    config = vars(config) if isinstance(config, argparse.Namespace) else config
    meta = BackboneMeta(
        path,
        "hvp" if ours else "bare" if bare else "upstream",
        found,
        method=content["method"] if ours else None,
        epoch=epoch if isinstance(epoch, int) else None,
        step=content.get("step") if ours else None,
        config=config if isinstance(config, Mapping) else None,
        dropped=tuple(dropped),
        networks=tuple(networks),
        prefix=prefix,
        note=note,
    )
    if description is not None:
        meta = replace(
            meta,
            method=description.method,
            epoch=description.epoch if meta.epoch is None else meta.epoch,
            step=description.step,
            config=description.config or meta.config,
            described=described_in(path),
        )
    log.info("%s: %d tensors of the backbone (%s), %d of heads left out", path, len(state), found, len(dropped))
    return BackboneState(state, meta)


def _with_networks(content: dict[str, Any]) -> dict[str, Any]:
    """Split a `model` that holds student and teacher, as in the DINOv2 upstream, into two entries."""
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
    """Split a state dict that holds several encoders; each part keeps the keys that no other encoder owns."""
    owners = {
        key: name for key in weights for name in ENCODERS if str(key).removeprefix(WRAPPER).startswith(f"{name}.")
    }
    return {
        name: {key: value for key, value in weights.items() if owners.get(key, name) == name}
        for name in ENCODERS
        if name in owners.values()
    }


def _backbone(path: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], str]:
    """Return the backbone's weights under its own names, the names of dropped tensors, and the backbone's prefix."""
    names = from_libraries({key.removeprefix(WRAPPER): value for key, value in weights.items()})
    dropped = [name for name in names if name.startswith(HEADS)]
    rest = {name: value for name, value in names.items() if not name.startswith(HEADS)}
    if not rest:
        raise UserError(f"{path}: there is no backbone in this file, only a head: {listed(dropped)}.")
    prefix = next((prefix for prefix in BACKBONES if any(name.startswith(prefix) for name in rest)), "")
    if outside := [name for name in rest if not name.startswith(prefix)]:
        raise UserError(
            f"{path}: {len(outside)} tensors belong neither to the backbone nor to a known head: {listed(outside)}."
        )
    wrapper = WRAPPER if any(key.startswith(WRAPPER) for key in weights) else ""
    return {_own_name(name.removeprefix(prefix)): value for name, value in rest.items()}, dropped, wrapper + prefix


def _own_name(name: str) -> str:
    for foreign, own in RENAMED.items():
        name = name.replace(foreign, own)
    return CHUNKED_BLOCK.sub(r"blocks.\1.", name)


def kind_of(content: object) -> str:
    """Describe content that holds no weights, for messages."""
    if isinstance(content, dict):
        return f"a dict ({listed(list(map(str, content)))})"
    return f"a {type(content).__name__}"


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Join the first names for a message."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") if names else "none"
