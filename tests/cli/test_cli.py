"""The `hvp` command through its entry point: its output, its files and its error messages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hvp.cli import output
from hvp.cli.main import main
from hvp.common.errors import UserError
from hvp.common.evaluation import results
from hvp.common.evaluation.checkpoints import load_encoder
from hvp.methods import METHODS, presets

SMALL = [
    *("--set", "data.shapes.train=40", "--set", "data.shapes.val=20", "--set", "data.shapes.size=32"),
    *("--epochs", "1", "--batch-size", "8", "--workers", "0"),
]
QUICK = [*SMALL, "--set", "optim.warmup_epochs=1"]


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")


@pytest.fixture
def imagenet(tmp_path) -> Path:
    """A folder laid out like ImageNet: 2 classes with 20 training and 10 validation images each."""
    for split, count in (("train", 20), ("val", 10)):
        for number, name in enumerate(("n01", "n02")):
            write_images(tmp_path / "imagenet" / split / name, count, seed=number)
    return tmp_path / "imagenet"


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A finished run on a few shapes; do not change it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hvp", "pretrain", "dino", "--preset", "tiny", *QUICK, "--out", str(out)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return out


@pytest.fixture
def run_folder(hvp, tmp_path, finished_run) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_the_installed_command_answers():
    command = Path(sys.executable).with_name("hvp")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0
    for name in ("pretrain", "eval", "presets", "analyze", "demo", "doctor", "launch", "patch"):
        assert name in done.stdout


def test_an_error_is_one_message_and_exit_code_2():
    command = Path(sys.executable).with_name("hvp")
    done = subprocess.run([command, "pretrain", "dinno"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"hvp: unknown method dinno. Did you mean dino? Known: {', '.join(METHODS)}\n"


def test_pretrain_evaluate_resume(hvp, run_folder, tmp_path):
    ran = hvp("eval", "knn", "run/last.pt", "--data", "shapes", "--workers", "0", "--k", "5", "--k", "100")
    assert ran.code == 0, ran.err
    assert "k = 5" in ran.out
    assert "100 is more than the 40 training images" in ran.out
    result = json.loads((run_folder / "last-knn-teacher-k=5,100.json").read_text())
    assert [row["k"] for row in result["results"]] == [5, 100]
    assert result["settings"]["resolution"] == 32
    assert result["checkpoint"]["which"] == "teacher"

    ran = hvp(
        *("eval", "linear", "run", "--data", "shapes", "--workers", "0", "--epochs", "2", "--no-augment"),
        *("--which", "student", "--out", "linear.json"),
    )
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "linear.json").read_text())["settings"]["n_last_blocks"] == 3

    ran = hvp("pretrain", "dino", "--preset", "tiny", *QUICK, "--out", "run", "--resume")
    assert ran.code == 0
    assert "continuing after step 5 of 5" in ran.err


def test_the_linear_protocol_is_that_of_the_checkpoints_method(hvp, tmp_path):
    assert hvp("pretrain", "simsiam", "--preset", "tiny", *SMALL, "--out", "run").code == 0
    asked = ["eval", "linear", "run", "--data", "shapes", "--workers", "0", "--no-augment", "--epochs", "1"]
    asked += ["--out", "linear.json"]
    for arguments, message, expected in (
        ((), "protocol: simsiam, 1 epochs of lars, base lr 0.1, batch size 4096", ("lars", 0.1, 4096)),
        (("--preset", "dino"), "protocol: dino, 1 epochs of sgd, base lr 0.00075", ("sgd", 0.00075, 1024)),
        (("--optimizer", "sgd", "--base-lr", "3", "--batch-size", "8"), "simsiam, 1 epochs of sgd", ("sgd", 3.0, 8)),
    ):
        ran = hvp(*asked, *arguments)
        assert ran.code == 0, ran.err
        assert message in ran.err
        settings = json.loads(Path("linear.json").read_text())["settings"]
        assert (settings["optimizer"], settings["base_lr"], settings["batch_size"]) == expected
        assert settings["resolution"] == 32
    ran = hvp(*asked, "--preset", "simsam")
    assert (ran.code, "Did you mean simsiam?" in ran.err) == (2, True)
    ran = hvp("eval", "knn", "run", "--data", "shapes", "--which", "teacher")
    assert (ran.code, "has no teacher. It has: model" in ran.err) == (2, True)


@pytest.mark.parametrize(("arch", "base_lr"), [("convnet_micro", 0.1), ("vit_micro", 3.0)])
def test_the_linear_protocol_of_a_vit_may_differ_and_sets_its_features(hvp, tmp_path, arch, base_lr):
    trained = ("pretrain", "mocov3", "--preset", "tiny", *SMALL, "--set", f"model.arch={arch}", "--out", "run")
    assert hvp(*trained).code == 0
    asked = ("eval", "linear", "run", "--data", "shapes", "--workers", "0", "--no-augment", "--epochs", "1")
    ran = hvp(*asked)
    assert ran.code == 0, ran.err
    result = json.loads((tmp_path / "run" / "last-linear-base_encoder-epochs=1-augment=no.json").read_text())
    read = ("optimizer", "base_lr", "batch_size", "n_last_blocks", "avgpool")
    assert [result["settings"][key] for key in read] == ["sgd", base_lr, 1024, 1, False]
    if arch == "vit_micro":
        assert hvp(*asked, "--n-last-blocks", "2", "--which", "momentum_encoder").code == 0
        result = json.loads(
            (tmp_path / "run" / "last-linear-momentum_encoder-epochs=1-n_last_blocks=2-augment=no.json").read_text()
        )
        assert result["settings"]["n_last_blocks"] == 2


def test_images_without_labels_are_enough(hvp, tmp_path):
    write_images(tmp_path / "pictures", 12)
    ran = hvp("pretrain", "dino", "--preset", "tiny", *QUICK, "--data", "pictures", "--out", "run")
    assert ran.code == 0, ran.err
    assert (tmp_path / "run" / "last.pt").exists()


def test_the_default_folder_names_method_preset_and_seed(hvp, tmp_path):
    assert hvp("pretrain", "dino", "--preset", "tiny", *QUICK, "--seed", "3").code == 0
    assert (tmp_path / "runs" / "dino" / "tiny" / "seed3" / "last.pt").exists()


def test_dry_run_shows_table_8(hvp, imagenet, tmp_path):
    ran = hvp("pretrain", "dino", "--preset", "vits16-100ep", "--data", imagenet, "--batch-size", "4", "--dry-run")
    assert ran.code == 0, ran.err
    shown = {line.split()[0]: line.split()[1:] for line in ran.out.splitlines() if line.split()}
    expected = {  # HVP paper, Table 8
        "train.epochs": "100",
        "optim.warmup_epochs": "10",
        "optim.optimizer": "adamw",
        "optim.base_lr": "0.0005",
        "optim.min_lr": "1e-06",
        "optim.weight_decay": "0.04",
        "optim.weight_decay_end": "0.4",
        "model.out_dim": "65536",
        "model.norm_last_layer": "True",
        "model.momentum_teacher": "0.996",
        "loss.teacher_temp": "0.04",
        "loss.warmup_teacher_temp_epochs": "0",
        "optim.freeze_last_layer": "1",
        "optim.clip_grad": "3.0",
        "model.drop_path_rate": "0.1",
        "train.precision": "fp16",
        "views.local_crops_number": "8",
        "selection.comparisons": "128",
    }
    for key, value in expected.items():
        assert shown[key] == [value, "preset", "vits16-100ep"], key
    assert shown["train.batch_size"] == ["4", "--batch-size"]
    assert "10 per epoch, 1000 in all" in ran.out
    assert "128 of 51480" in ran.out
    assert "1.00 MiB per image" in ran.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", presets("dino"))
def test_every_preset_resolves_and_is_printed(hvp, name):
    ran = hvp("pretrain", "dino", "--preset", name, "--dry-run")
    assert ran.code == 0, ran.err
    text = hvp("presets", "dino", name).out
    assert f"--preset {name}" in text
    assert "Measured" in text
    assert name in hvp("presets", "dino").out
    assert name in hvp("presets").out


def test_precedence_of_the_configuration_file(hvp, tmp_path):
    (tmp_path / "mine.yaml").write_text("train:\n  epochs: 7\n  seed: 5\n")
    ran = hvp("pretrain", "dino", "--preset", "tiny", "--config", "mine.yaml", "--seed", "6", "--dry-run")
    shown = {line.split()[0]: line.split()[1:] for line in ran.out.splitlines() if line.split()}
    assert shown["train.epochs"] == ["7", "mine.yaml"]
    assert shown["train.seed"] == ["6", "--seed"]
    assert shown["train.batch_size"][1:] == ["preset", "tiny"]


def test_nothing_is_read_from_the_working_directory(hvp, tmp_path):
    for name in ("config.yaml", "pretrain.yaml", "tiny.yaml"):
        (tmp_path / name).write_text("train: {epochs: 99}\n")
    assert "99" not in hvp("pretrain", "dino", "--preset", "tiny", "--dry-run").out


def test_a_bad_image_is_named_or_skipped(hvp, imagenet, tmp_path):
    bad = imagenet / "train" / "n01" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    arguments = ["pretrain", "dino", "--preset", "tiny", *QUICK, "--data", imagenet]
    ran = hvp(*arguments, "--out", "a")
    assert ran.code == 2
    assert str(bad) in ran.err
    assert "--on-bad-image skip" in ran.err
    ran = hvp(*arguments, "--out", "b", "--on-bad-image", "skip")
    assert ran.code == 0
    assert f"1 images could not be read and were replaced:\n  {bad}" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--data", "empty"], "empty"),
        (["--data", "file.txt"], "file.txt"),
        (["--data", "shapes", "--batch-size", "7000"], "fewer than one batch of 7000"),
        (["--preset", "tiney"], "Did you mean tiny?"),
        (["--set", "optim.bas_lr=1"], "Did you mean optim.base_lr?"),
        (["--set", "optim.base_lr=fast"], "optim.base_lr = 'fast'"),
        (["--config", "none.yaml"], "none.yaml: cannot be read"),
        (["--data", "shapes", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
        (["--data", "shapes", "--resume", "--overwrite"], "exclude each other"),
        (["--data", "shapes", "--out", "file.txt"], "file.txt: cannot be used as output folder"),
        (["--data", "shapes", "--out", "file.txt/x"], "cannot be used as output folder"),
        (["--precision", "fp8"], "fp8"),
        (["--epochs", "many"], "valid integer"),
        ([], "no images to train on"),
    ],
)
def test_errors_are_one_message_and_leave_no_files(hvp, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    preset = [] if "--preset" in arguments else ["--set", "model.arch=vit_micro"]
    ran = hvp("pretrain", "dino", *preset, *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unwritable_folder_is_refused_before_training(hvp, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # the superuser may write anywhere
    ran = hvp("pretrain", "dino", "--preset", "tiny", *QUICK, "--out", "run")
    assert ran.code == 2
    assert "run: cannot be used as output folder: Permission denied" in ran.err


def test_foreign_checkpoints_are_refused_by_name(hvp, tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save({"pos_embed": torch.zeros(1, 5, 96)}, tmp_path / "part.pt")
    for name in ("text.pt", "foreign.pt", "part.pt", "missing.pt"):
        ran = hvp("eval", "knn", name, "--data", "shapes")
        assert ran.code == 2
        assert name in ran.err


def test_a_checkpoint_that_lacks_a_weight_is_refused(hvp, run_folder, tmp_path):
    content = torch.load(run_folder / "last.pt", weights_only=True)
    del content["teacher"]["backbone.blocks.1.attn.qkv.weight"]
    content["teacher"]["backbone.extra"] = torch.zeros(1)
    torch.save(content, tmp_path / "damaged.pt")
    ran = hvp("eval", "knn", "damaged.pt", "--data", "shapes")
    assert ran.code == 2
    assert "blocks.1.attn.qkv.weight" in ran.err
    assert "extra" in ran.err


def test_evaluating_on_unlabelled_images_is_refused(hvp, run_folder, tmp_path):
    write_images(tmp_path / "pictures", 3)
    ran = hvp("eval", "knn", "run", "--data", "pictures")
    assert ran.code == 2
    assert "pictures" in ran.err


def test_an_unwritable_result_is_refused_before_evaluating(hvp, run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    ran = hvp("eval", "knn", "run", "--data", "shapes", "--out", "file/result.json")
    assert ran.code == 2
    assert "cannot be written" in ran.err


def knn(hvp, *arguments):
    return hvp("eval", "knn", "run", "--data", "shapes", "--workers", "0", *arguments)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_result_that_cannot_be_saved_is_printed(hvp, run_folder, monkeypatch, moment):
    """The folder is read-only from the start, or becomes full or read-only during the evaluation."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    if moment == "before":
        monkeypatch.setattr(results.tempfile, "TemporaryFile", refuse)  # the superuser may write anywhere
    else:
        monkeypatch.setattr(results, "write_atomically", lambda path, _: refuse_named(path))

    def refuse_named(path):
        raise UserError(f"{path}: cannot be written: No space left on device")

    ran = knn(hvp, "--k", "5")
    assert ran.code == 2
    assert "k = 5" in ran.out
    assert "wrote" not in ran.out
    assert "last-knn-teacher-k=5.json: cannot be written" in ran.err.splitlines()[-2]
    assert "printed above but not saved" in ran.err
    assert "--out FILE" in ran.err.splitlines()[-1]
    assert ("note: " in ran.err) == (moment == "before")
    assert not list(run_folder.glob("*.json.part"))
    monkeypatch.undo()


def test_a_result_replaces_only_that_of_the_same_evaluation(hvp, run_folder):
    def told(*arguments):
        ran = knn(hvp, *arguments)
        assert ran.code == 0, ran.err
        return ran

    first = run_folder / "last-knn-teacher-k=5.json"
    assert f"wrote run/{first.name}" in told("--k", "5").out
    before = json.loads(first.read_text())
    assert f"wrote run/{first.name}" in told("--k", "5").out
    assert "wrote run/last-knn-teacher-k=5-resolution=16.json" in told("--k", "5", "--resolution", "16").out
    assert "wrote run/last-knn-student-k=5.json" in told("--k", "5", "--which", "student").out

    content = torch.load(run_folder / "last.pt", weights_only=True)
    content["step"] += 1
    content["teacher"]["backbone.cls_token"] += 1
    torch.save(content, run_folder / "last.pt")  # as if training went on
    ran = told("--k", "5")
    assert "wrote run/last-knn-teacher-k=5-2.json" in ran.out
    assert (
        f"{first.name} holds another evaluation and is kept; it differs in checkpoint's step, checkpoint's weights"
        in (ran.err)
    )
    assert {**json.loads(first.read_text()), "seconds": 0} == {**before, "seconds": 0}
    assert "wrote run/last-knn-teacher-k=5-2.json" in told("--k", "5").out
    assert len(list(run_folder.glob("*.json"))) == 5  # and run.json


def test_other_images_have_results_of_their_own(hvp, run_folder, imagenet):
    ran = hvp("eval", "knn", "run", "--data", imagenet, "--workers", "0", "--k", "5")
    assert "wrote run/last-knn-teacher-data=imagenet-k=5.json" in ran.out
    assert "wrote run/last-knn-teacher-k=5.json" in knn(hvp, "--k", "5").out


def test_out_replaces_only_results(hvp, run_folder, tmp_path):
    before = (run_folder / "last.pt").read_bytes()
    for name in ("run/last.pt", "run/config.yaml", "run/run.json"):
        ran = knn(hvp, "--k", "5", "--out", name)
        assert ran.code == 2
        assert f"{name}: exists and holds no result. Name another file with --out" in ran.err
        assert "k = 5" not in ran.out
    assert (run_folder / "last.pt").read_bytes() == before
    (tmp_path / "empty.json").touch()
    assert knn(hvp, "--k", "5", "--out", "empty.json").code == 0
    assert knn(hvp, "--k", "1", "--out", "empty.json").code == 0
    assert json.loads((tmp_path / "empty.json").read_text())["settings"]["k"] == [1]


def test_an_evaluation_reports_its_inputs_and_progress(hvp, run_folder):
    ran = knn(hvp, "--k", "5")
    assert "weights: run/last.pt: the teacher of dino, epoch 1, step 5, not the student, its keys backbone.*" in ran.err
    assert "network: VisionTransformer, width 96, 3 blocks, patches of 8 pixels, 0.4 M parameters" in ran.err
    assert "resolution: 32 pixels, as pretrained" in ran.err
    assert "features of shapes (train, 40 images): 40 of 40" in ran.err
    ran = knn(hvp, "--k", "5", "--resolution", "16", "--which", "student")
    assert "the student of dino" in ran.err
    assert "resolution: 16 pixels, as asked; otherwise 32, as pretrained" in ran.err


def test_progress_without_a_terminal_is_occasional_lines(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    with output.stage_progress() as show:
        for done in range(1, 61):
            show("features", done, 60)
            now[0] += 1
        show("classes", 3, 3)
    assert capsys.readouterr().err.splitlines() == [
        "features: 1 of 60, 0 s",
        "features: 11 of 60, 10 s, about 49 s left",
        "features: 21 of 60, 20 s, about 39 s left",
        "features: 31 of 60, 30 s, about 29 s left",
        "features: 41 of 60, 40 s, about 19 s left",
        "features: 51 of 60, 50 s, about 9 s left",
        "features: 60 of 60, 59 s",
        "classes: 3 of 3, 0 s",
    ]


def test_upstream_checkpoints_evaluate(hvp, run_folder, imagenet, tmp_path):
    """Upstream layout: the student's keys start with `module.`; optimiser and arguments are beside them."""
    ours = torch.load(run_folder / "last.pt", weights_only=True)
    student = {f"module.{key}": value for key, value in ours["student"].items()}
    torch.save({"student": student, "teacher": ours["teacher"], "epoch": 3}, tmp_path / "checkpoint.pth")
    backbone = {k.removeprefix("backbone."): v for k, v in ours["teacher"].items() if k.startswith("backbone.")}
    torch.save(backbone, tmp_path / "backbone.pth")
    arguments = ["--data", imagenet, "--workers", "0", "--k", "5", "--resolution", "32", "--out", "result.json"]
    scores = []
    for name in ("run/last.pt", "checkpoint.pth", "backbone.pth"):
        ran = hvp("eval", "knn", name, *arguments)
        assert ran.code == 0, ran.err
        scores.append(json.loads((tmp_path / "result.json").read_text())["results"])
    assert scores[0] == scores[1] == scores[2]


def test_rescue_is_a_flag(hvp):
    ran = hvp("pretrain", "dino", "--preset", "tiny", "--rescue", "--set", "rescue.k=3", "--dry-run")
    assert ran.code == 0
    assert re.search(r"rescue\.enabled +True +--rescue", ran.out)
    assert "rescue:       the 3 easiest of 32 images" in ran.out
    ran = hvp("pretrain", "dino", "--preset", "tiny", "--no-rescue", "--dry-run")
    assert re.search(r"rescue\.enabled +False +--no-rescue", ran.out)
    assert "easiest" not in ran.out


def test_rescuing_more_images_than_there_are_is_refused(hvp, tmp_path):
    ran = hvp("pretrain", "dino", "--preset", "tiny", "--rescue", "--set", "rescue.k=33", "--out", "run")
    assert ran.code == 2
    assert "rescue.k = 33, but a step has only train.batch_size = 32 images" in ran.err
    assert not (tmp_path / "run").exists()


def test_one_image_for_batch_norm_is_refused_before_the_first_step(hvp, tmp_path):
    ran = hvp("pretrain", "simsiam", "--preset", "tiny", *SMALL, "--rescue", "--set", "rescue.k=1", "--out", "run")
    assert ran.code == 2
    assert "rescue.k = 1, but batch norm needs at least 2 strong views" in ran.err
    assert not (tmp_path / "run").exists()


def test_diversity_of_common_and_strong_views(hvp, run_folder):
    arguments = ("analyze", "diversity", "run", "--data", "shapes", "--workers", "0", "--images", "30")
    ran = hvp(*arguments, "--out", "first.json")
    assert ran.code == 0, ran.err
    assert "two common" in ran.out
    assert "0.7069" in ran.out
    first = json.loads(Path("first.json").read_text())
    assert first["images"] == 30
    assert first["checkpoint"]["which"] == "teacher"
    assert first["views"] == ["global1", "global2"]
    assert -1 <= first["strong"]["mean"] <= 1
    assert hvp(*arguments).code == 0
    again = json.loads((run_folder / "last-diversity-teacher-images=30.json").read_text())
    assert again == first
    assert hvp(*arguments, "--set", "rescue.num_ops=0", "--set", "rescue.cutout=0.0", "--out", "weak.json").code == 0
    assert json.loads(Path("weak.json").read_text())["strong"] != first["strong"]
    assert hvp(*arguments, "--like", "simclr/tiny", "--out", "like.json").code == 0
    assert json.loads(Path("like.json").read_text())["views"] == ["view"]


def test_diversity_needs_a_configuration_of_the_views(hvp, run_folder, tmp_path):
    encoder, _ = load_encoder(run_folder)
    torch.save(encoder.state_dict(), tmp_path / "bare.pt")
    ran = hvp("analyze", "diversity", "bare.pt", "--data", "shapes")
    assert ran.code == 2
    assert "Name a preset that does: --like METHOD/PRESET" in ran.err
    assert hvp("analyze", "diversity", "bare.pt", "--data", "shapes", "--like", "dino/none").code == 2
