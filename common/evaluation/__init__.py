"""What a frozen encoder is worth: weighted k-NN and linear probing, from anybody's checkpoint."""

from hvp.common.evaluation.checkpoints import (
    BackboneMeta,
    BackboneState,
    load_complete,
    load_encoder,
    read_backbone_state,
)
from hvp.common.evaluation.features import extract
from hvp.common.evaluation.knn import KnnScore, evaluate_knn, knn_classify
from hvp.common.evaluation.linear import LinearOptions, evaluate_linear
from hvp.common.evaluation.results import write_result

__all__ = [
    "BackboneMeta",
    "BackboneState",
    "KnnScore",
    "LinearOptions",
    "evaluate_knn",
    "evaluate_linear",
    "extract",
    "knn_classify",
    "load_complete",
    "load_encoder",
    "read_backbone_state",
    "write_result",
]
