"""Our trainer beside an original, on a stand-in for one: SimSiam's loop in the plainest form, in a script that was made
for GPUs."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from hvp.benchmarks.originals.comparison import Comparison, compare, without_flags
from hvp.common.errors import UserError
from hvp.methods import get_method
from hvp.methods.simsiam.config import SimSiamConfig
from hvp.patches import get_original
from hvp.patches.original import Original, as_flags, normalized_views
from hvp.patches.patching import Patch

SCRIPT = """
import argparse, math, os, torch, torch.distributed, torch.multiprocessing, tensorboardX
from torchvision.datasets import ImageFolder
from hvp.common.networks.resnet import CONVNETS
from hvp.methods.simsiam.builder import SimSiam

def worker(gpu, args):
    torch.distributed.init_process_group("nccl", init_method="tcp://nowhere:1", world_size=1, rank=0)
    torch.cuda.set_device(gpu)
    model = SimSiam(CONVNETS["convnet_micro"](zero_init_residual=True), args.dim, 16).cuda(gpu)
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[gpu])
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=1e-4)
    dataset = ImageFolder(os.path.join(args.data, "train"))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, sampler=None, num_workers=4)
    for epoch in range(args.epochs):
        for group in sgd.param_groups:
            group["lr"] = args.lr * 8 / 256 * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
        for (x1, x2), _ in loader:
            p1, p2, z1, z2, _ = model(x1.cuda(gpu), x2.cuda(gpu))
            towards = sum(torch.nn.functional.cosine_similarity(p, z).mean() for p, z in ((p1, z2), (p2, z1)))
            sgd.zero_grad()
            (-0.5 * towards).backward()
            sgd.step()
        torch.save({"epoch": epoch, "state_dict": model.state_dict()}, f"checkpoint{epoch}.pth")

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float)
    torch.multiprocessing.spawn(worker, nprocs=torch.cuda.device_count(), args=(parser.parse_args(),))
"""
SMALL = {
    "data.shapes.train": 16,
    "train.batch_size": 8,
    "model.arch": "convnet_micro",
    "model.dim": 32,
    "model.pred_dim": 16,
    "views.crop_size": 32,
    "selection.hard_views": "none",
}


ALONE = """
class Learner:
    def __init__(self, *, model):
        self.parameters, self.state_dict = model.parameters, model.state_dict
        self.network = model["net"]

    def __call__(self, *images):
        return self.network(*images)
"""
"""What learns in a script without DistributedDataParallel."""


def side_by_side(folder: Path, script: str, lines: str = "# patched\n", **more: Any) -> Comparison:
    """Our SimSiam beside a script, whose "patch" adds lines at the top."""
    folder.mkdir()
    (folder / "train.py").write_text(script)
    (folder / "alone.py").write_text(ALONE)
    patch = Patch.model_validate(
        {
            "method": "simsiam",
            "upstream": "https://github.com/owner/standin",
            "commit": "0" * 40,
            "licence": "MIT",
            "brings": ["HVP"],
            "trainer": "train.py",
            "files": [
                {
                    "path": "train.py",
                    "sha256": hashlib.sha256(script.encode()).hexdigest(),
                    "changes": [{"what": "more or less", "after": 0, "lines": lines}],
                }
            ],
        }
    )
    names = {"model.dim": "--dim", "train.epochs": "--epochs", "optim.base_lr": "--lr"}
    original = Original(
        lambda config, data, _: [data, *as_flags(config, names, switches=True)],
        compared=SMALL,
        parts={"model": "state_dict"},
        batch=lambda batch: [normalized_views(batch), batch.index],
        **more,
    )
    return compare(get_method("simsiam"), original, patch, folder)


@pytest.mark.slow
def test_a_faithful_original_agrees(tmp_path):
    found = side_by_side(tmp_path / "standin", SCRIPT)
    assert found.agrees
    assert found.untouched
    assert found.steps == 4
    assert len({ours for ours, _ in found.losses}) == 4
    assert found.parameters < 1e-3


@pytest.mark.slow
def test_an_original_without_parallel_network_and_with_names_of_its_own_agrees(tmp_path):
    parallel = "torch.nn.parallel.DistributedDataParallel(model, device_ids=[gpu])"
    alone = SCRIPT.replace(parallel, "alone.Learner(model=torch.nn.ModuleDict({'net': model}))")
    script = alone.replace("import argparse", "import alone, argparse")
    found = side_by_side(tmp_path / "standin", script, learner="alone.Learner", named=lambda key: f"net.{key}")
    assert found.agrees


@pytest.mark.slow
def test_an_original_that_trains_otherwise_does_not_agree(tmp_path):
    found = side_by_side(tmp_path / "standin", SCRIPT.replace("args.lr * 8", "args.lr * 9"))
    assert not found.agrees
    assert found.lr == pytest.approx(1 / 8)
    assert found.parameters > 0.05


@pytest.mark.slow
def test_a_patch_that_changes_something_unasked_does_not_agree(tmp_path):
    """It undoes a fault of the script, so that both agree but for what the untouched one does."""
    faulty = SCRIPT.replace("args.lr * 8", "args.lr * LR")
    faulty = faulty.replace("def worker", "LR = globals().get('PATCHED', 9)\n\ndef worker")
    found = side_by_side(tmp_path / "standin", faulty, "PATCHED = 8\n")
    assert max(found.loss, found.lr) < 1e-6
    assert not found.untouched
    assert not found.agrees


def test_an_original_that_fails_is_shown(tmp_path):
    with pytest.raises(UserError, match=r"(?s)ended with code 1.*RuntimeError: no luck"):
        side_by_side(tmp_path / "standin", SCRIPT.replace("sgd.step()", "raise RuntimeError('no luck')"))


def test_a_package_that_a_comparison_needs_is_named_at_once(tmp_path):
    with pytest.raises(UserError, match="owner/standin needs no-such-package, not installed here: pip install"):
        side_by_side(tmp_path / "standin", "raise AssertionError", needs=("torch", "no-such-package"))


def test_values_become_flags():
    config = SimSiamConfig()
    names = {"optim.base_lr": "--lr", "optim.fix_pred_lr": "--fix", "views.crop_scale": "--scale"}
    assert as_flags(config, names, switches=True) == ["--lr", "0.05", "--scale", "0.2", "1.0"]
    assert as_flags(config, names, switches=False) == ["--lr", "0.05", "--fix", "false", "--scale", "0.2", "1.0"]


def test_a_method_without_comparison_is_one_message():
    with pytest.raises(UserError, match="nosuch is not compared with its original"):
        get_original("nosuch")


def test_flags_are_left_out_with_their_values():
    words = ["data", "--lr", "0.1", "--ours", "--also-ours", "3", "--epochs", "2", "--ours-too", "x", "key=value"]
    left = ["data", "--lr", "0.1", "--epochs", "2", "key=value"]
    assert without_flags(words, ("--ours", "--also-ours", "--ours-too")) == left
