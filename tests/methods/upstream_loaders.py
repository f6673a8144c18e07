"""Load a converted checkpoint with an upstream's networks and loaders, in a process of its own:

    python upstream_loaders.py METHOD CLONE CHECKPOINT OUT

OUT receives `saved`, the state that the upstream's own objects save after loading, and `features`, the outputs on
`images()` of the upstream's encoder, which its evaluation code loads. This file imports nothing of hvp.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

K = 32
"""Number of prototypes in the test's heads."""


def images() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def upstream(module: str) -> Any:
    """Import a module of the clone."""
    return import_module(module)


class Wrapped(nn.Module):
    """Module that adds `module.` to tensor names, as DistributedDataParallel does."""

    module: Any

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def absent(name: str, **members: Any) -> None:
    """Install a stand-in for a package that the upstream imports and nothing here uses."""
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    sys.modules[name] = module


def dino(file: str) -> dict[str, Any]:
    main_dino, utils, vits = upstream("main_dino"), upstream("utils"), upstream("vision_transformer")

    def network(norm_last_layer: bool) -> nn.Module:
        head = vits.DINOHead(384, K, norm_last_layer=norm_last_layer)
        return utils.MultiCropWrapper(vits.vit_small(patch_size=16), head)

    student, teacher = Wrapped(network(False)), network(True)
    loss = main_dino.DINOLoss(K, 10, 0.04, 0.04, 0, 100)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    parts = {"student": student, "teacher": teacher, "optimizer": optimizer, "dino_loss": loss}
    return self_distilled(utils, vits.vit_small(patch_size=16, num_classes=0), file, parts)


def ibot(file: str) -> dict[str, Any]:
    absent("tensorboardX", SummaryWriter=None)
    absent("evaluation.unsupervised.unsup_cls", eval_pred=None)
    main_ibot, utils = upstream("main_ibot"), upstream("utils")
    vit_small, iBOTHead = upstream("models").vit_small, upstream("models.head").iBOTHead

    def network(norm_last_layer: bool, masked: bool) -> nn.Module:
        backbone = vit_small(patch_size=16, return_all_tokens=True, masked_im_modeling=masked)
        head = iBOTHead(384, K, patch_out_dim=K, norm_last_layer=norm_last_layer, shared_head=True)
        return utils.MultiCropWrapper(backbone, head)

    student, teacher = Wrapped(network(False, True)), network(True, False)
    loss = main_ibot.iBOTLoss(K, K, 2, 0, 0.04, 0.04, 0.04, 0.04, 0, 100)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    parts = {"student": student, "teacher": teacher, "optimizer": optimizer, "ibot_loss": loss}
    return self_distilled(utils, vit_small(patch_size=16, num_classes=0), file, parts)


def self_distilled(utils: Any, encoder: nn.Module, file: str, parts: dict[str, Any]) -> dict[str, Any]:
    """Load the parts as the trainer does to resume, and the teacher as the evaluations do."""
    progress = {"epoch": 0}
    utils.restart_from_checkpoint(file, run_variables=progress, fp16_scaler=None, **parts)
    utils.load_pretrained_weights(encoder, file, "teacher", "vit_small", 16)
    return {"saved": {name: part.state_dict() for name, part in parts.items()} | progress, "features": encoder.eval()}


def simsiam(file: str) -> dict[str, Any]:
    from torchvision import models

    model = Wrapped(upstream("simsiam.builder").SimSiam(models.resnet50, 64, 32))
    parameters = [
        {"params": model.module.encoder.parameters(), "fix_lr": False},
        {"params": model.module.predictor.parameters(), "fix_lr": True},
    ]
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-4)
    return resumed(model, optimizer, file, "encoder", "fc")


def mocov3(file: str) -> dict[str, Any]:
    from functools import partial

    from torchvision import models

    model = Wrapped(
        upstream("moco.builder").MoCo_ResNet(partial(models.resnet50, zero_init_residual=True), 64, 32, 1.0)
    )
    optimizer = upstream("moco.optimizer").LARS(model.parameters(), 0.1, weight_decay=1e-6, momentum=0.9)
    torch.amp.GradScaler("cpu").load_state_dict(torch.load(file)["scaler"])
    return resumed(model, optimizer, file, "base_encoder", "fc")


def resumed(model: nn.Module, optimizer: torch.optim.Optimizer, file: str, place: str, last: str) -> dict[str, Any]:
    """Load the parts as the trainer does to resume, and the encoder as the linear probe does.

    The probe loads the encoder, without its last layer, into torchvision's network, and checks that only the classifier
    is missing.
    """
    from torchvision import models

    checkpoint = torch.load(file)
    model.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    start = f"module.{place}."
    entries = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith(start)}
    encoder = getattr(models, checkpoint["arch"])()
    taken = {key.removeprefix(start): v for key, v in entries.items() if not key.startswith(f"{start}{last}")}
    found = encoder.load_state_dict(taken, strict=False)
    assert set(found.missing_keys) == {f"{last}.weight", f"{last}.bias"}
    assert not found.unexpected_keys
    setattr(encoder, last, nn.Identity())
    saved = {"epoch": checkpoint["epoch"], "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    return {"saved": saved, "features": encoder.eval()}


def simclr(file: str) -> dict[str, Any]:
    from torchvision import models

    optimizers, utils = upstream("optimizers"), upstream("utils")
    model = Wrapped(upstream("methods").SimCLR(models.resnet50(), proj_hidden_dim=48, out_dim=24))
    optimizer = optimizers.configure_optimizer("lars", model.parameters(), lr=0.1, weight_decay=1e-4, momentum=0.9)
    progress = {"epoch": 0}
    utils.restart_from_checkpoint(file, run_variables=progress, model=model, optimizer=optimizer)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **progress}
    return {"saved": saved, "features": model.module.backbone.eval()}


def dinov2(file: str) -> dict[str, Any]:
    encoder = upstream("dinov2.models.vision_transformer").vit_small(
        patch_size=16, img_size=224, init_values=1e-5, block_chunks=4
    )
    upstream("dinov2.utils.utils").load_pretrained_weights(encoder, file, "teacher")
    return {"saved": {}, "features": encoder.eval()}


if __name__ == "__main__":
    method, clone, file, out = sys.argv[1:]
    sys.path.insert(0, clone)
    result = globals()[method](file)
    with torch.no_grad():
        features = result["features"](images())
    torch.save({"saved": result["saved"], "features": features}, out)
