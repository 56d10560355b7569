"""What the machinery itself costs, by the task, by the slide and in memory; sleeps in place of work.

tasks      overhead of a task in a `Window`, beside a no-op ``client.map`` of the same run
resume     a finished study of many slides, started again
memory     scheduler, driver and workers, by number of slides

python benchmarks/scale.py tasks resume
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import standins

from daskcell.compute import Workers
from daskcell.pipeline import api


def tasks(count: int = 2000, workers: int = 2) -> dict[str, Any]:
    """Microseconds a task, (wall - ideal / workers) / tasks, of a window and of ``client.map``."""
    found: dict[str, Any] = {}
    with standins.processes(workers, {}) as client:
        team = Workers(client, task_seconds=3600)

        def mapped(work: Callable[..., None], seconds: float, number: int) -> None:
            client.gather(client.map(work, [seconds] * number, pure=False))

        def windowed(work: Callable[..., None], seconds: float, number: int) -> None:
            window = team.window()
            for key in range(number):
                window.submit(key, work, seconds)
            for _ in window:
                pass

        def overhead(way: Callable[..., None], work: Callable[..., None], seconds: float, number: int) -> Any:
            """Of wall time and of CPU, all processes together."""
            cpu, start = spent(), time.perf_counter()
            way(work, seconds, number)
            wall = time.perf_counter() - start - seconds * number / workers
            return 1e6 * wall / number, 1e6 * (spent() - cpu) / number

        def spent() -> float:
            return sum(cpu for cpu, _ in standins.used(client).values())

        for name, work, seconds, number in (
            ("no-op", standins.nothing, 0.0, count),
            ("50 ms", time.sleep, 0.05, count // 20),
        ):
            for way in (mapped, windowed) * 3:  # in turns; the quietest of three counts
                wall, cpu = overhead(way, work, seconds, number)
                kept = found.setdefault(f"{way.__name__} {name}", {"wall_us": wall, "cpu_us": cpu})
                kept |= {"wall_us": min(wall, kept["wall_us"]), "cpu_us": min(cpu, kept["cpu_us"])}
        plain = found["mapped no-op"]["wall_us"]
        found["ratio"] = found["windowed 50 ms"]["wall_us"] / plain
        found["ratio_no_op"] = found["windowed no-op"]["wall_us"] / plain
    return found


def resume(count: int = 1000) -> dict[str, Any]:
    """Seconds to find out that nothing is left to do: names and sizes, and all checksums."""
    with tempfile.TemporaryDirectory() as name, standins.stages():
        scratch = Path(name)
        inputs = standins.fields(scratch / "in", count)
        settings = {"compute": {"kind": "inline"}}
        times = {}
        for what, options in (("first", {}), ("again", {}), ("verify", {"verify": True})):
            start = time.perf_counter()
            study = api.run(inputs, scratch / "out", settings, **options)
            times[what] = time.perf_counter() - start
            assert not study.failures, study.failures[0]
    return {"slides": count, **times, "bound": 5 + 0.002 * count}


def memory(counts: list[int]) -> dict[str, Any]:
    """Peak memory by number of slides; each count has processes of its own, since a peak never falls."""
    found = {}
    for count in counts:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found[str(count)] = pool.submit(memory_of, count).result()
    return found


def memory_of(count: int, workers: int = 4) -> dict[str, float]:
    """Peak of scheduler, driver and workers in MB, and milliseconds a slide."""
    with (
        tempfile.TemporaryDirectory() as name,
        standins.stages(),
        standins.processes(workers, {}) as client,
    ):
        scratch = Path(name)
        inputs = standins.fields(scratch / "in", count)
        start = time.perf_counter()
        study = api.run(inputs, scratch / "out", {}, client)
        wall = time.perf_counter() - start
        assert not study.failures, study.failures[0]
        peaks = {f"{who}_mb": round(peak, 1) for who, (_, peak) in standins.used(client).items()}
    return peaks | {"ms_a_slide": round(1000 * wall / count, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=["tasks", "resume", "memory"])
    parser.add_argument("--slides", type=int, nargs="+", default=[200, 2000, 10_000])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "tasks": tasks,
        "resume": resume,
        "memory": lambda: memory(options.slides),
    }
    for what in options.what:
        print(what, json.dumps(runs[what](), indent=None if options.json else 1), flush=True)


if __name__ == "__main__":
    main()
