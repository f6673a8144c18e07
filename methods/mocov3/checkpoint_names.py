"""MoCo v3's checkpoints in the layout of facebookresearch/moco-v3, main_moco.py."""

from hvp.common.convert.layouts import Layout, Optimizer, Part, on_meta
from hvp.methods.mocov3.config import MoCoConfig
from hvp.methods.mocov3.main_mocov3 import build_model, parameter_groups

ARCHS = ("resnet50", "resnet18", "vit_small", "vit_base")
"""Our networks that the upstream also has."""


def upstream_layout(config: MoCoConfig) -> Layout:
    """Upstream's entries, keys and parameter groups.

    Its optimiser also holds the parameters that are not trained: the momentum encoder and the positions.
    """
    model = on_meta(build_model, config)
    arch = config.model.arch
    return Layout(
        repository="facebookresearch/moco-v3",
        parts=(Part("model", "state_dict", model, wrapped=True),),
        optimizer=Optimizer(
            config.optim.optimizer,
            parameter_groups(model, config.optim.weight_decay),
            [{"params": list(model.parameters())}],
            lars={"momentum": 0.9, "trust_coefficient": 0.001},
        ),
        scaler="scaler",
        always_scales=True,
        header={"arch": arch},
        notes=() if arch in ARCHS else (f"the upstream has no network like {arch}",),
    )
