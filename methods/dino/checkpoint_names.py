"""DINO's checkpoints in the layout of facebookresearch/dino, main_dino.py."""

from hvp.common.convert.upstream import Layout, Optimizer, Part, on_meta
from hvp.common.training.batch_norm import has_batch_norm
from hvp.common.training.optimizers import split_weight_decay
from hvp.methods.dino import METHOD
from hvp.methods.dino.config import DinoConfig


def upstream_layout(config: DinoConfig) -> Layout:
    """The upstream's entries, keys and parameter groups. It wraps the teacher for batch norm's sake only."""
    student, teacher, dino_loss = on_meta(METHOD.build_modules, config)
    groups = split_weight_decay(student.named_parameters())
    ours_alone = config.model.arch == "vit_micro"
    return Layout(
        repository="facebookresearch/dino",
        parts=(
            Part("student", "student", student, wrapped=True),
            Part("teacher", "teacher", teacher, wrapped=has_batch_norm(student)),
            Part("dino_loss", "dino_loss", dino_loss),
        ),
        optimizer=Optimizer(config.optim.optimizer, groups, groups),
        scaler="fp16_scaler",
        notes=("the upstream has no network like vit_micro: its loaders take the file apart, and have no use for it",)
        if ours_alone
        else (),
    )
