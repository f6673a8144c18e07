"""The `tiny` presets learn the embedded dataset, with and without hard views, in fewer steps than the presets have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hvp.common.data import open_dataset
from hvp.common.evaluation.knn import evaluate_knn
from hvp.methods import get_method
from tests.runs import tiny

HVP = str(Path(sys.executable).with_name("hvp"))


def hvp(*arguments: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([HVP, *map(str, arguments)], check=True, env=environment, stdout=subprocess.DEVNULL)


def untrained_top1(method: str) -> float:
    config = tiny(get_method(method).config, method)
    train, val = (open_dataset("shapes", split, shapes=config.data.shapes, labels=True) for split in ("train", "val"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        encoder = get_method(method).build_encoder(config)
    result = evaluate_knn(encoder, train, val, ks=[20], resolution=config.view_slots()[0].transform.size)
    top1: float = result["results"][0]["top1"]
    return top1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "epochs", "gain", "hard_views"),
    [
        ("simclr", 5, 20, "none"),
        ("simclr", 5, 20, "hvp"),
        ("simsiam", 4, 10, "none"),
        ("simsiam", 4, 10, "hvp"),
        ("mocov3", 6, 15, "none"),  # with Rescue, as in its preset
        ("dinov2", 4, 10, "none"),
    ],
)
def test_k_nn_rises_well_above_the_untrained_network(tmp_path, method, epochs, gain, hard_views):
    """The required gain is about half of the observed one."""
    run, result = tmp_path / "run", tmp_path / "knn.json"
    hvp("pretrain", method, "--preset", "tiny", "--epochs", epochs, "--hard-views", hard_views, "--out", run)
    hvp("eval", "knn", run, "--data", "shapes", "--k", 20, "--out", result)
    assert json.loads(result.read_text())["results"][0]["top1"] > untrained_top1(method) + gain
