"""Comparison of facebookresearch/dino, with our patch, with our trainer."""

from hvp.benchmarks.originals.harness import Checkpoints, Harness
from hvp.benchmarks.originals.on_cpu import Substitutes

HARNESS = Harness(
    values={
        "data.shapes.train": 40,
        "train.batch_size": 4,
        "model.arch": "vit_tiny",
        "model.patch_size": 8,
        "model.drop_path_rate": 0.0,
        "model.out_dim": 96,
        "model.norm_last_layer": False,
        "loss.warmup_teacher_temp_epochs": 1,
        "loss.teacher_temp": 0.07,
        "optim.base_lr": 0.0064,  # 1e-4 at 4 images: large enough to move in so few steps
        "optim.warmup_epochs": 1,
        "views.global_crops_size": 32,
        "views.local_crops_size": 16,
        "views.local_crops_number": 2,
        "selection.local_candidates": 4,
        "selection.comparisons": 5,
    },
    substitutes=Substitutes({"vision_transformer.vit_tiny": "hvp.benchmarks.originals.harness.vit_of_32_pixels"}),
    checkpoints=Checkpoints({"student": "student", "teacher": "teacher", "dino_loss": "dino_loss"}),
    notes=("the original's ViT is built for images of 32 pixels",),
)
