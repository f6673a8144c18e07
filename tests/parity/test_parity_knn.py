"""Weighted k-NN compared with facebookresearch/dino's eval_knn.py."""

import pytest

from hvp.common.evaluation.knn import knn_classify
from tests.parity.fixtures import cases, load


@pytest.mark.parametrize("chunk", [7, 100, 100_000])
@pytest.mark.parametrize("case", cases("knn"))
def test_knn(case: str, chunk: int) -> None:
    fixture = load(case)
    scores = knn_classify(
        fixture.tensors["train_features"],
        fixture.tensors["train_labels"],
        fixture.tensors["test_features"],
        fixture.tensors["test_labels"],
        ks=[int(k) for k in fixture.scalars],
        temperature=fixture.config["T"],
        num_classes=fixture.config["num_classes"],
        chunk_test=chunk,
        chunk_train=chunk,
    )
    tolerance = fixture.tolerance["abs_percent"]
    for k, expected in fixture.scalars.items():
        assert scores[int(k)].top1 == pytest.approx(expected["top1"], abs=tolerance, rel=0)
        assert scores[int(k)].top5 == pytest.approx(expected["top5"], abs=tolerance, rel=0)
