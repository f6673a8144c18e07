"""hvp demo: the whole way in a few minutes, on the embedded dataset."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hvp.cli.output import progress_console, result_console

if TYPE_CHECKING:
    from torch import nn

PICTURE_IMAGES = 4


def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes; a demo that is there already is replaced.")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = 0,
    hard_views: Annotated[
        bool, typer.Option("--hard-views/--vanilla", help="Train on hard views, or as upstream.")
    ] = True,
) -> None:
    """Pretrain DINO with hard views on the embedded dataset, evaluate it, and draw what was selected."""
    import torch

    from hvp.cli.pretrain import resolve_flags
    from hvp.cli.preview import preview_selection
    from hvp.common.evaluation.checkpoints import load_encoder
    from hvp.common.evaluation.results import write_result
    from hvp.common.views import draw_selection
    from hvp.methods import get_method

    console = result_console()
    started = time.perf_counter()
    flags: dict[str, Any] = {"train.seed": seed, "selection.hard_views": "hvp" if hard_views else "none"}
    config = resolve_flags("dino", "tiny", None, flags, []).config
    method = get_method("dino")
    if hard_views:
        console.print(
            f"DINO with hard views on generated shapes. Selection starts after {config.selection.start:.0%} of the "
            "steps: a network this small may collapse when it gets the hardest views from the start (the papers do "
            "start at once).",
            highlight=False,
        )
    checkpoint = method.train(config, out / "run", overwrite=(out / "run").exists(), console=progress_console())
    trained_seconds = time.perf_counter() - started

    trained, _ = load_encoder(checkpoint, "teacher")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = method.build_encoder(config)
    results = {}
    for name, encoder in (("untrained", untrained), ("trained", trained)):
        console.print(f"Evaluating the {name} encoder ...")
        results[name] = _evaluate(encoder, config)

    table = Table("encoder", "k-NN top-1", "linear top-1", title="shapes, 2000 validation images", title_justify="left")
    for name, scores in results.items():
        table.add_row(name, f"{scores['knn_top1']:.1f}", f"{scores['linear_top1']:.1f}")
    gain = {key: results["trained"][key] - results["untrained"][key] for key in ("knn_top1", "linear_top1")}
    table.add_row("gain", *(f"{value:+.1f}" for value in gain.values()))
    console.print(table)
    write_result(
        {"seed": seed, "hard_views": hard_views, **results, "gain": gain, "training_seconds": trained_seconds},
        out / "results.json",
    )
    written = [checkpoint, out / "results.json"]
    if hard_views:
        preview = preview_selection(config, checkpoint, PICTURE_IMAGES)
        picture = draw_selection(
            preview.images, preview.batch.parameters, preview.batch.pixels, preview.selection.index, config.view_slots()
        )
        picture.save(out / "selection.png")
        written.append(out / "selection.png")
    checkpoint_folder, backbone = (shlex.quote(str(out / name)) for name in ("run", "backbone.safetensors"))
    seconds = time.perf_counter() - started
    console.print(f"{seconds:.0f} s, of which {trained_seconds:.0f} s training. Wrote:", highlight=False)
    for path in written:
        console.print(f"  {path}", highlight=False, markup=False)
    console.print(
        f"To take the encoder elsewhere: hvp convert {checkpoint_folder} --to safetensors --out {backbone}\n"
        f"Its network, {config.model.arch}, is ours and so small that timm and torchvision have none like it. Those of "
        "the other\npresets convert to them: ViTs and ResNets to timm, ViT-B and ResNets to torchvision.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _evaluate(encoder: "nn.Module", config: Any) -> dict[str, float]:
    import torch

    from hvp.cli.evaluate import evaluation_progress
    from hvp.common.data import open_dataset
    from hvp.common.evaluation.knn import evaluate_knn
    from hvp.common.evaluation.linear import LinearOptions, evaluate_linear, probe_defaults
    from hvp.common.training.distributed import available_workers

    train = open_dataset("shapes", "train", shapes=config.data.shapes, labels=True)
    val = open_dataset("shapes", "val", shapes=config.data.shapes, labels=True)
    resolution, workers = config.views.global_crops_size, available_workers(None, torch.device("cpu"))
    blocks, avgpool = probe_defaults(encoder)
    options = LinearOptions(
        epochs=100,
        base_lr=0.05,
        batch_size=256,
        n_last_blocks=blocks,
        avgpool=avgpool,
        resolution=resolution,
        workers=workers,
    )
    with evaluation_progress() as progress:
        knn = evaluate_knn(encoder, train, val, ks=[20], resolution=resolution, workers=workers, progress=progress)
        linear = evaluate_linear(encoder, train, val, options, progress=progress)
    return {"knn_top1": knn["results"][0]["top1"], "linear_top1": linear["last"]["top1"]}
