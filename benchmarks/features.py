"""Features: the whole way against the bare network, and pooling over cells against cropping, in one run.

    python benchmarks/features.py [--encoder resnet152] [--cells 64] [--side 1024] [--threads 1]

Prints as JSON, for the encoder with random weights where none are at hand (speed is the same):
`crop.ratio`, cells/s of `embed` over images/s of the network fed with ready tensors, in turns;
`mask.faster`, cells/s of ``pooling="mask"`` over those of ``pooling="crop"``, on a dense field of
30-pixel cells.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np

from daskcell.compute import threads_limited


def dense_field(side: int, diameter: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Round cells side by side, as close as they go: ``(3, side, side)`` float32 and labels."""
    rng = np.random.default_rng(seed)
    pitch = diameter + 1
    yy, xx = np.mgrid[:side, :side]
    row = yy // pitch
    x = xx + (row % 2) * (pitch // 2)
    column = x // pitch
    inside = (yy % pitch - pitch / 2) ** 2 + (x % pitch - pitch / 2) ** 2 < (diameter / 2) ** 2
    labels = np.where(inside, row * (side // pitch + 2) + column + 1, 0)
    _, labels = np.unique(labels, return_inverse=True)
    labels = labels.reshape(side, side).astype(np.uint32)
    bright = rng.uniform(0.3, 0.9, (3, labels.max() + 1)).astype(np.float32)
    bright[:, 0] = 0.05
    image = bright[:, labels] + rng.normal(0, 0.03, (3, side, side)).astype(np.float32)
    return np.clip(image, 0, 1), labels


def network(name: str) -> Any:
    """An encoder's module, with random weights where it is torchvision's."""
    if name == "tiny":
        from daskcell.models import load_encoder

        return load_encoder("tiny")
    import torchvision

    module = torchvision.models.get_model(name, weights=None).eval()
    module.size, module.mean, module.std = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return module


def ready_batch(image: np.ndarray, labels: np.ndarray, module: Any, batch: int) -> Any:
    """The first batch of crops as the network gets them."""
    import torch

    from daskcell.features import embed

    seen: list[np.ndarray] = []

    def see(crops: np.ndarray) -> np.ndarray:
        seen.append(crops.copy())
        return crops[:, 0, 0]

    few = np.where(labels <= batch, labels, 0).astype(np.uint32)
    embed(image, few, see, size=module.size, batch_size=batch)
    ready = torch.from_numpy(seen[0])
    if module.mean is not None:
        ready = (ready - torch.tensor(module.mean)[:, None, None]) / torch.tensor(module.std)[:, None, None]
    return ready


def crop_speed(module: Any, cells: int, batch: int, rounds: int) -> dict[str, Any]:
    """The network alone and the whole way, in turns."""
    import torch

    from daskcell.features import embed

    side = 31 * int(np.ceil(np.sqrt(cells)) + 1)
    image, labels = dense_field(side)
    labels[labels > cells] = 0
    ready = ready_batch(image, labels, module, batch)
    alone, whole = [], []
    for _ in range(rounds + 1):  # the first warms up
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(cells // batch):
                module(ready)
        alone.append(cells / (time.perf_counter() - start))
        start = time.perf_counter()
        assert len(embed(image, labels, module, batch_size=batch)) == cells
        whole.append(cells / (time.perf_counter() - start))
    ratios = [w / a for w, a in zip(whole[1:], alone[1:], strict=True)]
    return {
        "network": statistics.median(alone[1:]),
        "whole": statistics.median(whole[1:]),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def mask_speed(module: Any, side: int, scale: float) -> dict[str, Any]:
    """Cells/s of pooling over the cells of a whole field."""
    from daskcell.features import embed

    image, labels = dense_field(side)
    embed(image[:, :64, :64], labels[:64, :64], module, pooling="mask", scale=scale)
    start = time.perf_counter()
    vectors = embed(image, labels, module, pooling="mask", scale=scale)
    return {"cells": len(vectors), "whole": len(vectors) / (time.perf_counter() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="resnet152")
    parser.add_argument("--cells", type=int, default=32, help="cells to crop; a multiple of the batch")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=768, help="of the field that is pooled, in pixels")
    parser.add_argument("--scale", type=float, default=1.0, help="network pixels per pixel")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with threads_limited(options.threads):
        module = network(options.encoder)
        crop = crop_speed(module, options.cells, options.batch, options.rounds)
        mask = mask_speed(module, options.side, options.scale)
    mask["faster"] = mask["whole"] / crop["whole"]
    figures = {"encoder": options.encoder, "threads": options.threads, "crop": crop, "mask": mask}
    print(json.dumps(figures, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
