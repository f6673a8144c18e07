"""Picture of the crops that a trained model would select."""

from pathlib import Path

import torch
from PIL import Image

from hvp.common.training.checkpoint import load_checkpoint
from hvp.common.training.loading import build_loader, open_training_data
from hvp.common.training.selecting import ViewSelector
from hvp.common.training.session import seeded
from hvp.common.views import draw_selection, normalize
from hvp.methods.dino.config import DinoConfig
from hvp.methods.dino.main_dino import build_loss, build_networks
from hvp.methods.dino.score import pair_losses


def draw_preview(config: DinoConfig, checkpoint: Path, num_images: int) -> Image.Image:
    """Draw the first images of the first epoch with their crops, and those that the trained networks select.

    Args:
        config: the run's configuration, with hard views.
        checkpoint: a checkpoint of that run.
        num_images: number of images.

    Raises:
        UserError: the checkpoint cannot be read, or there are fewer images.
    """
    train = config.train.model_copy(update={"batch_size": num_images, "accumulate": 1})
    data = config.data.model_copy(update={"workers": 0})
    selection = config.selection.model_copy(update={"start": 0.0, "every": 1})
    config = config.model_copy(update={"train": train, "data": data, "selection": selection})
    content = load_checkpoint(checkpoint)
    device = torch.device("cpu")
    with seeded(config.train.seed, device):
        student, teacher = build_networks(config, device)
        dino_loss = build_loss(config)
        student.load_state_dict(content["student"])
        teacher.load_state_dict(content["teacher"])
        dino_loss.load_state_dict(content["dino_loss"])
        source = open_training_data(config)
        (batch,) = next(build_loader(config, source, device).epoch(0))
        selector = ViewSelector(config, total_steps=1)
        crops = [normalize(pixels) for pixels in batch.pixels]
        with selector.scoring(student, teacher):
            losses, _ = pair_losses(student, teacher, crops, dino_loss, config.train.epochs - 1)
        kept = selector.keep(crops, losses, step=0)
    images = [source.read(index) for index in batch.index.tolist()]
    return draw_selection(images, batch.parameters, batch.pixels, kept.index, config.view_slots())
