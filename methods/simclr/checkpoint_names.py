"""SimCLR's checkpoints in the layout of HVP's released code, automl/hvp, branch simclr, pretrain.py.

The original, google-research/simclr, is written in TensorFlow.
"""

from hvp.common.convert.layouts import Layout, Optimizer, Part, on_meta
from hvp.common.training.optimizers import split_weight_decay
from hvp.methods.simclr.config import SimclrConfig
from hvp.methods.simclr.main_simclr import build_model


def upstream_layout(config: SimclrConfig) -> Layout:
    """Released code's entries and keys. Its optimiser has one group; LARS exempts one-dimensional parameters."""
    model = on_meta(build_model, config)
    ours = split_weight_decay(model.named_parameters())
    ours[0]["weight_decay"] = config.optim.weight_decay
    notes = []
    if config.model.arch != "resnet50":
        notes.append(f"the released code has no network like {config.model.arch}")
    if config.model.num_proj_layers != 2:
        notes.append("the released code's projector has 2 layers: its trainer cannot resume this one")
    if config.optim.optimizer != "lars":
        notes.append(f"the released code's {config.optim.optimizer} also decays biases and norms")
    return Layout(
        repository="automl/hvp, branch simclr",
        parts=(Part("model", "model", model, wrapped=True),),
        optimizer=Optimizer(config.optim.optimizer, ours, [{"params": list(model.parameters())}]),
        scaler="scaler",
        unread=("total_time",),
        notes=notes,
    )
