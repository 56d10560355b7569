"""Which images are meant by files, folders and patterns: `find_images`."""

from __future__ import annotations

import glob
import os
import posixpath
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from daskcell.config import InputSettings
from daskcell.errors import DaskcellError, ImageError, warn
from daskcell.images import derived
from daskcell.images import filename_channels as names
from daskcell.images.manifest import is_manifest, read_manifest
from daskcell.images.reader_process import open_safely
from daskcell.images.readers import ZChoice, may_be_stack, suffixes, tiffpeek
from daskcell.images.readers.omezarr import is_zarr
from daskcell.images.scenes import split_scenes
from daskcell.images.sources import Source, find_channel
from daskcell.storage import paths

Tell = Callable[[str], None]


def find_images(
    inputs: str | Path | Sequence[str | Path],
    settings: InputSettings | None = None,
    tell: Tell | None = None,
) -> list[Source]:
    """All images among `inputs`.

    In folders and for patterns, these are left out unless they are named themselves: studies and other
    results of daskcell, hidden files, and segmentations beside their images (`daskcell.images.derived`).

    Parameters
    ----------
    inputs : path or sequence of paths
        Files, folders (searched recursively), patterns with ``*``, OME-Zarr, URLs, and tables of images
        (`daskcell.images.manifest`).
    settings : InputSettings, optional
        Pattern of names, channels, scenes, planes and pixel size.
    tell : callable, optional
        Called with a sentence about what is left out; by default it is an `InputWarning`.

    Returns
    -------
    list of Source
        One for each image, with names that are unique and safe as file names; nothing is open.

    Raises
    ------
    ImageError
        If there is no image, a path does not exist, or a channel is missing or exists twice.
    """
    settings = settings or InputSettings()
    tiffpeek.peek.cache_clear()
    say = tell or warn
    tell = lambda sentence: say(paths.printable(sentence))  # noqa: E731
    file_sets: list[names.FileSet] = []
    if isinstance(inputs, (str, Path)):
        inputs = [inputs]
    singles: dict[str, list[str]] = {}
    listed: list[Source] = []
    for given in inputs:
        text = paths.absolute(given)  # workers may run elsewhere
        if paths.is_folder(text) and not is_zarr(text):
            file_sets += _in_folder(text, settings.pattern, tell)
        elif is_manifest(text) and paths.exists(text):
            listed += read_manifest(text, tell)
        elif paths.exists(text):
            singles.setdefault(os.path.dirname(text), []).append(text)
        elif glob.has_magic(text) and (found := sorted(paths.matching(text), key=names.natural_key)):
            for folder, files in _matched(text, found, tell).items():
                singles.setdefault(folder, []).extend(files)
        elif os.path.islink(text):
            raise ImageError(f"There is no file or folder {text}: it is a link to {os.readlink(text)}.")
        else:
            raise ImageError(f"There is no file or folder {text}.")
    for folder, files in singles.items():
        files = list(dict.fromkeys(files))
        if settings.pattern is not None:
            named = {_below(f, folder): f for f in files}
            file_sets += names.file_sets_by_pattern(named, settings.pattern)
        else:
            file_sets += _file_sets(files)
    if not file_sets and not listed:
        raise ImageError(
            f"There is no image in {', '.join(os.fspath(i) for i in inputs)}; these kinds are looked for: "
            f"{' '.join(sorted(suffixes()))}."
        )
    if len(inputs) > 1:  # named twice: read once
        once: dict[object, names.FileSet] = {}
        for file_set in file_sets:
            once.setdefault((tuple(map(paths.realpath, file_set.files)), file_set.channels), file_set)
        file_sets = list(once.values())
    size = settings.pixel_size
    pixel_size = (size, size) if isinstance(size, (int, float)) else size
    take = tuple(settings.channels) if settings.channels is not None else None
    whole = [
        Source(file_set.name, file_set.files, file_set.channels, take, pixel_size) for file_set in file_sets
    ]
    whole += [replace(s, take=s.take or take, pixel_size=s.pixel_size or pixel_size) for s in listed]
    whole = [replace(source, axes=settings.axes) for source in whole]
    for source in whole:
        if take and source.file_channels:
            for name in take:
                find_channel(name, source.file_channels, source)
    sources = []
    for source, may_be_several in _marked(whole):
        scenes = _scenes(source, may_be_several, settings)
        if scenes is None:  # converting it reports the error, for this image alone
            # If it can be read by then, it must not be another scene than the manifest's.
            unread = replace(source, scene=-1) if source.part else source
            sources += _planes(unread, False, settings)
        for scene in scenes or ():
            sources += _planes(scene, may_be_several, settings)
    unique = names.unique_names(source.name for source in sources)
    return [replace(source, name=name) for source, name in zip(sources, unique, strict=True)]


def describe_sources(sources: Sequence[Source]) -> list[dict[str, str]]:
    """Which file is which channel of which image.

    Files that hold all channels are opened to name these.

    Returns
    -------
    list of dict
        One for each file, with ``image``, ``channel`` and ``file``.
    """
    rows = []
    for source in sources:
        if source.file_channels is None:
            rows.append({"image": source.name, "channel": _channels_inside(source), "file": source.files[0]})
            continue
        channels = source.file_channels
        taken = [find_channel(name, channels, source) for name in source.take or channels]
        for index, (channel, file) in enumerate(zip(channels, source.files, strict=True)):
            note = "" if index in taken else " (left out)"
            rows.append({"image": source.name, "channel": channel + note, "file": file})
    return rows


def _channels_inside(source: Source) -> str:
    try:
        reader = open_safely(source)
    except DaskcellError:
        return "(cannot be read)"
    reader.close()
    planes = reader.sizes["z"]
    note = f" (maximum of {planes} planes)" if source.z == "max" and planes > 1 else ""
    note += " (last axis)" if getattr(reader, "notes", ()) else ""
    return ", ".join(reader.channels) + note


def _marked(sources: list[Source]) -> list[tuple[Source, bool]]:
    """Each source, and whether it must be opened to find out how many images it holds."""
    first = [source.files[0] for source in sources]
    if not any(paths.is_remote(file) for file in first):
        return [(source, may_be_stack(file)) for source, file in zip(sources, first, strict=True)]
    with ThreadPoolExecutor(paths.REQUESTS_AT_ONCE) as pool:
        return list(zip(sources, pool.map(may_be_stack, first), strict=True))


def _scenes(source: Source, may_be_several: bool, settings: InputSettings) -> list[Source] | None:
    """One source for each scene that a manifest says, or else the settings; None if it cannot be read."""
    if source.part:
        found = split_scenes(source, [source.part], required="its row of the manifest")
        return [replace(found[0], name=source.name)] if found and len(found) == 1 else found
    return split_scenes(source, settings.scenes) if may_be_several else [source]


def _planes(source: Source, is_stack: bool, settings: InputSettings) -> list[Source]:
    """One source for each time point and plane that the settings choose."""
    z: ZChoice = 0 if settings.z == "all" else settings.z
    t = 0 if settings.t == "all" else settings.t
    chosen = replace(source, t=t, z=z)
    if not is_stack or (settings.z != "all" and settings.t != "all"):
        return [chosen]
    try:
        reader = open_safely(replace(chosen, files=source.files[:1], file_channels=None, take=None, t=0, z=0))
    except DaskcellError:
        return [chosen]  # converting it reports the error, for this image alone
    sizes = reader.sizes
    reader.close()
    times = range(sizes["t"]) if settings.t == "all" else [t]
    planes: Sequence[ZChoice] = range(sizes["z"]) if settings.z == "all" else [z]
    result = []
    for time in times:
        for plane in planes:
            name = source.name + (f"_t{time:03d}" if len(times) > 1 else "")
            name += f"_z{plane:03d}" if len(planes) > 1 else ""
            result.append(replace(chosen, name=name, t=time, z=plane))
    return result


def _may_be_folder(file: str) -> bool:
    """False for remote files with a suffix of images, to save a request for each."""
    return not (paths.is_remote(file) and file.lower().endswith(suffixes()))


def _matched(pattern: str, found: Iterable[str], tell: Tell) -> dict[str, list[str]]:
    """Images among the paths that match a pattern, by folder."""
    fixed = os.path.dirname(
        pattern[: min(pattern.find(mark) % len(pattern) for mark in "*?[" if mark in pattern)]
    )
    results: dict[str, str | None] = {}
    by_folder: dict[str, list[str]] = {}
    for file in found:
        folder = paths.split(file)[0]
        above = folder
        while not paths.is_remote(above) and len(above) > len(fixed) and above not in results:
            inside = os.listdir(above) if os.path.isdir(above) else []
            results[above] = derived.own_result(above, inside, inside)
            above = os.path.dirname(above)
        if any(what and _is_below(folder, top) for top, what in results.items()):
            continue
        if not _may_be_folder(file) or not paths.is_folder(file) or is_zarr(file):
            by_folder.setdefault(folder, []).append(file)
    for folder, what in results.items():
        if what:
            tell(f"{folder} is {what} and is not searched for images.")
    return _without_results(by_folder, fixed, tell)


def _in_folder(folder: str, pattern: str | None, tell: Tell) -> list[names.FileSet]:
    """Images in a folder and below; channels are matched within each folder."""
    by_folder = _images_below(folder, tell)
    if pattern is not None:
        relative = {_below(f, folder): f for files in by_folder.values() for f in files}
        chosen = set(names.matching_names(relative, pattern).values())
        by_folder = {parent: [f for f in files if f in chosen] for parent, files in by_folder.items()}
        left = {f for files in _without_results(by_folder, folder, tell).values() for f in files}
        return names.file_sets_by_pattern(
            {n: f for n, f in relative.items() if f in left or not left}, pattern
        )
    file_sets = []
    for parent, files in _without_results(by_folder, folder, tell).items():
        below = _below(parent, folder)
        for file_set in _file_sets(files):
            name = file_set.name or os.path.basename(parent)
            prefix = "" if below == "." else below.replace("/", "_") + "_"
            file_sets.append(replace(file_set, name=prefix + name))
    return file_sets


def _images_below(folder: str, tell: Tell) -> dict[str, list[str]]:
    """All files and OME-Zarr folders below `folder` that may be images, by folder; each once."""

    def failed(path: str, error: OSError) -> None:
        tell(f"The folder {path} cannot be searched for images ({error.strerror}).")

    by_folder: dict[str, list[str]] = {}
    for parent, folders, files in paths.walk(folder, failed):
        what = derived.own_result(parent, folders, files)
        if what is not None:
            if parent == folder:
                raise ImageError(
                    f"{folder} is {what}, which is no input. Please name the images themselves, "
                    "or the folder 'images' of a study."
                )
            tell(f"{parent} is {what} and is not searched for images.")
            folders.clear()
            continue
        folders.sort(key=names.natural_key)
        shown = [f for f in folders if not f.startswith(".")]
        zarrs = [f for f in shown if is_zarr(paths.join(parent, f))]
        folders[:] = [f for f in shown if f not in zarrs]
        visible = [f for f in files if not f.startswith(".") and f.lower().endswith(suffixes())]
        found = sorted([*visible, *zarrs], key=names.natural_key)
        if found:
            by_folder[parent] = [paths.join(parent, f) for f in found]
    return by_folder if paths.is_remote(folder) else _each_once(by_folder, tell)


def _each_once(by_folder: dict[str, list[str]], tell: Tell) -> dict[str, list[str]]:
    """Without links to files that are found by another name too."""
    taken: dict[str, str] = {}
    links: list[tuple[str, str]] = []
    for parent, files in by_folder.items():
        real_parent = os.path.realpath(parent)
        for file in files:
            if os.path.islink(file):
                links.append((os.path.realpath(file), file))
            else:
                taken.setdefault(os.path.join(real_parent, os.path.basename(file)), file)
    twice = [file for target, file in links if taken.setdefault(target, file) != file]
    if not twice:
        return by_folder
    tell(f"{_several(twice)} lead to files that are found by another name too; each is read once.")
    return {parent: [f for f in files if f not in set(twice)] for parent, files in by_folder.items()}


def _without_results(by_folder: dict[str, list[str]], root: str, tell: Tell) -> dict[str, list[str]]:
    """Without segmentations and other results of the images beside them."""
    results = derived.marked_results(file for files in by_folder.values() for file in files)
    left = {parent: [file for file in files if file not in results] for parent, files in by_folder.items()}
    results |= derived.results_in_folders(left, root)
    for files in left.values():
        results |= derived.results_beside([file for file in files if file not in results])
    results |= derived.own_zarrs(file for files in left.values() for file in files if file not in results)
    if not results:
        return by_folder
    shown = _several([file for files in by_folder.values() for file in files if file in results])
    tell(f"{shown}: left out, as results made from images. To use them as images, name them.")
    return {parent: [file for file in files if file not in results] for parent, files in by_folder.items()}


def _several(files: Sequence[str]) -> str:
    shown = ", ".join(files[:3])
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more"


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _below(path: str, folder: str) -> str:
    """`path` relative to `folder`, with slashes; ``.`` for the folder itself."""
    if paths.is_remote(path):
        return posixpath.relpath(path.partition("://")[2], folder.partition("://")[2])
    return os.path.relpath(path, folder or ".").replace(os.sep, "/")


def _file_sets(files: list[str]) -> list[names.FileSet]:
    """Images among the files of one folder: multi-file OME-TIFF by its metadata, the rest by the names."""
    file_sets: list[names.FileSet] = []
    rest = files
    taken: set[str] = set()
    for file in rest:
        spans = _spans(file) if len(rest) > 1 and file not in taken else ()
        if len(spans) > 1:
            file_sets.append(names.FileSet(names.stem(file), (file,)))
            taken.update(spans)
    rest = [file for file in rest if paths.realpath(file) not in taken]
    return file_sets + names.file_sets_by_name(rest)


def _spans(file: str) -> tuple[str, ...]:
    """All files of a multi-file OME-TIFF; none for other files, and those that cannot be read."""
    if not file.lower().endswith((".ome.tif", ".ome.tiff")):
        return ()
    try:
        reader = open_safely(Source("", (file,)))
    except DaskcellError:
        return ()
    reader.close()
    return reader.files
