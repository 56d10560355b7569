"""Training a segmenter from images with masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daskcell.errors import ComputeError, InputError
from daskcell.models.cpsam import load_cpsam
from daskcell.models.loading import read_unet
from daskcell.models.registry import find_network
from daskcell.models.unet import KIND, TinyUNet
from daskcell.models.weights_file import save_weights
from daskcell.storage.atomic import atomic_path
from daskcell.training.augment import tile
from daskcell.training.segmenter_data import Sample, draw_membranes, draw_samples, read_samples
from daskcell.training.trainer import Schedule, Trained, Trainer

_VALIDATION_TILES = 6
"""Of each group of images."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Schedule):
    """How to train a segmenter."""

    batch: int = 8
    side: int = 224
    """Side of a tile in pixels."""
    generated: int = 40
    """Generated fields of cells, and as many sheets of membranes, beside the images given."""
    generated_side: int = 512
    generated_share: float = 0.2
    """Chance of a tile to come from them."""
    start: str | None = None
    """Weights to start from: ``tiny``, a file of this command, or Cellpose-SAM's (``cpsam_v2``), which need a
    GPU, ``side=256`` and a `rate` of about 1e-5; None: random ones."""
    widths: tuple[int, ...] = (16, 32, 64, 128, 192)
    """Channels at full, half, quarter ... resolution; those of `start` where there is one."""
    blocks: tuple[int, ...] = (1, 2, 2, 1)


def train_segmenter(
    sources: Sequence[str | Path],
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    validate: Sequence[str | Path] = (),
    prepared: str | Path | None = None,
    device: str = "cpu",
    report: Callable[[str], None] = print,
    progress: Callable[[float], None] | None = None,
) -> Trained:
    """Train a network for `daskcell.segment` from images with masks.

    Continues from ``out/checkpoint.pt`` where there is one of the same recipe: kill it at any moment and call
    it again.

    Parameters
    ----------
    sources
        Folders with ``images/`` and ``masks/`` (label images of the same names), or tables of images
        (`list_sources`); may be empty: generated images only.
    out
        Folder for ``segmenter.npz`` (``segmenter.pt`` of Cellpose-SAM), usable as ``model=`` at any time,
        ``checkpoint.pt`` and ``log.csv`` (step, seconds, loss, validation loss).
    validate
        Folders or tables that the network does not learn from. The weights with the smallest loss on tiles of
        them are kept, and the training stops when that has not fallen for ``recipe.patience`` validations.
    prepared
        Folder that keeps flows and masks of smears for the next training; None: ``out/prepared``.
    device
        ``cpu`` or ``cuda``.
    report, progress
        Called with a line now and then, and with the share that is done after every step.

    Raises
    ------
    InputError
        If there is nothing to train on.
    WeightsError
        If the checkpoint in `out` is damaged or belongs to another recipe, or `start` cannot be used.
    ComputeError
        If a GPU is asked for that is not there.
    """
    recipe = recipe or Recipe()
    out = Path(out)
    if device != "cpu" and not torch.cuda.is_available():
        raise ComputeError(f"There is no GPU for device={device!r} here. Please take device='cpu'.")
    torch.manual_seed(recipe.seed)
    net = TinyUNet(recipe.widths, recipe.blocks) if recipe.start is None else _started(recipe.start)
    weights = out / ("segmenter.npz" if isinstance(net, TinyUNet) else "segmenter.pt")
    trainer = Trainer(recipe, out, net.to(device), weights, partial(_export, weights))
    if trainer.left() <= 0:
        return trainer.result()
    cache = out / "prepared" if prepared is None else Path(prepared)
    samples = read_samples(sources, cache=cache, report=report)
    if recipe.generated:
        report(f"drawing {2 * recipe.generated} images")
        samples += draw_samples(recipe.generated, recipe.seed, recipe.generated_side, cache)
        samples += draw_membranes(recipe.generated, recipe.seed, recipe.generated_side // 2, cache)
    if not samples:
        raise InputError("There is nothing to train on. Please give images, or ask for generated ones.")
    cumulative = np.cumsum(image_weights(samples, recipe.generated_share))
    kept_out = read_samples(validate, most=_VALIDATION_TILES, cache=cache)
    report(f"{len(samples)} images, {sum(len(s.centres) for s in samples)} cells; from step {trainer.step}")

    def loss(net: nn.Module, x: Tensor, truth: Tensor) -> Tensor:
        with recipe.autocast(device):
            y, _ = net(x.to(device, memory_format=torch.channels_last))
        return segmenter_loss(y.float(), truth.to(device))

    groups = _validation_tiles(kept_out, recipe.side)

    def validation(net: nn.Module) -> float:
        with torch.no_grad():
            return float(np.mean([float(loss(net, *tiles)) for tiles in groups]))

    return trainer.run(
        lambda net, step: loss(net, *_batch(samples, cumulative, recipe, step)),
        report,
        validation if groups else None,
        progress,
    )


def _started(name: str) -> nn.Module:
    path = find_network(name)
    if path.suffix == ".npz":
        return read_unet(path)
    net = load_cpsam(path, dtype=torch.float32)
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()  # the file is mapped, and stays as it is
        parameter.requires_grad_(True)
    return net


def _export(weights: Path, net: nn.Module, note: str) -> None:
    if weights.suffix == ".npz":
        save_weights(weights, net.state_dict(), KIND, note)
        return
    with atomic_path(weights) as part:
        torch.save(net.state_dict(), part)


def _validation_tiles(samples: Sequence[Sample], side: int) -> list[tuple[Tensor, Tensor]]:
    """The same tiles every time, as many of each group of images."""
    tiles = []
    for number, group in enumerate(sorted({s.group for s in samples})):
        members = [s for s in samples if s.group == group]
        rng = np.random.default_rng(number)
        tiles.append(_stack([tile(members[i % len(members)], rng, side) for i in range(_VALIDATION_TILES)]))
    return tiles


def image_weights(samples: Sequence[Sample], generated_share: float) -> np.ndarray:
    """Chance of each image to be drawn: 1 / sqrt(images of its group), generated ones a fixed share."""
    groups, index, counts = np.unique([s.group for s in samples], return_inverse=True, return_counts=True)
    weights = 1 / np.sqrt(counts[index])
    drawn = np.char.startswith(groups[index], "generated")
    if drawn.any() and not drawn.all():
        weights[drawn] *= generated_share / weights[drawn].sum()
        weights[~drawn] *= (1 - generated_share) / weights[~drawn].sum()
    return weights / weights.sum()


def segmenter_loss(y: Tensor, truth: Tensor) -> Tensor:
    """Cellpose's: half the squared error of flows (5 x unit length) plus cross entropy of the foreground."""
    flows = F.mse_loss(y[:, :2], 5 * truth[:, :2]) / 2
    return flows + F.binary_cross_entropy_with_logits(y[:, 2], truth[:, 2])


def _batch(
    samples: Sequence[Sample], cumulative: np.ndarray, recipe: Recipe, step: int
) -> tuple[Tensor, Tensor]:
    tiles = []
    for i in range(recipe.batch):
        rng = np.random.default_rng([recipe.seed, step, i])
        chosen = min(int(np.searchsorted(cumulative, rng.random(), side="right")), len(samples) - 1)
        tiles.append(tile(samples[chosen], rng, recipe.side))
    return _stack(tiles)


def _stack(tiles: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    x, y = (torch.from_numpy(np.stack(part)) for part in zip(*tiles, strict=True))
    return x, y
