"""Report of a step whose loss or gradient is not finite."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from hvp.common.data import ImageSource
from hvp.common.errors import UserError
from hvp.common.training.checkpoint import write_atomically
from hvp.common.training.distributed import World
from hvp.common.training.folder import LAST, Claim
from hvp.common.views import ViewBatch

LIST = "nonfinite.json"
"""Name of the list of images in a run's folder."""


def stop_nonfinite(
    out: Path,
    claim: Claim,
    world: World,
    source: ImageSource,
    batch: list[ViewBatch],
    *,
    step: int,
    loss: float,
    squared_norm: float,
    values: Mapping[str, float],
    saved: int | None,
) -> None:
    """Stop the run in all processes, with a message that names the step and a file that lists its images.

    If only a gradient is not finite, the images of all processes are listed: gradients are averaged.

    Args:
        out, claim, world: as in `Run`.
        source: the images.
        batch: this process's parts of the batch.
        step: optimiser step, counted from 1.
        loss: this process's loss.
        squared_norm: squared L2 norm of all gradients.
        values: further values of the step for the message, by name.
        saved: step of the last checkpoint; None if there is none.

    Raises:
        UserError: always, in every process.
    """
    images = [
        {"rank": world.rank, "index": index, "name": source.describe(index)}
        for part in batch
        for index in part.index.tolist()
    ]
    losses = world.gather(loss)
    bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    listed_ranks = bad or range(world.size)
    lists = world.gather(images if world.rank in listed_ranks else [])
    listed = out / LIST
    with world.agreeing():
        where = f" on rank {', '.join(map(str, bad))}" if world.size > 1 and bad else ""
        shown = "".join(f", {name} {value:g}" for name, value in values.items())
        norm = str(math.sqrt(squared_norm)) if squared_norm >= 0 else "nan"
        what = f"the loss is {losses[bad[0]]}{where}" if bad else f"the loss is {losses[0]:g}, but its gradient {norm}"
        about = {
            "step": step,
            "loss": [str(losses[rank]) for rank in listed_ranks],
            "gradient_norm": norm,
            **values,
            "images": [image for of_rank in lists for image in of_rank],
        }
        try:
            claim.check()
            if world.leader:
                write_atomically(listed, lambda file: file.write(json.dumps(about, indent=1).encode()))
            images_are = f"Its images are listed in {listed}"
        except UserError as error:
            images_are = str(error)
        kept = "There is no checkpoint yet" if saved is None else f"Last good checkpoint: {out / LAST}, step {saved}"
        raise UserError(
            f"step {step}: {what}{shown}. {kept}. {images_are}.\n"
            "    Lower the learning rate or raise the precision. Resuming with the same values repeats the step"
        )
