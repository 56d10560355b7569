"""k-means: our step against the matrix product it cannot do without, against dask-ml, and memory by rows.

    python benchmarks/clustering.py [step] [engines] [memory] [auto] [--rows 1000000] [--features 256] [-k 16]

The first two, unless told. Prints as JSON.

``step``: rows/s of one thread for the bare product ``x @ centers.T`` in float32, for our assignment and
sums of the same rows in memory and in mapped files, and their ratios to the product. ``engines``: seconds
and rows/s of dask-ml's ``Incremental(MiniBatchKMeans)`` and of `lloyd` from the same first centres over
the same rows on the same workers. ``memory`` (minutes): peak MiB of a process that fits more and more rows,
which are made as they are read. ``auto`` (minutes): how often ``k="auto"`` finds the number of separated
clusters, 3 to 15 of them, with several seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from daskcell.clustering.assignment import NearestCenters, grid_steps
from daskcell.clustering.feature_blocks import BLOCK, FeatureBlock, FileBlock, partition

_POOL = 1 << 22


def blobs(rows: int, features: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of k clusters that overlap a little, in even steps, and first centres near the right ones."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(k, features))
    x = (centers[rng.integers(0, k, rows)] + rng.normal(0, 1.5, (rows, features))).astype(np.float32)
    whole = grid_steps(x[:4096])
    x = (np.rint(x / whole) * whole).astype(np.float32)
    return x, centers + rng.normal(0, 0.3, centers.shape)


def best(rows: int, functions: dict[str, Callable[[], Any]], times: int = 7) -> dict[str, float]:
    """Rows/s of each function, the best of some runs in turn: all see the same machine."""
    seconds = dict.fromkeys(functions, float("inf"))
    for _ in range(times + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return {name: rows / value for name, value in seconds.items()}


def step(features: int, k: int, rows: int = 16 * BLOCK) -> dict[str, float]:
    x, centers = blobs(rows, features, k)
    single = centers.astype(np.float32)
    nearest = NearestCenters(centers)
    sums, counts = np.zeros(centers.shape), np.zeros(k, np.int64)
    pieces = [x[i : i + BLOCK] for i in range(0, rows, BLOCK)]

    with tempfile.TemporaryDirectory() as folder:
        files = [FileBlock.write(f"{folder}/{i}.f4", piece) for i, piece in enumerate(pieces)]
        found = best(
            rows,
            {
                "product": lambda: [piece @ single.T for piece in pieces],
                "product_transposed": lambda: [single @ piece.T for piece in pieces],
                "in_memory": lambda: [nearest.add(piece, sums, counts) for piece in pieces],
                "from_files": lambda: [nearest.add(file.read(), sums, counts) for file in files],
                "scikit_learn": _partial_fit(pieces, single),
            },
        )
    for name in ("in_memory", "from_files", "scikit_learn"):
        found[f"{name}_to_product"] = found[name] / found["product"]
        found[f"{name}_to_faster_product"] = found[name] / max(found["product"], found["product_transposed"])
    return found


def _partial_fit(pieces: list[np.ndarray], centers: np.ndarray) -> Callable[[], Any]:
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(len(centers), init=centers, n_init=1, batch_size=BLOCK, reassignment_ratio=0)
    return lambda: [model.partial_fit(piece) for piece in pieces]


def engines(rows: int, features: int, k: int, workers: int) -> dict[str, Any]:
    import dask.array as da
    from dask_ml.wrappers import Incremental
    from sklearn.cluster import MiniBatchKMeans

    from daskcell.clustering import kmeans as room
    from daskcell.compute import start_workers
    from daskcell.config import ComputeSettings

    x, first = blobs(rows, features, k)
    found: dict[str, Any] = {"rows": rows, "workers": workers}
    with (
        tempfile.TemporaryDirectory() as folder,
        start_workers(ComputeSettings(workers=workers, device="cpu")) as team,
    ):
        blocks: list[FeatureBlock] = []
        for i in range(0, rows, BLOCK):
            blocks.append(FileBlock.write(f"{folder}/{i}.f4", x[i : i + BLOCK]))
        sizes = [len(block.read()) for block in blocks]
        array = da.concatenate(
            [
                da.from_delayed(_lazy(block), (size, features), np.float32)
                for block, size in zip(blocks, sizes, strict=True)
            ]
        )
        model = MiniBatchKMeans(
            k, init=first.astype(np.float32), n_init=1, batch_size=BLOCK, reassignment_ratio=0, random_state=0
        )
        tolerance = 1e-4 * float(x[:16384].var(axis=0).mean())
        team.client.run(_warm, blocks[0].path, blocks[0].shape, first)
        for _ in range(2):  # the first also fills the file cache and compiles
            start = time.perf_counter()
            Incremental(model, shuffle_blocks=False, random_state=0).fit(array)
            found["incremental_seconds"] = time.perf_counter() - start
            start = time.perf_counter()
            counted = _Count()
            centers = room.lloyd(blocks, first, tolerance, folder, team.watched(counted))
            found["parallel_seconds"] = time.perf_counter() - start
            found["rounds"] = counted.tasks // len(partition(team, blocks))
            start = time.perf_counter()
            one = room.lloyd(blocks, first, float("inf"), folder, team)
            found["one_round_seconds"] = time.perf_counter() - start
        del one
        found["inertia"] = room.inertia(blocks, centers, team)[1]
    found["incremental_rows_per_s"] = rows / found["incremental_seconds"]
    found["parallel_rows_per_s"] = rows * found["rounds"] / found["parallel_seconds"]
    found["parallel_to_incremental"] = found["parallel_rows_per_s"] / found["incremental_rows_per_s"]
    found["whole_fit_to_incremental"] = found["incremental_seconds"] / found["parallel_seconds"]
    return found


class _Count:
    """Counts finished tasks."""

    tasks = 0

    def __call__(self) -> None:
        self.tasks += 1


def _lazy(block: FeatureBlock) -> Any:
    import dask

    return dask.delayed(block.read)()


def _warm(path: str, shape: tuple[int, int], centers: np.ndarray) -> None:
    NearestCenters(centers).add(
        FileBlock(path, shape).read(), np.zeros(centers.shape), np.zeros(len(centers), int)
    )


@dataclass(frozen=True)
class MadeRows:
    """Rows of ten clusters, float16 as features are on disk, cut from one fixed pool of noise."""

    start: int
    stop: int
    width: int

    def read(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        pool = rng.normal(size=_POOL).astype(np.float16)
        centers = (3 * rng.normal(size=(10, self.width))).astype(np.float16)
        n = self.stop - self.start
        at = np.random.default_rng(self.start).integers(0, _POOL - self.width, n)
        rows = np.lib.stride_tricks.sliding_window_view(pool, self.width)[at]
        return (rows + centers[at % 10]).astype(np.float32)


def peak(rows: int, features: int, components: int | None) -> float:
    """Peak MiB of this process while it fits so many rows."""
    import resource

    from daskcell.clustering.fit import fit_blocks, reduce_to_file

    blocks: list[FeatureBlock] = [MadeRows(i, min(i + BLOCK, rows), features) for i in range(0, rows, BLOCK)]
    with tempfile.TemporaryDirectory() as folder:
        model = fit_blocks(
            blocks,
            16,
            engine="parallel",
            standardise=True,
            components=components,
            unit_length=False,
            seed=0,
            info=None,
            reduce_block=reduce_to_file,
            folder=folder,
        )
    assert model.counts_.sum() == rows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> dict[str, Any]:
    """Peak MiB and seconds of processes of their own."""
    found = {}
    sizes = [(100_000, 64, None), (1_000_000, 64, None), (4_000_000, 64, None), (1_000_000, 2048, 32)]
    for rows, features, components in sizes:
        start = time.perf_counter()
        code = f"import clustering; print(clustering.peak({rows}, {features}, {components}))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=os.path.dirname(os.path.abspath(__file__)),
        )
        data = rows * features * 2 / 2**20
        seconds = time.perf_counter() - start
        found[f"{rows} x {features}"] = {"peak": float(done.stdout), "data": data, "seconds": seconds}
    return found


def auto(seeds: int = 3) -> dict[str, Any]:
    from sklearn.datasets import make_blobs

    from daskcell.clustering import fit_clusters

    wrong, tried = [], 0
    for k in range(3, 16):
        for seed in range(seeds):
            x, _ = make_blobs(1500, 16, centers=k, cluster_std=1.0, random_state=100 * seed + k)
            found = fit_clusters(x.astype(np.float32), "auto", seed=seed).k
            tried += 1
            if found != k:
                wrong.append({"clusters": k, "seed": seed, "found": found})
    return {"tried": tried, "right": tried - len(wrong), "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="step, engines, memory, auto")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("-k", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures: dict[str, Any] = {"features": options.features, "k": options.k}
    parts: dict[str, Callable[[], Any]] = {
        "step": lambda: step(options.features, options.k),
        "engines": lambda: engines(options.rows, options.features, options.k, options.workers),
        "memory": memory,
        "auto": auto,
    }
    for part in options.parts or ("step", "engines"):
        figures[part] = parts[part]()
    print(json.dumps(figures, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
