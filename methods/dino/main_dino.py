"""DINO, with hard views: the trainer.

Shaped like the upstream's main_dino.py; `# hvp:` marks what is not in it. With `selection.hard_views: none` none of
that runs.

    # B images, G global and V = G + M candidate crops (G = 2, V = 2 + M without hard views), K prototypes

Source: facebookresearch/dino main_dino.py; HVP Algorithm 1.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hvp.common.data import ImageSource, open_dataset
from hvp.common.engine.distributed import (
    World,
    averaging,
    data_parallel,
    joined,
    share_of_batch,
    synchronised,
    unwrapped,
)
from hvp.common.engine.ema import update_ema
from hvp.common.engine.optimizers import build_optimizer, clip_gradients, split_weight_decay
from hvp.common.engine.precision import Precision, pick_device
from hvp.common.engine.run import Run, Stateful, available_workers, claimed, mix, seeded
from hvp.common.engine.schedules import warmup_cosine
from hvp.common.errors import UserError
from hvp.common.hardviews import Selection, gather_views, select
from hvp.common.views import MultiViewLoader
from hvp.common.views.normalize import normalize
from hvp.methods.dino.config import DinoConfig
from hvp.methods.dino.dino_loss import DINOLoss
from hvp.methods.dino.score import pair_losses
from hvp.methods.dino.vision_transformer import (
    DINOHead,
    MultiCropWrapper,
    ResNet50,
    VisionTransformer,
    build_backbone,
)

COLLAPSE_STEPS = 100
"""Steps in a row with the loss at ln K before the log warns of a collapse."""


def train_dino(
    config: DinoConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    console: Console | None = None,
    on_row: Callable[[Mapping[str, Any]], None] | None = None,
) -> Path:
    """Pretrains an encoder, in one process or as one of those that a launcher started.

    Args:
        config: what to do.
        out: the run's folder.
        resume: go on from the folder's last checkpoint.
        overwrite: delete an earlier run in the folder first.
        force: resume although the configuration differs.
        console: where progress goes; stderr if not given.
        on_row: told every row of the log; what it raises ends the run.

    Returns:
        The last checkpoint. `student` and `teacher` in it have the upstream's state-dict keys.

    Raises:
        UserError: something that the caller can mend, before the first step where it can be known by then.
        Stopped: a signal asked to stop.
    """
    console = console or Console(stderr=True)
    with joined() as world, ExitStack() as held:
        with world.agreeing():
            device = pick_device(config.train.device)
            precision = Precision(config.train.precision, device)
            held.enter_context(seeded(config.train.seed, device))
            loader = held.enter_context(closing(build_loader(config, open_training_data(config), device, world)))
            student, teacher = (synchronised(network, world, device) for network in build_networks(config, device))
            dino_loss = build_loss(config).to(device)
            optimizer = build_optimizer(config.optim.optimizer, split_weight_decay(student.named_parameters()))
        held.enter_context(claimed(out, world, resume=resume, overwrite=overwrite))
        parts: dict[str, Stateful] = {
            "student": student,
            "teacher": teacher,
            "dino_loss": dino_loss,
            "optimizer": optimizer,
            "precision": precision,
        }
        with Run(
            "dino", config, out, loader, parts, device, console, world, resume=resume, force=force, on_row=on_row
        ) as run:
            model = data_parallel(student, world, device)
            for epoch in run.epochs:
                train_one_epoch(model, teacher, dino_loss, optimizer, precision, run, epoch, config)
            return run.last_checkpoint


def open_training_data(config: DinoConfig) -> ImageSource:
    """The images to pretrain on.

    Raises:
        UserError: `data.path` is not given, or holds no images.
    """
    if config.data.path is None:
        raise UserError("no images to train on: give --data DIR, or --data shapes for the embedded dataset")
    return open_dataset(config.data.path, "train", shapes=config.data.shapes)


def build_loader(
    config: DinoConfig, source: ImageSource, device: torch.device, world: World = World()
) -> MultiViewLoader:
    """The multi-view loader of a configuration, for this process's share of every batch."""
    return MultiViewLoader(
        source,
        config.view_slots(),
        batch_size=share_of_batch(config.train.batch_size, config.train.accumulate, world),
        accumulate=config.train.accumulate,
        seed=config.train.seed,
        workers=available_workers(config.data.workers, device, world),
        pipeline=config.data.loader,
        on_bad_image=config.data.on_bad_image,
        rank=world.rank,
        world_size=world.size,
        pin_memory=device.type == "cuda",
    )


def build_encoder(config: DinoConfig, drop_path_rate: float = 0.0) -> VisionTransformer | ResNet50:
    """The backbone, with fresh weights."""
    return build_backbone(
        config.model.arch,
        patch_size=config.model.patch_size,
        img_size=config.views.global_crops_size,
        drop_path_rate=drop_path_rate,
    )


def build_networks(config: DinoConfig, device: torch.device) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Student and teacher, which start with the same weights. The teacher has no stochastic depth and no gradient."""
    model = config.model

    def build(drop_path_rate: float) -> MultiCropWrapper:
        backbone = build_encoder(config, drop_path_rate)
        head = DINOHead(
            backbone.embed_dim,
            model.out_dim,
            use_bn=model.use_bn_in_head,
            norm_last_layer=model.norm_last_layer,
            hidden_dim=model.head_hidden_dim,
            bottleneck_dim=model.head_bottleneck_dim,
        )
        return MultiCropWrapper(backbone, head).to(device)

    student, teacher = build(model.drop_path_rate), build(0.0)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher


def build_loss(config: DinoConfig) -> DINOLoss:
    """The objective, with its centre."""
    return DINOLoss(
        config.model.out_dim,
        2 + config.views.local_crops_number,
        config.loss.warmup_teacher_temp,
        config.loss.teacher_temp,
        config.loss.warmup_teacher_temp_epochs,
        config.train.epochs,
        student_temp=config.loss.student_temp,
        center_momentum=config.loss.center_momentum,
    )


def train_one_epoch(
    model: MultiCropWrapper | DistributedDataParallel,
    teacher: MultiCropWrapper,
    dino_loss: DINOLoss,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    run: Run,
    epoch: int,
    config: DinoConfig,
) -> None:
    """The steps of one epoch that are not done yet. `model` is the student, as `data_parallel()` gave it back."""
    student: MultiCropWrapper = unwrapped(model)
    optim, num_parts = config.optim, config.train.accumulate
    last_layer = list(student.head.last_layer.parameters())
    hvp = HardViews(student, teacher, dino_loss, config, run.total_steps, run.world.rank)
    at_chance = 0
    for it, parts in run.steps(epoch):
        # schedules are functions of the step
        lr = warmup_cosine(
            it,
            base=optim.base_lr * config.train.batch_size / 256,  # linear scaling rule
            final=optim.min_lr,
            total_steps=run.total_steps,
            warmup_steps=optim.warmup_epochs * run.steps_per_epoch,
        )
        wd = warmup_cosine(it, base=optim.weight_decay, final=optim.weight_decay_end, total_steps=run.total_steps)
        momentum = warmup_cosine(it, base=config.model.momentum_teacher, final=1.0, total_steps=run.total_steps)
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = lr
            group["weight_decay"] = wd if i == 0 else 0.0  # only the first group is regularised

        optimizer.zero_grad(set_to_none=True)
        step_loss = torch.zeros((), device=precision.device)
        kept = None
        for number, part in enumerate(parts, start=1):
            crops = [normalize(pixels) for pixels in part.to(precision.device, non_blocking=True).pixels]
            teacher_output = None
            with precision.autocast():
                if hvp.acts_on(it):  # hvp: train on the hardest combination of the sampled crops
                    with run.selecting.running():
                        kept, teacher_output = hvp.select(crops, it, epoch)
                        crops = kept.views
                else:
                    crops = hvp.first(crops)
                views = [crop.flatten(0, 1) for crop in crops]  # [2 B, ...] and [local B, ...]
                if teacher_output is None:
                    with torch.no_grad():
                        teacher_output = teacher(views[:1])  # [2 B, K]
                with averaging(model, on=number == num_parts):
                    student_output = model(views)  # [(2 + local) B, K]
                loss = dino_loss(student_output, teacher_output, epoch) / num_parts
            precision.backward(loss)
            dino_loss.center_step(teacher_output)
            step_loss += loss.detach()

        precision.unscale(optimizer)
        if optim.clip_grad:
            clip_gradients(student.parameters(), optim.clip_grad, by=optim.clip_by)
        if epoch < optim.freeze_last_layer:
            for parameter in last_layer:
                parameter.grad = None
        loss_value = run.check(step_loss, lr=lr, **precision.statistics())  # before a bad loss reaches the weights
        precision.step(optimizer)
        update_ema(teacher.parameters(), student.parameters(), momentum)
        dino_loss.update_center()

        statistics = precision.statistics() | (hvp.statistics(kept) if run.row_due else {})
        run.record(loss_value, lr=lr, weight_decay=wd, momentum=momentum, **statistics)
        at_chance = at_chance + 1 if abs(loss_value - math.log(config.model.out_dim)) < 1e-3 else 0
        if at_chance == COLLAPSE_STEPS:
            run.log.note(
                f"step {it + 1}: the loss has been ln(out_dim) = {math.log(config.model.out_dim):.3f} for "
                f"{COLLAPSE_STEPS} steps: the outputs are uniform (collapse). Lower the learning rate or the teacher "
                "temperature, or start selecting later (selection.start)"
            )


class HardViews:
    """hvp: the selection of crops to train on, for one trainer.

    Args:
        student, teacher, dino_loss: as they are trained; scoring changes none of them, except that networks with batch
            norm update their running statistics in `selection.mode: train`, as in HVP's released code.
        config: says what is sampled and how to select.
        total_steps: optimiser steps of the run, for `selection.start`.
        rank: this process's, for choices that are an image's own.
    """

    def __init__(
        self,
        student: MultiCropWrapper,
        teacher: MultiCropWrapper,
        dino_loss: DINOLoss,
        config: DinoConfig,
        total_steps: int,
        rank: int = 0,
    ):
        self.student, self.teacher, self.dino_loss = student, teacher, dino_loss
        self.selection, self.seed = config.selection, config.train.seed
        # A list of combinations that a batch shares is the same in all processes. What is drawn for every image is not.
        drawn_per_image = config.selection.per_image or config.selection.policy == "random"
        self.stream = (rank,) if rank and drawn_per_image else ()
        self.slots = config.combination_slots()
        self.first_candidates = config.first_candidates()
        self.first_step = math.ceil(config.selection.start * total_steps)
        # With batch norm the outputs of the kept crops depend on the batch they are computed in.
        self.reuses_teacher = not _has_batch_norm(teacher)

    def acts_on(self, step: int) -> bool:
        """Whether this step selects: more than one combination, and `selection.start` and `.every` say so."""
        return (
            self.slots.num_combinations > 1
            and step >= self.first_step
            and (step - self.first_step) % self.selection.every == 0
        )

    def first(self, crops: list[Tensor]) -> list[Tensor]:
        """The first candidates of every slot: the crops of a vanilla step."""
        if self.slots.keeps_all(self.slots.num_views):
            return crops
        index = torch.tensor(self.first_candidates, device=crops[0].device)
        return gather_views(crops, index.expand(crops[0].shape[1], -1), self.slots)

    @torch.no_grad()
    def select(self, crops: list[Tensor], step: int, epoch: int) -> tuple[Selection, Tensor | None]:
        """Scores every crop and keeps the combination that the policy asks for.

        Args:
            crops: [G, B, 3, H, W] global and [M, B, 3, h, w] local candidates, normalised.
            step: optimiser step; with the seed it decides which combinations are compared.
            epoch: decides the teacher's temperature.

        Returns:
            The selection, and the teacher's logits of the kept global crops, [2 B, K], where computing them again in
            the training step could not change them; otherwise None.
        """
        num_global, batch = crops[0].shape[:2]
        if self.selection.mode == "eval":
            self.student.eval()
            self.teacher.eval()
        views = [crop.flatten(0, 1) for crop in crops]
        teacher_logits = self.teacher(views[:1]).unflatten(0, (num_global, batch))  # [G, B, K]
        student_embeddings = self.student.embed(views).unflatten(0, (-1, batch))  # [V, B, bottleneck]
        losses = pair_losses(
            teacher_logits,
            student_embeddings,
            self.dino_loss.center,
            self.dino_loss.teacher_temp(epoch),
            self.dino_loss.student_temp,
            prototypes=self.student.head.last_layer.frozen(),
        )
        self.student.train()
        self.teacher.train()
        generator = torch.Generator().manual_seed(mix(self.seed, step, *self.stream))
        kept = select(
            crops,
            losses,
            self.slots,
            search=self.selection.search,
            comparisons=self.selection.comparisons,
            per_image=self.selection.per_image,
            policy=self.selection.policy,
            generator=generator,
        )
        if not self.reuses_teacher:
            return kept, None
        images = torch.arange(batch, device=losses.device)
        return kept, teacher_logits[kept.index[:, :2].T, images].flatten(0, 1)  # [2 B, K]

    def statistics(self, kept: Selection | None) -> dict[str, float | list[float]]:
        """For the log: which share of the images keeps each sampled crop, and images without a finite loss."""
        if kept is None:
            return {}
        counts = torch.bincount(kept.index.flatten(), minlength=self.slots.num_views)
        return {
            "kept_hist": (counts / len(kept.index)).tolist(),
            "kept_loss": kept.loss.mean().item(),
            "no_finite_loss": float(kept.fallback.sum()),
        }


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
