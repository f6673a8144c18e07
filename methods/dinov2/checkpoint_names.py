"""DINOv2's checkpoints in the layout of facebookresearch/dinov2, train/train.py and train/ssl_meta_arch.py."""

import re

from hvp.common.convert.layouts import Layout, Part, on_meta
from hvp.common.networks.register_vision_transformer import SIZES
from hvp.methods.dinov2 import METHOD
from hvp.methods.dinov2.config import DINOv2Config

CHUNKS = 4
"""The upstream's `student.block_chunks`. It puts the chunk into a block's name: blocks.<chunk>.<block>."""


def upstream_layout(config: DINOv2Config) -> Layout:
    """Names of SSLMetaArch before FSDP shards it, and the `teacher` that the upstream's evaluations read."""
    student, teacher, dinov2_loss = on_meta(METHOD.build_modules, config)
    _, depth = SIZES[config.model.arch]
    chunk_size = max(1, depth // CHUNKS)

    def rename(key: str) -> str:
        return re.sub(r"^(backbone\.blocks)\.(\d+)\.", lambda m: f"{m[1]}.{int(m[2]) // chunk_size}.{m[2]}.", key)

    notes = [
        "the upstream's trainer saves and resumes FSDP shards, one file per process; its evaluations read `teacher`"
    ]
    if config.model.arch == "vit_micro":
        notes.append("the upstream has no network like vit_micro")
    return Layout(
        repository="facebookresearch/dinov2",
        parts=(
            Part("dinov2_loss", "model", dinov2_loss),
            Part("student", "model", student, prefix="student.", rename=rename),
            Part("teacher", "model", teacher, prefix="teacher.", rename=rename),
            Part("teacher", "teacher", teacher, rename=rename),
        ),
        optimizer=None,
        progress=lambda epoch, step: {"iteration": step - 1},
        notes=notes,
    )
