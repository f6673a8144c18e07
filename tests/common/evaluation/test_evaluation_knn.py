"""k-NN equals its definition written out with loops, for any chunk sizes; results are written and compared."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvp.common.errors import UserError
from hvp.common.evaluation.knn import KnnScore, evaluate_knn, knn_classify, nearest_neighbours
from hvp.common.evaluation.metrics import percent, rank_of_target
from hvp.common.evaluation.results import differences, free_path, write_result
from tests.common.evaluation.evaluation_toys import ToyEncoder, ToySource


def slow_knn(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, temperature: float) -> Any:
    """Top-1 and top-5 in percent: neighbours by (similarity, index), classes by (votes, index)."""
    hits = [0, 0]
    for image, target in zip(test.tolist(), test_labels.tolist(), strict=True):
        similarity = [sum(a * b for a, b in zip(image, other, strict=True)) for other in train.tolist()]
        nearest = sorted(range(len(similarity)), key=lambda i: (-similarity[i], i))[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            label = int(train_labels[i])
            votes[label] = votes.get(label, 0.0) + math.exp((similarity[i] - similarity[nearest[0]]) / temperature)
        ranking = sorted(votes, key=lambda c: (-votes[c], c))
        hits = [hits[0] + (target in ranking[:1]), hits[1] + (target in ranking[:5])]
    return [100 * hit / len(test) for hit in hits]


class Problem(NamedTuple):
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Features of +-1/4 in 16 dimensions: unit length, exact similarities and many ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_train, num_test = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    free = draw(st.integers(1, 16))  # dimensions in which images differ

    def features(rows: int) -> Tensor:
        signs = np.ones((rows, 16))
        signs[:, :free] = rng.choice([-1.0, 1.0], (rows, free))
        return torch.tensor(signs / 4, dtype=torch.float32)

    train, train_labels = features(num_train), torch.from_numpy(rng.integers(0, 7, num_train))
    test, test_labels = features(num_test), torch.from_numpy(rng.integers(0, 7, num_test))
    return Problem(train, train_labels, test, test_labels)


@settings(max_examples=60)
@given(problem=problems(), chunk_test=st.integers(1, 15), chunk_train=st.integers(1, 50), seed=st.integers(0, 2))
def test_scores_equal_the_definition_in_any_chunks(
    problem: Problem, chunk_test: int, chunk_train: int, seed: int
) -> None:
    ks = [[1, 3, 20], [40, 2], [7]][seed]
    scores = knn_classify(*problem, ks, 0.25, num_classes=7, chunk_test=chunk_test, chunk_train=chunk_train)
    assert list(scores) == ks
    for k in ks:
        assert [scores[k].top1, scores[k].top5] == pytest.approx(slow_knn(*problem, k, 0.25))
        assert scores[k].neighbours == min(k, len(problem.train))


@settings(max_examples=40)
@given(problem=problems(), k=st.integers(1, 40), chunk=st.integers(1, 50))
def test_the_first_of_equal_neighbours_is_taken(problem: Problem, k: int, chunk: int) -> None:
    train, test = problem.train, problem.test
    k = min(k, len(train))
    similarities, indices = nearest_neighbours(train, test, k, chunk_test=5, chunk_train=chunk)
    expected = (test @ train.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(indices, expected.indices[:, :k])
    assert torch.equal(similarities, expected.values[:, :k])


def test_features_are_normalised_and_may_be_half_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(300, 8, generator=generator), torch.randn(50, 8, generator=generator)
    labels = torch.arange(300) % 6
    one = knn_classify(train, labels, test, labels[:50], [5], num_classes=6)
    scaled = knn_classify(train * 7, labels, test * 0.1, labels[:50], [5], num_classes=6)
    assert one == scaled
    half = knn_classify(train.half(), labels, test.half(), labels[:50], [5], num_classes=6)
    assert half == knn_classify(train.half().float(), labels, test.half().float(), labels[:50], [5], num_classes=6)


def test_a_class_without_votes_is_no_hit() -> None:
    # All five neighbours are of class 1, so no other class may count, however the rest is ranked.
    train, test = torch.ones(5, 2), torch.ones(1, 2)
    for target in (0, 2, 5):
        scores = knn_classify(train, torch.ones(5, dtype=torch.int64), test, torch.tensor([target]), [5], num_classes=6)
        assert scores[5] == KnnScore(0.0, 0.0, 5)


def test_a_tiny_temperature_does_not_overflow() -> None:
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    scores = knn_classify(
        train, torch.tensor([1, 0, 0]), train[:1], torch.tensor([1]), [3], temperature=1e-4, num_classes=2
    )
    assert scores[3] == KnnScore(100.0, None, 3)


def test_top5_needs_five_classes() -> None:
    assert percent(torch.tensor([0, 1, 4, 5]), 6) == (25.0, 75.0)
    assert percent(torch.tensor([0, 1, 3, 3]), 4) == (25.0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": [0]}, "ks are"),
        ({"ks": []}, "ks are"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"num_classes": 2}, r"train labels are not in \[0, 2\)"),
        ({"test_labels": torch.zeros(3, dtype=torch.int64)}, r"test features are \[2, 4\], labels \[3\]"),
        ({"test_features": torch.ones(2, 5)}, r"train is \[3, 4\] but test is \[2, 5\]"),
        ({"test_features": torch.ones(0, 4), "test_labels": torch.ones(0, dtype=torch.int64)}, "test features"),
    ],
)
def test_arguments_that_do_not_fit_each_other(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "train_features": torch.ones(3, 4),
        "train_labels": torch.arange(3),
        "test_features": torch.ones(2, 4),
        "test_labels": torch.arange(2),
        "ks": [1],
        "num_classes": 3,
    }
    with pytest.raises(ValueError, match=message):
        knn_classify(**(arguments | change))


def test_rank_counts_ties_by_index_and_puts_nan_last() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [1.0, float("nan"), 3.0, 2.0]])
    assert [rank_of_target(scores, torch.full((2,), c)).tolist() for c in range(4)] == [[3, 3], [0, 3], [1, 1], [2, 2]]


def test_evaluation_reports_every_setting(tmp_path: Path) -> None:
    result = evaluate_knn(
        ToyEncoder(),
        ToySource(),
        ToySource(name="toy (val, 9 images)", length=9, seed=1),
        ks=(1, 10, 200),
        resolution=16,
        checkpoint={"path": "last.pt", "which": "teacher"},
    )
    assert [row["k"] for row in result["results"]] == [1, 10, 200]
    assert [row["top1"] for row in result["results"]][:2] == [100.0, 100.0]
    assert [row["neighbours"] for row in result["results"]] == [1, 10, 60]
    assert [row["top5"] for row in result["results"]] == [None] * 3
    assert result["notes"] == ["k = 200 is more than the 60 training images: all of them voted"]
    assert result["checkpoint"] == {"path": "last.pt", "which": "teacher"}
    assert result["settings"]["k"] == [1, 10, 200]
    assert (result["train"]["images"], result["val"]["images"]) == (60, 9)

    write_result(result, tmp_path / "new" / "knn.json")
    assert json.loads((tmp_path / "new" / "knn.json").read_text()) == result
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["knn.json"]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (ToySource(), ToySource(name="val", classes=None), "val: the images have no labels"),
        (ToySource(classes=None), ToySource(), "have no labels"),
        (ToySource(), ToySource(length=0, name="val"), "val: there are no images"),
        (ToySource(), ToySource(classes=("blue", "green", "yellow")), "Only in val: yellow; only in train: red"),
        (ToySource(), ToySource(classes=("blue", "green")), "Only in val: none; only in train: red"),
    ],
)
def test_unsuitable_sources_are_refused(train: ToySource, val: ToySource, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_knn(ToyEncoder(), train, val, resolution=16)


@pytest.mark.parametrize("change", [{"ks": [10, 0]}, {"ks": []}, {"temperature": 0.0}, {"temperature": -1.0}])
def test_settings_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="k-NN: "):
        evaluate_knn(ToyEncoder(), ToySource(), ToySource(), resolution=16, **change)


def result(**changes: Any) -> dict[str, Any]:
    checkpoint = {"path": "last.pt", "which": "teacher", "step": 40, "weights": "abc"}
    settings = {"k": (1, 10), "resolution": 32, "workers": 4, "device": "cpu"}
    whole = {"evaluation": "knn", "checkpoint": checkpoint, "train": {"name": "a"}, "settings": settings}
    return whole | {"results": [1.0], "seconds": 3.0} | changes


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"results": [2.0], "seconds": 9.0, "notes": []}, []),
        ({"settings": {**result()["settings"], "workers": 0, "device": "cuda"}}, []),
        ({"checkpoint": {**result()["checkpoint"], "path": "/elsewhere/last.pt"}}, []),
        ({"settings": {**result()["settings"], "k": [1]}}, ["k"]),
        ({"checkpoint": {**result()["checkpoint"], "weights": "abd"}}, ["checkpoint's weights"]),
        ({"train": {"name": "b"}}, ["train"]),
        ({"evaluation": "linear", "checkpoint": "?", "settings": 3}, ["evaluation", "k", "resolution"]),
    ],
)
def test_evaluations_are_distinguished_by_their_inputs(
    change: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "knn.json"
    write_result(result(), path)
    found = differences(result(**change), result())
    assert set(names) <= set(found)
    assert bool(found) == bool(names)
    assert free_path(path, result(**change))[0].name == ("knn-2.json" if names else "knn.json")


@pytest.mark.parametrize("there", ["[", '{"name": "mine"}', "", None])
def test_files_that_are_not_results_stay(there: str | None, tmp_path: Path) -> None:
    path = tmp_path / "knn.json"
    path.mkdir() if there is None else path.write_text(there)
    assert free_path(path, result()) == (tmp_path / "knn-2.json", ["what it is"])
    (tmp_path / "knn-2.json").symlink_to("nowhere")
    assert free_path(path, result())[0].name == "knn-3.json"


def test_a_result_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"knn\.json: "):
        write_result({"top1": 1.0}, tmp_path / "file" / "knn.json")
