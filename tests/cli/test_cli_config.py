"""`hvp config`: every key with its meaning, allowed values, default, and value in a preset."""

import pytest

from hvp.common.config.resolving import leaf_keys
from hvp.methods import METHODS, get_method


@pytest.mark.parametrize("method", METHODS)
def test_every_key_is_explained(hvp, method, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ran = hvp("config", method)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 80
    heads = [number for number, line in enumerate(lines[2:], start=2) if not line.startswith(" ")]
    assert [lines[number] for number in heads] == list(leaf_keys(get_method(method).config))
    for start, end in zip(heads, [*heads[1:], len(lines)], strict=True):
        explained = " ".join(line.strip() for line in lines[start + 1 : end])
        facts, _, meaning = explained.partition("; default ")
        assert facts, lines[start]
        assert meaning.partition(" ")[2], lines[start]  # more than the default


def test_a_key_a_section_and_a_preset(hvp):
    ran = hvp("config", "dino", "optim.base_lr", "--preset", "vitb16-400ep")
    assert ran.out.splitlines() == [
        "optim.base_lr",
        "    number from 1e-12 to 1e+06; default 0.0005; preset vitb16-400ep: 0.00075",
        "    Learning rate after warm-up, per 256 images: the run uses base_lr * batch_size / 256.",
    ]
    heads = [line for line in hvp("config", "dino", "data.shapes").out.splitlines() if not line.startswith(" ")]
    assert heads == ["data.shapes.size", "data.shapes.train", "data.shapes.val", "data.shapes.seed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dinno"], "unknown method dinno. Did you mean dino?"),
        (["dino", "optim.lr"], "unknown key optim.lr. Did you mean optim.base_lr?"),
        (["dino", "optimm"], "unknown key optimm."),
        (["dino", "--preset", "vitb16"], "Did you mean vitb16-400ep?"),
    ],
)
def test_unknown_names_are_refused(hvp, arguments, message):
    ran = hvp("config", *arguments)
    assert ran.code == 2
    assert message in ran.err


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optim.lr", "optim.base_lr"),
        ("lr", "optim.base_lr"),
        ("optim.learning_rate", "optim.base_lr"),
        ("optim.min_l", "optim.min_lr"),
        ("optim.warmup", "optim.warmup_epochs"),
        ("train.batch", "train.batch_size"),
        ("batch_size", "train.batch_size"),
        ("train.lr", "optim.base_lr"),
        ("loss.temp", "loss.warmup_teacher_temp or loss.teacher_temp or loss.warmup_teacher_temp_epochs"),
    ],
)
def test_an_unknown_key_suggests_the_likely_one(hvp, key, meant):
    ran = hvp("pretrain", "dino", "--set", f"{key}=3")
    assert (ran.code, ran.err) == (2, f"hvp: --set: unknown key {key}. Did you mean {meant}?\n")


@pytest.mark.parametrize("value", ["1,2", "0.5", "[0.5]", "[0.1, 0.5, 1]", "{a: 1}"])
def test_a_value_that_is_not_a_pair_gets_an_example(hvp, value):
    ran = hvp("pretrain", "dino", "--set", f"views.global_crops_scale={value}")
    assert ran.code == 2
    if value.startswith("{"):
        assert "unknown key views.global_crops_scale.a" in ran.err
    else:
        assert "takes two numbers from 0.0001 to 1" in ran.err
        assert "for example 'views.global_crops_scale=[0.4, 1.0]'" in ran.err


def test_a_run_that_cannot_fit_is_refused_and_leaves_no_files(hvp, tmp_path):
    values = ["--set", "model.out_dim=16777216", "--set", "model.head_bottleneck_dim=65536"]
    ran = hvp("pretrain", "dino", "--preset", "tiny", *values, "--device", "cpu", "--out", "run")
    assert ran.code == 2
    assert "the run needs at least 20.0 TiB of memory in each process" in ran.err
    assert not list(tmp_path.iterdir())
    ran = hvp("pretrain", "dino", "--preset", "tiny", *values, "--dry-run")
    assert ran.code == 0
    assert "least memory: 20.0 TiB on the device of a single process" in ran.out
