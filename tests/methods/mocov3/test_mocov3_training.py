"""The MoCo v3 trainer on a little real data: its steps, its momentum encoder and its messages.

Behaviour that all trainers share is tested in tests/methods/test_every_method.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvp.common.config.resolving import read_yaml, resolve
from hvp.common.errors import UserError
from hvp.common.hardviews import select
from hvp.common.training import collapse
from hvp.common.views import normalize
from hvp.methods import get_preset, presets
from hvp.methods.mocov3.builder import MoCo, MoCoOutput
from hvp.methods.mocov3.config import MoCoConfig
from hvp.methods.mocov3.contrastive_loss import contrastive_loss
from hvp.methods.mocov3.main_mocov3 import build_model, parameter_groups
from hvp.methods.mocov3.score import pair_losses
from tests import runs
from tests.runs import CPU, Trained, constant_batch_norm, first_batch, tiny

STEPS = 6
SMALL = {
    **runs.SMALL,
    "data.shapes.train": 48,
    "train.epochs": 1,
    "optim.warmup_epochs": 0,
    "selection.hard_views": "hvp",
    "views.blur_view1": 1.0,
    "views.blur_view2": 0.0,
    "rescue.enabled": False,
}


def small(**values: Any) -> MoCoConfig:
    return tiny(MoCoConfig, "mocov3", SMALL, **values)


def train(config: MoCoConfig, out: Path) -> Trained:
    return runs.train("mocov3", config, out)


def fresh(config: MoCoConfig) -> MoCo:
    torch.manual_seed(config.train.seed)
    return build_model(config, CPU)


def first_views(config: MoCoConfig) -> Tensor:
    """Return the candidate views of the first batch, [V, B, 3, H, W]."""
    return normalize(first_batch(config).pixels[0])


def objective(out: MoCoOutput, temperature: float) -> Tensor:
    return contrastive_loss(out.q1, out.k2, temperature) + contrastive_loss(out.q2, out.k1, temperature)


@pytest.mark.parametrize("arch", ["convnet_micro", "vit_micro"])
@pytest.mark.parametrize("hard_views", ["none", "hvp"])
def test_first_step(tmp_path, hard_views, arch):
    """Both encoders score all candidates, and train on each image's hardest pair, one view at a time."""
    config = small(selection__hard_views=hard_views, model__arch=arch, optim__base_lr=1e-4)
    rows = train(config, tmp_path / "run").rows

    model, views = fresh(config), first_views(config)
    assert len(views) == (4 if hard_views == "hvp" else 2)
    if hard_views == "hvp":
        with torch.no_grad():
            losses = pair_losses(model, [views], config.combination_slots(), config.loss.temperature)
        kept = select([views], losses, config.combination_slots())
        assert rows[0]["kept_loss"] == pytest.approx(kept.loss.mean().item(), rel=1e-5)
        (views,) = kept.views
    loss = objective(model(*views, config.model.momentum), config.loss.temperature)
    assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert 0 < rows[0]["spread"] < 1.1


def test_an_entry_of_the_matrix_is_the_loss_of_a_step_that_keeps_it():
    """Scoring forwards one view at a time, as a step does, so batch norm sees the same batches."""
    config = small()
    views, temperature = first_views(config), config.loss.temperature
    with torch.no_grad():
        means = pair_losses(fresh(config), [views], config.combination_slots(), temperature).mean(dim=0)
        loss = objective(fresh(config)(views[0], views[2], None), temperature)
    assert (means[0, 2] + means[2, 0]).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("arch", ["convnet_micro", "vit_micro"])
def test_the_models_outputs_belong_to_their_views(arch):
    config = small(selection__hard_views="none", model__arch=arch)
    model, views = fresh(config).eval(), first_views(config)
    with torch.no_grad():
        out = model(*views, None)
        for number, (view, q, k) in enumerate(((views[0], out.q1, out.k1), (views[1], out.q2, out.k2))):
            h, z = (features.chunk(2)[number] for features in out.features)
            assert torch.equal(model.base_encoder.pooled(view), h)
            assert torch.equal(model.base_encoder(view), z)
            assert all(map(torch.equal, model.encode(view), (h, z)))
            assert torch.equal(model.predictor(z), q)
            assert torch.equal(model.momentum_encoder(view), k)
            assert torch.equal(k, z)  # before the first step both encoders are equal


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("cosine", [True, False])
def test_the_momentum_encoder_moves_once_a_step_before_the_keys(tmp_path, monkeypatch, accumulate, cosine):
    moves: list[float] = []
    update = MoCo.update_momentum_encoder

    def updating(model: MoCo, momentum: float) -> None:
        moves.append(momentum)
        update(model, momentum)

    monkeypatch.setattr(MoCo, "update_momentum_encoder", updating)
    config = small(train__accumulate=accumulate, model__momentum_cosine=cosine, model__momentum=0.9)
    run = train(config, tmp_path / "run")
    assert moves == [row["momentum"] for row in run.rows]
    assert moves[0] == 0.9
    assert moves == sorted(moves)
    assert (moves[-1] > 0.98) == cosine
    weights = run.checkpoint["model"]
    assert not torch.equal(weights["momentum_encoder.fc.0.weight"], weights["base_encoder.fc.0.weight"])


def test_the_momentum_encoder_moves_between_queries_and_keys():
    config = small(selection__hard_views="none")
    model, views = fresh(config), first_views(config)
    with torch.no_grad():
        for parameter in model.base_encoder.parameters():
            parameter.mul_(1.5)
    before = {name: p.clone() for name, p in model.momentum_encoder.named_parameters()}
    base = dict(model.base_encoder.named_parameters())
    kept = model(*views, None)
    for name, p in model.momentum_encoder.named_parameters():
        assert torch.equal(p, before[name]), name
    moved = model(*views, 0.5)
    for name, p in model.momentum_encoder.named_parameters():
        torch.testing.assert_close(p, (before[name] + base[name]) / 2)
    assert torch.equal(moved.q1, kept.q1)
    assert not torch.equal(moved.k1, kept.k1)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scoring_moves_nothing_but_running_statistics(mode):
    config = small()
    model, views = fresh(config).train(mode == "train"), first_views(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        pair_losses(model, [views], config.combination_slots(), config.loss.temperature)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, value in model.state_dict().items():
        moved = mode == "train" and name.endswith(statistics)
        assert torch.equal(value, before[name]) != moved, name


@pytest.mark.parametrize(("mode", "forwards"), [("train", 4 + 2), ("eval", 2)])
def test_both_encoders_keep_running_statistics_of_their_own(tmp_path, mode, forwards):
    state = train(small(selection__mode=mode), tmp_path / "run").checkpoint
    assert state["step"] == STEPS
    counts = {int(value) for name, value in state["model"].items() if name.endswith("num_batches_tracked")}
    assert counts == {forwards * STEPS}
    name = "fc.1.running_mean"
    assert not torch.equal(state["model"][f"base_encoder.{name}"], state["model"][f"momentum_encoder.{name}"])


def test_every_trained_parameter_is_decayed_and_the_rate_follows_the_schedule(tmp_path):
    config = small(optim__weight_decay=0.5, optim__warmup_epochs=1, train__epochs=2)
    run = train(config, tmp_path / "run")
    rows = run.rows
    (group,) = run.checkpoint["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5
    assert [row["lr"] for row in rows[: STEPS + 1]] == pytest.approx(
        [config.peak_lr * step / STEPS for step in range(STEPS + 1)]
    )
    assert 0 < rows[-1]["lr"] < config.peak_lr / 2
    trained = {name for name, p in fresh(config).named_parameters() if p.requires_grad}
    assert len(group["params"]) == len(trained)
    assert not any(name.startswith("momentum_encoder.") for name in trained)
    assert "predictor.1.bias" in trained


def test_a_frozen_patch_projection_and_the_positions_are_not_trained(tmp_path):
    config = MoCoConfig.model_validate({"model": {"arch": "vit_small", "stop_grad_conv1": True, "mlp_dim": 8}})
    model = build_model(config, torch.device("meta"))
    (group,) = parameter_groups(model, 0.1)
    frozen = {name for name, p in model.base_encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert len(group["params"]) == sum(p.requires_grad for p in model.parameters())

    state = train(small(model__arch="vit_micro"), tmp_path / "run").checkpoint
    start = fresh(small(model__arch="vit_micro")).state_dict()
    for encoder in ("base_encoder", "momentum_encoder"):
        assert torch.equal(state["model"][f"{encoder}.pos_embed"], start[f"{encoder}.pos_embed"])
        assert not torch.equal(
            state["model"][f"{encoder}.patch_embed.proj.weight"], start[f"{encoder}.patch_embed.proj.weight"]
        )


@pytest.mark.parametrize("feature", ["projection", "backbone"])
@pytest.mark.parametrize("arch", ["convnet_micro", "vit_micro"])
def test_rescue_compares_features_from_before_the_predictor(tmp_path, arch, feature):
    values: dict[str, Any] = {"selection__hard_views": "none", "model__arch": arch, "optim__base_lr": 1e-4}
    vanilla = train(small(**values), tmp_path / "vanilla").rows
    rescued = {"rescue__enabled": True, "rescue__k": 3, "rescue__s": 0.5, "rescue__feature": feature}
    config = small(**values, **rescued)
    run = train(config, tmp_path / "run")
    rows = run.rows
    assert rows[0]["loss"] == pytest.approx(vanilla[0]["loss"] - 0.5 * rows[0]["strong_similarity"], rel=1e-5)

    out = fresh(config)(*first_views(config), None)
    compared = out.features.projection if feature == "projection" else out.features.backbone
    similarity = torch.cosine_similarity(*compared.chunk(2))
    assert rows[0]["easy_similarity"] == pytest.approx(similarity.topk(3).values.mean().item(), rel=1e-5)
    # strong views leave running statistics alone, and never pass through the momentum encoder
    model = run.checkpoint["model"]
    counts = {int(value) for name, value in model.items() if name.endswith("num_batches_tracked")}
    assert counts == {2 * STEPS}


def test_each_augmentation_has_a_slot_with_candidates_of_its_own():
    first, second = small(views__solarize=0.3).view_slots()
    assert (first.name, first.candidates, first.kept) == ("view1", 2, 1)
    assert (second.name, second.candidates, second.kept) == ("view2", 2, 1)
    assert (first.transform.blur, first.transform.solarize) == (1.0, 0.0)
    assert (second.transform.blur, second.transform.solarize) == (0.0, 0.3)
    assert first.transform.interpolation == second.transform.interpolation == "bilinear"


@pytest.mark.parametrize(("pairs", "number"), [("by_transform", 4), ("any", 6)])
def test_pairs_are_compared_across_augmentations_or_all(pairs, number):
    slots = small(selection__pairs=pairs).combination_slots()
    assert slots.num_combinations == number
    assert ([0, 1] in slots.all_combinations().tolist()) == (pairs == "any")


def test_accumulation_warns_that_it_changes_the_objective(tmp_path):
    said = {parts: train(small(train__accumulate=parts), tmp_path / str(parts)).said for parts in (1, 2)}
    assert "changes the objective" not in said[1]
    assert said[2].count("train.accumulate = 2 changes the objective: a query has 3 negatives") == 1


def test_a_collapse_is_reported_once(tmp_path, monkeypatch):
    """The projector maps every image to the same point."""
    monkeypatch.setattr(collapse.CollapseWatch.__init__, "__defaults__", (3,))
    monkeypatch.setattr(torch.nn.BatchNorm1d, "reset_parameters", constant_batch_norm)
    said = train(small(optim__base_lr=1e-9, loss__temperature=0.2), tmp_path / "run").said
    assert said.count("step 3: the network has collapsed: ") == 1
    assert "the loss has been at chance level, 1.664" in said  # 4 * 0.2 * ln(8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim__warmup_epochs": 3, "train__epochs": 2}, "optim.warmup_epochs = 3 is longer than train.epochs = 2"),
        ({"train__batch_size": 8, "train__accumulate": 8}, "InfoNCE needs at least 2 images in each part"),
        ({"selection__candidates": 0}, "selection.candidates = 0"),
        ({"model__stop_grad_conv1": True}, "model.arch = convnet_micro has no patch projection"),
        ({"model__arch": "vit_micro", "views__crop_size": 36}, "views.crop_size = 36 is not a multiple of 8"),
    ],
)
def test_inconsistent_values_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        small(**values)


@pytest.mark.parametrize("preset", presets("mocov3"))
def test_presets_use_rescue_alone(preset):
    config = resolve(MoCoConfig, [("preset", read_yaml(get_preset("mocov3", preset)))]).config
    assert config.selection.hard_views == "none"
    assert config.rescue.enabled
    assert config.notes() == []


@pytest.mark.parametrize(("preset", "peak"), [("rn50-800ep", 4.8), ("vits16-300ep", 0.0024), ("vitb16-300ep", 0.0024)])
def test_presets_have_the_papers_learning_rates(preset, peak):
    config = resolve(MoCoConfig, [("preset", read_yaml(get_preset("mocov3", preset)))]).config
    assert config.peak_lr == pytest.approx(peak)
