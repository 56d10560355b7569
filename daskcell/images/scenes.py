"""Files that hold several images: scenes, positions, series, fields of a plate. Each becomes a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal

from daskcell.errors import DaskcellError, ImageError
from daskcell.images.filename_channels import safe_name, unique_names
from daskcell.images.reader_process import open_safely
from daskcell.images.readers import MissingScene, is_zarr_folder
from daskcell.images.readers.omezarr import images_within
from daskcell.images.sources import Source
from daskcell.storage import paths

Chosen = Literal["all"] | Sequence[str | int]
SHOWN = 8
"""Number of names that a message lists."""


def split_scenes(
    source: Source, chosen: Chosen = "all", *, required: str | None = None
) -> list[Source] | None:
    """One source for each image that the file of `source` holds, or for those that are chosen; of each, the
    `Source.companions` are known.

    If there are several, each is named after the file and the scene: by its name, or else by its number,
    counted from 0; if there is one, it is `source` itself. None if the file cannot be read.

    Parameters
    ----------
    source
        Whose first file is opened.
    chosen
        Names (patterns with ``*``) or numbers of scenes.
    required
        Where the choice was made for this file alone, as errors say it: it must fit a file of one scene too.

    Raises
    ------
    ImageError
        If there are several, and what is chosen is none of them.
    """
    first = source.files[0]
    try:
        folders = images_within(first) if is_zarr_folder(first) else []
        if folders:
            names: Sequence[str] = folders
        else:
            names, companions = _contents(replace(source, files=(first,), file_channels=None, take=None))
            source = replace(source, companions=companions)
    except DaskcellError:
        return None
    labels = scene_labels(names)
    if len(names) < 2 and not folders:
        if required:
            _positions(first, names, labels, chosen, required)
        return [replace(source, part="")]
    found = []
    for number in _positions(first, names, labels, chosen, required or "input.scenes"):
        part = names[number] if folders else labels[number]
        scene = replace(source, name=f"{source.name}_{labels[number]}", part=part)
        if folders:
            files = tuple(paths.join(file, *names[number].split("/")) for file in source.files)
            found.append(replace(scene, files=files))
        else:
            # The scene is part of the content keys, as what a manifest says.
            found.append(replace(scene, scene=number, said=(*source.said, f"scene {number}")))
    return found


def _contents(source: Source) -> tuple[Sequence[str], tuple[str, ...]]:
    """Names of the images in a file, of which the first may be missing, and the other files that it names."""
    while True:
        try:
            reader = open_safely(source)
        except MissingScene:
            source = replace(source, scene=source.scene + 1)
        else:
            reader.close()
            own = paths.realpath(source.files[0])
            return reader.scenes, tuple(sorted(file for file in reader.files if file != own))


def scene_labels(names: Sequence[str]) -> list[str]:
    """Labels of the scenes, all different: the name, or the number if it has none or not one of its own."""
    safe = [safe_name(name).lower() if name.strip() else "" for name in names]
    own = [bool(text) and safe.count(text) == 1 for text in safe]
    return unique_names(
        name if is_own else str(i) for i, (name, is_own) in enumerate(zip(names, own, strict=True))
    )


def list_scenes(names: Sequence[str]) -> str:
    """The names of scenes, the first `SHOWN` of many, for a message."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _positions(
    file: str, names: Sequence[str], labels: Sequence[str], chosen: Chosen, place: str
) -> list[int]:
    if chosen == "all":
        return list(range(len(names)))
    found = [
        i
        for i, (name, label) in enumerate(zip(names, labels, strict=True))
        if any(_is_meant(wanted, i, (name, label), names, labels) for wanted in chosen)
    ]
    if not found:
        raise ImageError(
            f"{file} holds {len(names)} images ({list_scenes(labels)}); none of them is "
            f"{' or '.join(map(repr, chosen))}. Please name others in {place}."
        )
    return found


def _is_meant(
    wanted: str | int, position: int, own: tuple[str, str], names: Sequence[str], labels: Sequence[str]
) -> bool:
    if isinstance(wanted, int):
        return wanted == position
    if wanted in names or wanted in labels:  # exactly: a name may hold a * itself
        return wanted in own
    if wanted.isdigit():
        return int(wanted) == position
    return any(fnmatchcase(name.lower(), wanted.lower()) for name in own)
