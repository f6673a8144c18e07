"""Comparison of our trainer with an original, on a stand-in: SimSiam's loop in its plainest form, written for GPUs."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from hvp.benchmarks.originals import get_harness
from hvp.benchmarks.originals.comparison import Comparison, compare, without_flags
from hvp.benchmarks.originals.harness import Checkpoints, Harness
from hvp.benchmarks.originals.on_cpu import Substitutes
from hvp.common.errors import UserError
from hvp.methods import get_method
from hvp.patches.adapter import Adapter, Keys, as_flags
from hvp.patches.patching import Patch, patches

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
"""Trainer of a script without DistributedDataParallel."""


def compare_with(
    folder: Path,
    script: str,
    lines: str = "# patched\n",
    substitutes: Substitutes = Substitutes(),
    **more: Any,
) -> Comparison:
    """Compare our SimSiam with a script, whose "patch" adds lines at the top."""
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
    adapter = Adapter(
        lambda config, data, _: [data, *as_flags(config, names, switches=True)], Keys(names, lambda _: {})
    )
    return compare(get_method("simsiam"), adapter, Harness(SMALL, substitutes, **more), patch, folder)


@pytest.mark.slow
def test_a_faithful_original_agrees(tmp_path):
    found = compare_with(tmp_path / "standin", SCRIPT)
    assert found.agrees
    assert found.untouched
    assert found.steps == 4
    assert len({ours for ours, _ in found.losses}) == 4
    assert found.parameters < 1e-3


@pytest.mark.slow
def test_an_original_without_a_parallel_network_and_with_its_own_tensor_names_agrees(tmp_path):
    parallel = "torch.nn.parallel.DistributedDataParallel(model, device_ids=[gpu])"
    alone = SCRIPT.replace(parallel, "alone.Learner(model=torch.nn.ModuleDict({'net': model}))")
    script = alone.replace("import argparse", "import alone, argparse")
    learner, names = Substitutes(learner="alone.Learner"), Checkpoints(rename=lambda key: f"net.{key}")
    found = compare_with(tmp_path / "standin", script, substitutes=learner, checkpoints=names)
    assert found.agrees


@pytest.mark.slow
def test_an_original_with_another_learning_rate_does_not_agree(tmp_path):
    found = compare_with(tmp_path / "standin", SCRIPT.replace("args.lr * 8", "args.lr * 9"))
    assert not found.agrees
    assert found.lr == pytest.approx(1 / 8)
    assert found.parameters > 0.05


@pytest.mark.slow
def test_a_patch_with_an_effect_without_its_flags_does_not_agree(tmp_path):
    """The patch corrects a fault of the script, so only the untouched original differs."""
    faulty = SCRIPT.replace("args.lr * 8", "args.lr * LR")
    faulty = faulty.replace("def worker", "LR = globals().get('PATCHED', 9)\n\ndef worker")
    found = compare_with(tmp_path / "standin", faulty, "PATCHED = 8\n")
    assert max(found.loss, found.lr) < 1e-6
    assert not found.untouched
    assert not found.agrees


def test_the_error_of_an_original_is_shown(tmp_path):
    with pytest.raises(UserError, match=r"(?s)exited with code 1.*RuntimeError: no luck"):
        compare_with(tmp_path / "standin", SCRIPT.replace("sgd.step()", "raise RuntimeError('no luck')"))


def test_a_missing_package_is_named_at_once(tmp_path):
    with pytest.raises(UserError, match="owner/standin needs no-such-package, not installed here: pip install"):
        compare_with(tmp_path / "standin", "raise AssertionError", needs=("torch", "no-such-package"))


def test_flags_are_removed_with_their_values():
    words = ["data", "--lr", "0.1", "--ours", "--also-ours", "3", "--epochs", "2", "--ours-too", "x", "key=value"]
    left = ["data", "--lr", "0.1", "--epochs", "2", "key=value"]
    assert without_flags(words, ("--ours", "--also-ours", "--ours-too")) == left


@pytest.mark.parametrize("method", patches())
def test_every_patch_has_a_comparison(method):
    assert isinstance(get_harness(method), Harness)


def test_a_method_without_a_patch_has_no_comparison():
    with pytest.raises(UserError, match=r"there is no patch for nosuch\. Known: dino, dinov2, "):
        get_harness("nosuch")
