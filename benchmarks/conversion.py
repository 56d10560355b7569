"""Conversion: speed against the codecs and against ome-zarr-py, and memory, in one run.

    python benchmarks/conversion.py [--gigabytes 1] [--sides 4096 32768] [--json]
    python benchmarks/conversion.py --kinds --layouts lzw --sides 4096 32768     # memory alone

Two files of the same picture: JPEG tiles and LZW strips. All speeds are MB of level 0 a second **of one
core**: each measurement is a process that may use one core only, with all the processes it starts.

decode      every tile or strip with tifffile, nothing kept
encode      chunks of level 0 with the codec of the converted image, nothing kept
bound       the slower of the two, as if both could go on at the same time
serial      one after the other, as one core must, a third more for the pyramid: 1 / (1/decode + 4/3/encode)
convert     `convert_slide`, from the file to the finished OME-Zarr with its pyramid
ome_zarr    `ome_zarr.writer.write_image` of the lazy dask array over tifffile's own Zarr view
workers     `convert_slide` on one worker a core, all cores at once; per core
process     `convert_slide` in one process that may use all cores; in all, not per core

Memory is the largest resident size of a worker, and that of the process that opens files for it, while
pictures of growing sides are converted, of each layout.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import queue
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

ROOT = Path(__file__).resolve().parents[1]
TILE, STRIP = 256, 16


def picture() -> np.ndarray:
    """A stained section ``(Y, X, 3)`` in whole tiles; a generated one where the real is absent."""
    file = ROOT.parent / "shared" / "data" / "slide" / "CMU-1-Small-Region.svs"
    if file.exists():
        pixels = tifffile.imread(file, key=0)
    else:
        from daskcell.evaluation.generated import synthesize_field

        pixels = 255 - np.moveaxis(synthesize_field((2304, 2304), seed=1).channels[:3], 0, 2).astype(np.uint8)
    y, x = (side // TILE * TILE for side in pixels.shape[:2])
    return pixels[:y, :x]


def write_tiles(path: Path, pixels: np.ndarray, side: int) -> None:
    """The picture again and again, as JPEG tiles."""
    down, across = (length // TILE for length in pixels.shape[:2])

    def tiles() -> Iterator[np.ndarray]:
        for i, j in np.ndindex(side // TILE, side // TILE):
            y, x = i % down * TILE, j % across * TILE
            yield np.ascontiguousarray(pixels[y : y + TILE, x : x + TILE])

    options: dict[str, Any] = {"photometric": "rgb", "compression": "jpeg", "tile": (TILE, TILE)}
    tifffile.imwrite(path, tiles(), shape=(side, side, 3), dtype=np.uint8, **options)


def write_strips(path: Path, pixels: np.ndarray, side: int) -> None:
    """The picture again and again, as strips of LZW."""
    import imagecodecs

    wide = np.tile(pixels, (1, -(-side // pixels.shape[1]), 1))[:, :side]
    packed = [imagecodecs.lzw_encode(wide[y : y + STRIP].tobytes()) for y in range(0, len(wide), STRIP)]
    strips = (packed[i % len(packed)] for i in range(side // STRIP))
    options: dict[str, Any] = {"photometric": "rgb", "compression": "lzw", "rowsperstrip": STRIP}
    tifffile.imwrite(path, strips, shape=(side, side, 3), dtype=np.uint8, **options)


WRITERS = {"jpeg": write_tiles, "lzw": write_strips}


def on_one_core(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process of its own on one core."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_pinned, args=(results, function, arguments))
    process.start()
    try:
        while True:
            try:
                return results.get(timeout=1)
            except queue.Empty:
                if not process.is_alive():
                    raise RuntimeError(f"{function.__name__} ended with {process.exitcode}") from None
    finally:
        process.join()


def _pinned(results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    results.put(function(*arguments))


def decode_speed(file: str) -> float:
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        next(iter(page.segments(maxworkers=1)))
        start, size = time.perf_counter(), 0
        for segment, _, _ in page.segments(maxworkers=1):
            size += segment.nbytes
        return size / 1e6 / (time.perf_counter() - start)


def encode_speed(image: str) -> float:
    import zarr

    from daskcell.images.shards import encoder

    array = zarr.open_array(image, path="0", mode="r")
    side, encode = array.chunks[-1], encoder(array)
    pixels = np.asarray(array[:, :4096, :4096])
    chunks = [
        np.ascontiguousarray(channel[y : y + side, x : x + side])
        for channel in pixels
        for y in range(0, pixels.shape[1], side)
        for x in range(0, pixels.shape[2], side)
    ]
    encode(chunks[0])
    start = time.perf_counter()
    for _ in range(3):
        for chunk in chunks:
            encode(chunk)
    return 3 * pixels.nbytes / 1e6 / (time.perf_counter() - start)


def convert_seconds(file: str, image: str, warm: str) -> dict[str, Any]:
    from daskcell.images import find_images
    from daskcell.images.conversion import convert_slide

    convert_slide(find_images(warm)[0], image + ".warm")  # imports, and the process that opens files
    start = time.perf_counter()
    result = convert_slide(find_images(file)[0], image)
    seconds = time.perf_counter() - start
    found = sum(path.is_file() for path in Path(image).glob("[0-9]*/c/*/*/*"))
    return {"seconds": seconds, "files": result["files"], "found": found, "shards": shard_count(image)}


def shard_count(image: str) -> int:
    """Files that an image of such levels and shards has, by their sizes."""
    import zarr

    group = zarr.open_group(image, mode="r")
    return sum(
        math.prod(-(-length // side) for length, side in zip(array.shape, array.shards, strict=True))
        for name, array in group.arrays()
        if name.isdigit()
    )


def ome_zarr_seconds(file: str, image: str) -> float:
    import dask
    import dask.array as da
    import zarr
    from ome_zarr.writer import write_image

    start = time.perf_counter()
    with tifffile.TiffFile(file) as tiff, dask.config.set(scheduler="threads", num_workers=1):
        page = tiff.pages[0]
        view = zarr.open_array(page.aszarr(), mode="r")
        block = (2048, 2048, 3) if page.is_tiled else (512, page.imagewidth, 3)
        lazy = da.moveaxis(da.from_zarr(view, chunks=block), 2, 0)
        write_image(lazy, image, axes="cyx", storage_options={"chunks": (1, 512, 512)})
    return time.perf_counter() - start


def workers_seconds(file: str, image: str, warm: str) -> tuple[float, int]:
    """Seconds on one worker a core, and their number."""
    from daskcell.compute import start_workers
    from daskcell.config import ComputeSettings
    from daskcell.images import find_images
    from daskcell.images.conversion import convert_slide

    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with start_workers(ComputeSettings(workers=count)) as workers:
        assert workers.client is not None
        workers.client.run(_warm_up, warm, image)
        start = time.perf_counter()
        convert_slide(find_images(file)[0], image, workers)
        return time.perf_counter() - start, count


def _warm_up(file: str, image: str) -> None:
    convert_seconds(file, f"{image}.{os.getpid()}", file)


def peak_megabytes(file: str, image: str) -> dict[str, int]:
    """Largest resident sizes of the worker and of its child."""
    from daskcell.compute import start_workers
    from daskcell.config import ComputeSettings
    from daskcell.images import find_images
    from daskcell.images.conversion import convert_slide

    with start_workers(ComputeSettings(workers=1)) as workers:
        convert_slide(find_images(file)[0], image, workers)
        assert workers.client is not None
        (sizes,) = workers.client.run(_resident).values()
        return sizes


def _resident() -> dict[str, int]:
    import psutil

    process = psutil.Process()
    sizes = {}
    for name, one in zip(("worker", "reader"), (process, *process.children()), strict=False):
        lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
        sizes[name] = next(int(line.split()[1]) * 1024 // 10**6 for line in lines if line.startswith("VmHWM"))
    return sizes


def measure(folder: Path, kind: str, file: Path, warm: Path, decoded: float) -> dict[str, Any]:
    """All figures of one file of `decoded` MB."""
    image = folder / f"{kind}.zarr"
    ours = on_one_core(convert_seconds, str(file), str(image), str(warm))
    decode = on_one_core(decode_speed, str(file))
    encode = on_one_core(encode_speed, str(image))
    convert = decoded / ours["seconds"]
    theirs = decoded / on_one_core(ome_zarr_seconds, str(file), str(folder / f"{kind}-ome.zarr"))
    seconds, count = workers_seconds(str(file), str(folder / f"{kind}-workers.zarr"), str(warm))
    free = convert_seconds(str(file), str(folder / f"{kind}-free.zarr"), str(warm))
    bound, serial = min(decode, encode), 1 / (1 / decode + 4 / 3 / encode)
    size = sum(path.stat().st_size for path in (image / "0").rglob("*") if path.is_file())
    return {
        "decode": decode,
        "encode": encode,
        "bound": bound,
        "serial": serial,
        "convert": convert,
        "of_bound": convert / bound,
        "of_serial": convert / serial,
        "ome_zarr": theirs,
        "times_ome_zarr": convert / theirs,
        "workers": decoded / seconds / count,
        "process": decoded / free["seconds"],
        "cores": count,
        "compressed": decoded * 1e6 / size,
        "files": ours["files"],
        "files_found": ours["found"],
        "shards": ours["shards"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--kinds", nargs="*", default=[*WRITERS], choices=[*WRITERS], help="to be timed")
    parser.add_argument("--layouts", nargs="*", default=[*WRITERS], choices=[*WRITERS], help="for memory")
    parser.add_argument("--sides", type=int, nargs="*", default=[4096, 8192, 16384, 32768], help="for memory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    side = -(-int((options.gigabytes * 1e9 / 3) ** 0.5) // TILE) * TILE
    figures: dict[str, Any] = {"side": side, "gigabytes": 3 * side * side / 1e9, "memory_mb": {}}
    pixels = picture()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        warm = folder / "warm.tif"
        write_tiles(warm, pixels, 2048)
        for kind in options.kinds:
            file = folder / f"{kind}.tif"
            WRITERS[kind](file, pixels, side)
            figures[kind] = measure(folder, kind, file, warm, 3 * side * side / 1e6)
        for kind, large in itertools.product(options.layouts, options.sides):
            file, image = folder / "large.tif", folder / "large.zarr"
            WRITERS[kind](file, pixels, large)
            figures["memory_mb"].setdefault(kind, {})[large] = peak_megabytes(str(file), str(image))
            shutil.rmtree(image)
    figures = json.loads(json.dumps(figures), parse_float=lambda text: round(float(text), 3))
    print(json.dumps(figures, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
