"""Comparison of facebookresearch/simsiam, with our patch, with our trainer."""

from hvp.benchmarks.originals.harness import Harness
from hvp.benchmarks.originals.on_cpu import Substitutes

HARNESS = Harness(
    values={
        "data.shapes.train": 320,
        "train.batch_size": 32,
        "model.arch": "convnet_micro",
        "model.dim": 64,
        "model.pred_dim": 16,
        "optim.fix_pred_lr": False,
        "views.crop_size": 32,
    },
    substitutes=Substitutes({"torchvision.models.convnet_micro": "hvp.benchmarks.originals.harness.small_encoder"}),
    notes=("the encoder is our convnet_micro; the projector and the predictor are the original's",),
)
