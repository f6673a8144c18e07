"""SimSiam's checkpoints in the layout of facebookresearch/simsiam, main_simsiam.py."""

from typing import Any

from hvp.common.convert.layouts import Layout, Optimizer, Part, on_meta
from hvp.methods.simsiam.config import SimSiamConfig
from hvp.methods.simsiam.main_simsiam import build_model, parameter_groups


def upstream_layout(config: SimSiamConfig) -> Layout:
    """Upstream's entries, keys and parameter groups.

    Its groups include the projector's fixed bias. There are two groups with --fix-pred-lr, and one without.
    """
    model = on_meta(build_model, config)
    theirs: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if config.optim.fix_pred_lr:
        theirs = [
            {"params": list(model.encoder.parameters()), "fix_lr": False},
            {"params": list(model.predictor.parameters()), "fix_lr": True},
        ]
    notes = []
    if config.model.arch not in ("resnet50", "resnet18"):
        notes.append(f"the upstream has no network like {config.model.arch}")
    if not config.model.projector_bias or config.model.projector_layers != 3:
        notes.append("the upstream's projector has 3 layers, the last with a bias: its trainer cannot resume this")
    return Layout(
        repository="facebookresearch/simsiam",
        parts=(Part("model", "state_dict", model, wrapped=True),),
        optimizer=Optimizer(config.optim.optimizer, parameter_groups(model, config.optim.weight_decay), theirs),
        scaler=None,
        header={"arch": config.model.arch},
        notes=notes,
    )
