"""DINO's checkpoints in the layout of facebookresearch/dino, main_dino.py."""

from hvp.common.convert.layouts import Layout, Optimizer, Part, on_meta
from hvp.common.training.batch_norm import has_batch_norm
from hvp.common.training.optimizers import split_weight_decay
from hvp.methods.dino import METHOD
from hvp.methods.dino.config import DinoConfig


def upstream_layout(config: DinoConfig) -> Layout:
    """Upstream's entries, keys and parameter groups. It wraps the teacher only if there is batch norm."""
    student, teacher, dino_loss = on_meta(METHOD.build_modules, config)
    groups = split_weight_decay(student.named_parameters())
    notes = []
    if config.model.arch == "vit_micro":
        notes.append("the upstream has no network like vit_micro: its loaders can read the file, but not use it")
    return Layout(
        repository="facebookresearch/dino",
        parts=(
            Part("student", "student", student, wrapped=True),
            Part("teacher", "teacher", teacher, wrapped=has_batch_norm(student)),
            Part("dino_loss", "dino_loss", dino_loss),
        ),
        optimizer=Optimizer(config.optim.optimizer, groups, groups),
        scaler="fp16_scaler",
        notes=notes,
    )
