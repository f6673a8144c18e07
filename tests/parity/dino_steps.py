"""Complete DINO training steps as the step fixtures define them, by the trainer's own loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hvp.benchmarks.given_steps import GivenSteps
from hvp.common.hardviews import Selection, Slots, select
from hvp.common.networks.heads import DINOHead
from hvp.common.networks.vision_transformer import VisionTransformer
from hvp.common.training import selecting, step
from hvp.common.training.optimizers import build_optimizer, split_weight_decay
from hvp.common.views import ViewBatch
from hvp.methods.dino import main_dino
from hvp.methods.dino.config import DinoConfig
from hvp.methods.dino.dino_loss import DINOLoss
from hvp.methods.dino.multi_crop import MultiCropWrapper
from tests.parity.fixtures import Fixture


def formula_images(batch: int, height: int, width: int, shift: int) -> Tensor:
    """The images of `config.input_formula`, [batch, 3, height, width] float32."""
    b, c, i, j = torch.meshgrid(*(torch.arange(n) for n in (batch, 3, height, width)), indexing="ij")
    return (((3 * i * j + 7 * i + 13 * j + 29 * c + 53 * b * (1 + i // 16) + shift) % 64) - 32) / 16


@dataclass
class Outcome:
    """Contents of the fixture: losses and selections per step, networks and centre per epoch, schedules per step."""

    losses: list[float] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)
    student: list[dict[str, Tensor]] = field(default_factory=list)
    teacher: list[dict[str, Tensor]] = field(default_factory=list)
    center: list[Tensor] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    weight_decay: list[float] = field(default_factory=list)
    momentum: list[float] = field(default_factory=list)


def batches(f: Fixture) -> list[list[ViewBatch]]:
    """The crops of every step; their pixels are normalised already."""
    steps = range(f.config["epochs"] * f.config["niter"])
    return [[ViewBatch(crops(f, step), torch.empty(0), torch.arange(f.config["B"]))] for step in steps]


def crops(f: Fixture, step: int) -> list[Tensor]:
    """All crops of a step, in the loader's order: of the fixture's globals the even ones are the first transform's."""
    c = f.config
    size, small, shift = c["img_size"], c["local_px"], 11 * step
    num_globals, num_locals = c.get("ng", 2), c.get("nload", c["nl"])
    order = [*range(0, num_globals, 2), *range(1, num_globals, 2)]
    return [
        torch.stack([formula_images(c["B"], size, size, shift + v) + 0.25 * v for v in order]),
        torch.stack([formula_images(c["B"], small, small, shift + 5 + v) - 0.25 * v for v in range(num_locals)]),
    ]


def in_loader_order(combinations: Tensor, num_globals: int) -> Tensor:
    """The fixture's view numbers as the loader numbers the same views."""
    order = [*range(0, num_globals, 2), *range(1, num_globals, 2)]
    renumbered = torch.arange(int(combinations.max()) + 1)
    renumbered[order] = torch.arange(num_globals)
    return renumbered[combinations]


def train(f: Fixture) -> Outcome:
    """Runs the fixture's epochs; where it lists combinations, with hard views."""
    c, outcome = f.config, Outcome()
    student, teacher, dino_loss = build(f)
    optimizer = build_optimizer("adamw", split_weight_decay(student.named_parameters()))

    def select_listed(views: list[Tensor], pair_loss: Tensor, slots: Slots, **options: Any) -> Selection:
        combinations = in_loader_order(f.tensors["combinations"][len(outcome.selections)], c["ng"])
        outcome.selections.append(select(views, pair_loss, slots, combinations=combinations, **options))
        return outcome.selections[-1]

    # Fused attention computes its probabilities again in the backward pass. Their rounding is harmless, except to the
    # key bias: its gradient is zero but for rounding, and Adam takes a step of up to lr along whatever it is given.
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(step, "normalize", lambda pixels: pixels)
        patch.setattr(selecting, "select", select_listed)
        config, given = config_of(f), batches(f)
        for epoch in range(c["epochs"]):
            run = GivenSteps(config, student, given[epoch * c["niter"] :][: c["niter"]])
            main_dino.train_one_epoch(run, main_dino.Parts(student, teacher, dino_loss, optimizer), epoch, config)
            for row in run.rows:
                outcome.losses.append(row["loss"])
                for name in ("lr", "weight_decay", "momentum"):
                    getattr(outcome, name).append(row[name])
            for kept, state in ((outcome.student, student.state_dict()), (outcome.teacher, teacher.state_dict())):
                kept.append({key: value.clone() for key, value in state.items()})
            outcome.center.append(dino_loss.center.clone())
    return outcome


def config_of(f: Fixture) -> DinoConfig:
    """The fixture's settings as a configuration. Its networks are built by `build`."""
    c = f.config
    hard = "combinations" in f.tensors
    return DinoConfig.model_validate(
        {
            "model": {"out_dim": c["K"], "momentum_teacher": c["m"], "patch_size": c["patch_size"]},
            "optim": {
                "base_lr": c["lr"],  # at a batch of 256
                "min_lr": c["min_lr"],
                "warmup_epochs": c["warmup"],
                "weight_decay": c["wd"],
                "weight_decay_end": c["wd_end"],
                "clip_grad": c["clip"],
                "clip_by": "global" if hard else "tensor",  # the released hard-view code differs here
                "freeze_last_layer": c["freeze"],
            },
            "views": {
                "global_crops_size": c["img_size"],
                "local_crops_size": c["local_px"],
                "local_crops_number": c["nl"],
            },
            "selection": {
                "hard_views": "hvp" if hard else "none",
                "global_candidates": c.get("ng", 2) // 2,
                "local_candidates": c.get("nload", c["nl"]),
            },
            "train": {"epochs": c["epochs"], "batch_size": 256},
        }
    )


def build(f: Fixture) -> tuple[MultiCropWrapper, MultiCropWrapper, DINOLoss]:
    """Student and teacher of a step fixture, both with the weights `student0.*`, and the loss."""
    c = f.config

    def network(norm_last_layer: bool) -> MultiCropWrapper:
        backbone = VisionTransformer(
            img_size=c["img_size"],
            patch_size=c["patch_size"],
            embed_dim=c["embed_dim"],
            depth=c["depth"],
            num_heads=c["num_heads"],
            mlp_ratio=c["mlp_ratio"],
        )
        head = DINOHead(c["embed_dim"], c["K"], norm_last_layer=norm_last_layer, **c["head"])
        wrapper = MultiCropWrapper(backbone, head)
        wrapper.load_state_dict(f.group("student0"))
        return wrapper

    dino_loss = DINOLoss(
        c["K"],
        2 + c["nl"],
        c["warmup_teacher_temp"],
        c["teacher_temp"],
        c["warmup_teacher_temp_epochs"],
        c["epochs"],
    )
    return network(c["norm_last_layer"]), network(norm_last_layer=True).requires_grad_(False), dino_loss


def assert_outcome(f: Fixture, outcome: Outcome) -> None:
    """Losses, schedules, centres and every parameter of both networks, at the fixture's tolerances."""
    c, t = f.config, f.tensors
    torch.testing.assert_close(
        torch.tensor(outcome.losses), t["losses"], rtol=f.tolerance["losses"]["rtol"], atol=0.0, msg=_named("losses")
    )
    for name in ("lr", "weight_decay", "momentum"):
        schedule = torch.tensor(getattr(outcome, name), dtype=torch.float64)
        torch.testing.assert_close(schedule, t[name], rtol=1e-12, atol=1e-15, msg=_named(name))
    tolerance = f.tolerance["parameters"]
    for epoch in range(c["epochs"]):
        # The key third of a qkv bias has no gradient but for rounding, see `train`: in a step it moves by up to lr.
        furthest = t["lr"][: (epoch + 1) * c["niter"]].sum().item()
        center = t[f"center_epoch{epoch + 1}"]
        torch.testing.assert_close(outcome.center[epoch], center, **tolerance, msg=_named(f"centre, epoch {epoch}"))
        for name, states in (("student", outcome.student), ("teacher", outcome.teacher)):
            expected = f.group(f"{name}_epoch{epoch + 1}")
            assert states[epoch].keys() == expected.keys()
            for key, value in states[epoch].items():
                where = f"{name}, epoch {epoch}, {key}"
                if key.endswith("attn.qkv.bias"):
                    q, k, v = value.chunk(3)
                    q_expected, k_expected, v_expected = expected[key].chunk(3)
                    torch.testing.assert_close(k, k_expected, rtol=0.0, atol=furthest, msg=_named(where))
                    value, expected[key] = torch.cat((q, v)), torch.cat((q_expected, v_expected))
                torch.testing.assert_close(value, expected[key], **tolerance, msg=_named(where))


def _named(what: str) -> Callable[[str], str]:
    return lambda message: f"{what}: {message}"
