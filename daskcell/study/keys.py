"""Content keys: what a stage's result depends on, as one hash.

A key covers the input's bytes, the settings that matter to the stage, the weights, the stage's version and
the key of the stage before. Two runs with equal keys have equal results, so a study redoes what has another
key, and nothing else. Where a run works (`compute`) is no part of any key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from daskcell import places
from daskcell.config import Config
from daskcell.errors import ImageError

_PIECE = 4 << 20

UPSTREAM: dict[str, str | None] = {
    "convert": None,
    "freeze": "convert",
    "export": "freeze",
    "segment": "freeze",
    "describe": "segment",
    "assign": "describe",
    "paint": "assign",
}
"""The stages of a slide, in order, each with the one whose output it reads."""

SLIDE_STAGES = ("convert", "freeze", "export", "segment", "describe")
"""Stages that need no other slide; `assign` and `paint` wait for the clusters of all."""

STAGE_VERSIONS = dict.fromkeys((*UPSTREAM, "cluster"), 1)
STAGE_VERSIONS |= {"convert": 2, "segment": 2, "describe": 2, "assign": 2, "cluster": 2}
"""Raised by one when a stage gives another result for the same input and settings: studies redo it."""


def descendants(stage: str) -> set[str]:
    """Stages that read, at first or second hand, what `stage` writes."""
    found: set[str] = set()
    for name, before in UPSTREAM.items():  # in order: a stage comes after the one it reads
        if before == stage or before in found:
            found.add(name)
    return found


def content_key(stage: str, *parts: Any) -> str:
    """Hash of a stage's name, its version and everything its result depends on (JSON-able)."""
    text = json.dumps(
        [stage, STAGE_VERSIONS[stage], *parts], sort_keys=True, separators=(",", ":"), default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()


def slide_keys(
    config: Config, files: Iterable[Mapping[str, Any]], weights: Mapping[str, str]
) -> dict[str, str]:
    """Content keys of the stages that need no other slide.

    Parameters
    ----------
    files
        Identity of the input, as `identify` gives it.
    weights
        Fingerprints of other files by stage: networks for ``segment`` and ``describe``.
    """
    identity = [[file["name"], file["digest"], *file.get("said", ())] for file in files]
    keys = {"convert": content_key("convert", identity, _dump(config.input))}
    keys["freeze"] = content_key(
        "freeze", keys["convert"], _dump(config.preprocess), weights.get("freeze", "")
    )
    keys["segment"] = content_key(
        "segment", keys["freeze"], segment_settings(config), weights.get("segment", "")
    )
    keys["describe"] = content_key(
        "describe", keys["segment"], _dump(config.features), weights.get("describe", "")
    )
    pictures = {"channels": config.output.channels, "preprocessed": config.output.preprocessed}
    keys["export"] = content_key("export", keys["freeze"], pictures)
    return keys


def cluster_key(config: Config, describe_keys: Mapping[str, str]) -> str:
    """Content key of the fitted clusters: depends on the slides that took part, not on their order."""
    return content_key("cluster", sorted(describe_keys.items()), _dump(config.cluster))


def late_keys(config: Config, describe: str, cluster: str) -> dict[str, str]:
    """Content keys of the stages of a slide that follow the clusters."""
    assign = content_key("assign", describe, cluster)
    return {
        "assign": assign,
        "paint": content_key("paint", assign, config.output.overlays, config.output.overlay_side),
    }


def segment_settings(config: Config) -> dict[str, Any]:
    """The settings a segmentation depends on: not those of the other method, nor what is only kept."""
    values = _dump(config.segment)
    del values["keep_flows"]
    if config.segment.method == "cellpose":
        del values["watershed"]
    else:
        for name in ("model", "cellprob_threshold", "flow_threshold", "niter", "batch_size"):
            del values[name]
    return values


_ONLY_MASKS = ("cellprob_threshold", "flow_threshold", "niter", "min_size", "max_size_fraction")
"""Settings of a segmentation that come into play once flows and image parameters are there."""


def flows_key(config: Config, files: Iterable[Mapping[str, Any]], weights: Mapping[str, str]) -> str:
    """Content key of what a segmentation keeps so that masks can be made anew (``segment.keep_flows``).

    It is the key of the segmentation without the settings that only matter to masks, and with the side of
    the blocks, which are what is kept is cut into.
    """
    settings = {k: v for k, v in segment_settings(config).items() if k not in _ONLY_MASKS}
    return content_key(
        "segment",
        slide_keys(config, files, weights)["freeze"],
        settings,
        weights.get("segment", ""),
        {"block": config.compute.block},
    )


def identify(
    paths: Iterable[str | Path], known: Iterable[Mapping[str, Any]] = (), said: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Name, size, time and digest of each input file; a folder (Zarr) counts as all its files.

    `said` is what a manifest says of them. `known` is an earlier answer: a file of the same size and time is
    not read again. Nothing on object storage is read for this: the digest is that of names, sizes and ETags.
    """
    earlier = {entry["path"]: entry for entry in known}
    found = []
    for path in paths:
        size, mtime = _weigh(path)
        before = earlier.get(str(path))
        if before is not None and (before["size"], before["mtime_ns"]) == (size, mtime):
            found.append(dict(before))
        else:
            content = str(mtime) if places.is_remote(path) else digest(Path(path))
            entry = {
                "path": str(path),
                "name": PurePath(path).name,
                "size": size,
                "mtime_ns": mtime,
                "digest": content,
            }
            found.append(entry)
    for entry in found[:1]:
        entry.pop("said", None)
        entry |= {"said": list(said)} if said else {}
    return found


def unchanged(paths: Iterable[str | Path], known: list[dict[str, Any]], said: Iterable[str] = ()) -> bool:
    """Whether files are as `known` says, by size and time alone, and so is what a manifest says of them."""
    found = [str(path) for path in paths]
    if [entry["path"] for entry in known] != found or (known and known[0].get("said", []) != list(said)):
        return False
    with contextlib.suppress(OSError, ImageError):
        return all(_weigh(p) == (e["size"], e["mtime_ns"]) for p, e in zip(found, known, strict=True))
    return False


def digest(path: Path) -> str:
    """BLAKE2 of a file's bytes, or of the names and bytes of all files in a folder."""
    total = hashlib.blake2b(digest_size=20)
    for file in _files(path):
        if file != path:
            total.update(str(file.relative_to(path)).encode() + b"\0")
        with open(file, "rb") as stream:
            while piece := stream.read(_PIECE):
                total.update(piece)
    return total.hexdigest()


def _weigh(path: str | Path) -> tuple[int, int | str]:
    """Size in bytes and time in ns: of a folder, the sum and the latest. Remote: a hash of ETags."""
    if places.is_remote(path):
        found = places.versions_below(str(path))
        tags = hashlib.blake2b(repr(found).encode(), digest_size=20)
        return sum(size for size, _ in found.values()), tags.hexdigest()
    status = [file.stat() for file in _files(Path(path))]
    return sum(s.st_size for s in status), max((s.st_mtime_ns for s in status), default=0)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _dump(settings: Any) -> dict[str, Any]:
    return settings.model_dump(mode="json")
