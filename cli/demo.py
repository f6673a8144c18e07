"""hvp demo: pretrain, evaluate and draw in a few minutes, on the embedded dataset."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hvp.cli.options import resolve_flags
from hvp.cli.output import progress_console, result_console, stage_progress

if TYPE_CHECKING:
    from torch import nn

PICTURE_IMAGES = 4


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for all files; an earlier demo there is replaced.", metavar="DIR")
    ] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Random seed.", min=0)] = 0,
    hard_views: Annotated[
        bool, typer.Option("--hard-views/--vanilla", help="Train on hard views, or on random views as upstream does.")
    ] = True,
) -> None:
    """Pretrain DINO with hard views on the embedded dataset, evaluate it, and draw the selected views."""
    from hvp.common.evaluation.results import write_result
    from hvp.methods import get_method

    console = result_console()
    started = time.perf_counter()
    flags: dict[str, Any] = {"train.seed": seed, "selection.hard_views": "hvp" if hard_views else "none"}
    config = resolve_flags("dino", "tiny", None, flags, []).config
    if hard_views:
        console.print(
            f"DINO with hard views on generated shapes. Selection starts after {config.selection.start:.0%} of the "
            "steps, because a network this small may collapse on the hardest views from the start. (The papers select "
            "from the start.)",
        )
    run = out / "run"
    checkpoint = get_method("dino").train(config, run, overwrite=run.exists(), console=progress_console())
    trained_seconds = time.perf_counter() - started

    scores = _evaluate_both(config, checkpoint)
    write_result(
        {"seed": seed, "hard_views": hard_views, **scores, "training_seconds": trained_seconds}, out / "results.json"
    )
    written = [checkpoint, out / "results.json"]
    if hard_views:
        from hvp.cli.preview import draw_preview

        draw_preview(config, checkpoint, PICTURE_IMAGES).save(out / "selection.png")
        written.append(out / "selection.png")
    seconds = time.perf_counter() - started
    console.print(f"Took {seconds:.0f} s, of which {trained_seconds:.0f} s training. Wrote:")
    for path in written:
        console.print(f"  {path}")
    run_name, backbone = (shlex.quote(str(out / name)) for name in ("run", "backbone.safetensors"))
    console.print(
        f"To use the encoder elsewhere: hvp convert {run_name} --to safetensors --out {backbone}\n"
        f"Its network, {config.model.arch}, is our own and so small that timm and torchvision have none like it. The "
        "other\npresets' networks convert to them: ViTs and ResNets to timm, ViT-B and ResNets to torchvision.",
        soft_wrap=True,
    )


def _evaluate_both(config: Any, checkpoint: Path) -> dict[str, dict[str, float]]:
    """Evaluate the encoder before and after training, print a table, and return the scores and the gain."""
    import torch

    from hvp.common.evaluation.checkpoints import load_encoder
    from hvp.methods import get_method

    trained, _ = load_encoder(checkpoint, "teacher")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        untrained = get_method("dino").build_encoder(config)
    console = result_console()
    scores = {}
    for name, encoder in (("untrained", untrained), ("trained", trained)):
        console.print(f"Evaluating the {name} encoder ...")
        scores[name] = _evaluate(encoder, config)
    scores["gain"] = {key: value - scores["untrained"][key] for key, value in scores["trained"].items()}

    table = Table("encoder", "k-NN top-1", "linear top-1", title="shapes, 2000 validation images", title_justify="left")
    for name, row in scores.items():
        table.add_row(name, *(f"{value:{'+' if name == 'gain' else ''}.1f}" for value in row.values()))
    console.print(table)
    return scores


def _evaluate(encoder: "nn.Module", config: Any) -> dict[str, float]:
    import torch

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
    with stage_progress() as progress:
        knn = evaluate_knn(encoder, train, val, ks=[20], resolution=resolution, workers=workers, progress=progress)
        linear = evaluate_linear(encoder, train, val, options, progress=progress)
    return {"knn_top1": knn["results"][0]["top1"], "linear_top1": linear["last"]["top1"]}
