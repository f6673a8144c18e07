"""Comparison of bytedance/ibot, with our patch, with our trainer."""

from typing import Any

from hvp.benchmarks.originals.harness import Batches, Checkpoints, Harness, normalized_views
from hvp.benchmarks.originals.on_cpu import Substitutes
from hvp.common.views import ViewBatch
from hvp.methods.ibot.main_ibot import build_masks


def no_clusters(_: object, *__: object, **___: object) -> tuple[float, float, float, float]:
    """Return zeros, in place of a measure of how well prototypes match labels; it is logged, not trained on."""
    return 0.0, 0.0, 0.0, 0.0


def batch_with_masks(batch: ViewBatch) -> list[Any]:
    """Return views, indices in place of labels, and the masks of global candidates. No loss reads other masks."""
    assert batch.masks is not None
    return [normalized_views(batch), batch.index, list(batch.masks)]


HARNESS = Harness(
    values={
        "data.shapes.train": 40,
        "train.batch_size": 4,
        "model.arch": "vit_tiny",
        "model.patch_size": 4,
        "model.drop_path_rate": 0.0,
        "model.out_dim": 96,
        "model.patch_out_dim": 96,
        "model.norm_last_layer": False,
        "masks.pred_ratio": [0.0, 0.4],
        "masks.pred_ratio_var": [0.0, 0.1],
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
    substitutes=Substitutes(
        {
            "models.vit_tiny": "hvp.benchmarks.originals.harness.vit_of_32_pixels",
            "evaluation.unsupervised.unsup_cls.eval_pred": "hvp.benchmarks.originals.ibot.no_clusters",
        }
    ),
    batches=Batches(batch_with_masks, masks=build_masks),
    checkpoints=Checkpoints({"student": "student", "teacher": "teacher", "ibot_loss": "ibot_loss"}),
    notes=(
        "the original's ViT is built for images of 32 pixels",
        "prototypes are not compared with labels for the log",
    ),
)
