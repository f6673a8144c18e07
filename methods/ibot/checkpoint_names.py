"""iBOT's checkpoints in the layout of bytedance/ibot, main_ibot.py."""

from hvp.common.convert.layouts import Layout, Optimizer, Part, on_meta
from hvp.common.training.batch_norm import has_batch_norm
from hvp.common.training.optimizers import split_weight_decay
from hvp.methods.ibot import METHOD
from hvp.methods.ibot.config import IbotConfig


def upstream_layout(config: IbotConfig) -> Layout:
    """Upstream's entries, keys and parameter groups. It wraps the teacher only if there is batch norm."""
    student, teacher, ibot_loss = on_meta(METHOD.build_modules, config)
    groups = split_weight_decay(student.named_parameters())
    notes = []
    if config.model.arch == "vit_micro":
        notes.append("the upstream has no network like vit_micro")
    if not config.model.shared_head:
        notes.append("the teacher's head is also separate: the upstream needs --shared_head_teacher false")
    return Layout(
        repository="bytedance/ibot",
        parts=(
            Part("student", "student", student, wrapped=True),
            Part("teacher", "teacher", teacher, wrapped=has_batch_norm(student)),
            Part("ibot_loss", "ibot_loss", ibot_loss),
        ),
        optimizer=Optimizer(config.optim.optimizer, groups, groups),
        scaler="fp16_scaler",
        notes=notes,
    )
