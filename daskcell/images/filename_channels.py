"""Which files belong to one image, by their names: one file per channel, or one file per image.

Files are taken for channels only if their names leave no doubt: they differ in one word that can name a
channel (a colour, a stain, ``ch2``, ``w1``, ...), and most images have all channels. For other names, a
pattern such as ``{field}_{channel}.tif`` says what they mean.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from daskcell.errors import ConfigError, ImageError

COLOURS = ("red", "green", "blue", "cyan", "magenta", "yellow", "farred", "ir", "grey", "gray")
"""Channel names in the order in which they make a colour image."""
_STAINS = """
dapi hoechst draq5 pi sytox syto syto14 fitc tritc rhodamine rhod txred texasred gfp egfp yfp
cfp rfp mcherry cherry tomato tdtomato mkate cy2 cy3 cy5 cy7 alexa488 alexa568 alexa594 alexa647
af488 af568 af594 af647 a488 a568 a594 a647 dna rna er agp mito actin tubulin membrane nuclei
nucleus cytoplasm brightfield bf dic phase phasecontrast pc mitotracker phalloidin cona wga
"""
STAINS = frozenset((*_STAINS.split(), "bright field", "phase contrast"))
"""Stains and structures that are recognised as channel names."""
LETTERS = "RGBCMYDFHTK"
"""Letters that are recognised as a channel at the end of a name (D: DAPI, F: FITC, R: rhodamine or red)."""

_NAMES = "|".join(sorted((*COLOURS, *STAINS), key=len, reverse=True))
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("name", re.compile(rf"(?<![A-Za-z0-9])(?:{_NAMES})(?![A-Za-z0-9])", re.IGNORECASE)),
    # InCell: A - 01(fld 1 wv UV - DAPI).tif
    ("incell", re.compile(r"(?<=[ (])wv (?P<name>[^()]+?)(?= z \d+\)|\))", re.IGNORECASE)),
    # scanR: nuclei--W00001--P00001--Z00000--T00000--Alexa 488.tif
    ("scanr", re.compile(r"(?<=--T\d{5}--).+$")),
    # MetaMorph: name_w1DAPI_s1.tif
    ("metamorph", re.compile(r"(?<![A-Za-z0-9])w\d{1,2}[ -]?[A-Za-z][A-Za-z0-9 +.-]*(?=_|$)", re.IGNORECASE)),
    ("channel", re.compile(r"(?<![A-Za-z])channel[ _-]?\d{1,3}(?!\d)", re.IGNORECASE)),
    ("ch", re.compile(r"(?<![A-Za-z])ch(?:an)?[ _-]?\d{1,3}(?!\d)", re.IGNORECASE)),
    ("w", re.compile(r"(?<![A-Za-z0-9])w\d{1,2}(?![0-9])", re.IGNORECASE)),
    ("c", re.compile(r"(?<![A-Za-z])c\d{1,3}(?:(?=[tzm]\d)|(?![A-Za-z0-9]))", re.IGNORECASE)),
    ("d", re.compile(r"(?<=f\d\d)d\d{1,2}$", re.IGNORECASE)),
    ("letter", re.compile(rf"(?<=[_\-. ])[{LETTERS}]$")),
)
_WITH_CHANNEL = (
    # Yokogawa: the action, A02, counts on with the channel: ..._T0001F001L01A02Z01C02.tif
    (re.compile(r"(?<=T\d{4}F\d{3}L\d{2})A\d{2}(?=Z\d{2,3}C\d{2}$)", re.IGNORECASE), ""),
    # Cytation: so does the number of the read: B2_02_2_1_GFP_001.tif
    (re.compile(r"(?<![A-Za-z0-9])([A-P]\d{1,2}_-?\d+)_\d+(?=_\d+_[A-Za-z][A-Za-z0-9 ]*_\d{3}$)"), r"\1"),
)
"""Numbers in a name that change with the channel."""
_NAME_BYTES = 120
_ID = re.compile(
    r"\{?(?:[0-9A-F]{8}(?:-[0-9A-F]{4}){3}-[0-9A-F]{12}|[0-9A-F]{32})\}?(?![0-9A-F])"
    r"|(?<![0-9A-Za-z])(?=\d*[A-F])(?=[A-F]*\d)[0-9A-F]{16,}(?![0-9A-Za-z])",
    re.IGNORECASE,
)
"""GUIDs, with or without hyphens, and other long hexadecimal numbers."""


@dataclass(frozen=True)
class FileSet:
    """The files of one image: one for each of `channels`, or a single file that holds them all."""

    name: str
    files: tuple[str, ...]
    channels: tuple[str, ...] | None = None


def file_sets_by_name(files: Sequence[str]) -> list[FileSet]:
    """The images among the files of one folder, with channels recognised by their names.

    Raises
    ------
    ImageError
        If the files clearly are channels but some image lacks one, or has one twice.
    """
    plain = {file: stem(file) for file in files}
    without_ids = _without_ids(plain)
    for stems in [without_ids, plain] if without_ids != plain else [plain]:
        for kind, pattern in _KINDS:
            matches = {f: found for f, text in stems.items() if (found := list(pattern.finditer(text)))}
            # A name may have several such words: try them from the last to the first.
            for position in range(max(map(len, matches.values()), default=0)):
                images, words = _table(stems, matches, position)
                if not _is_convincing(kind, images, len(files)):
                    continue
                if stems is not plain and any(len(f) > 1 for by in images.values() for f in by.values()):
                    continue  # these images differ in their ids only
                named = {_field_name(key): by for key, by in images.items()}
                if len(named) < len(images):  # names that differ only in separators
                    named = {key.replace("\0", ""): by for key, by in images.items()}
                grouped = {name: {words[w]: f for w, f in by.items()} for name, by in named.items()}
                return [*_complete(grouped), *(FileSet(plain[f], (f,)) for f in files if f not in matches)]
    return [FileSet(plain[file], (file,)) for file in files]


def _table(
    stems: Mapping[str, str], matches: Mapping[str, list[re.Match[str]]], position: int
) -> tuple[Mapping[str, Mapping[str, list[str]]], dict[str, str]]:
    """Files by the name without its channel and by channel (in lower case); and the channels as written."""
    images: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    words: dict[str, str] = {}
    for file, found in matches.items():
        match, text = found[max(len(found) - 1 - position, 0)], stems[file]
        word = match.groupdict().get("name") or match[0]
        words.setdefault(word.lower(), word)
        images[f"{text[: match.start()]}\0{text[match.end() :]}"][word.lower()].append(file)
    return images, words


def without_ids(text: str) -> str:
    """A stem without GUIDs and other long hexadecimal numbers, unless it consists of them."""
    return _ID.sub("", text).strip("_-. ") or text


def without_channel(text: str) -> set[str]:
    """A stem without each word that may be its channel: possible names of the image."""
    matches = (match for _, pattern in _KINDS for match in pattern.finditer(text))
    return {_field_name(f"{text[: match.start()]}\0{text[match.end() :]}") for match in matches}


def _without_ids(stems: Mapping[str, str]) -> dict[str, str]:
    """The stems without ids that no two files share, and without `_WITH_CHANNEL`."""
    counts = Counter(found.upper() for text in stems.values() for found in set(_ID.findall(text)))

    def own(match: re.Match[str]) -> str:
        return "" if counts[match[0].upper()] == 1 else match[0]

    result = {}
    for file, text in stems.items():
        for pattern, replacement in _WITH_CHANNEL:
            text = pattern.sub(replacement, text)
        shorter = _ID.sub(own, text)
        # The separator of the id is removed with it.
        result[file] = re.sub(r"([_\-. ])[_\-. ]+", r"\1", shorter).strip("_-. ") if shorter != text else text
    return result


def file_sets_by_pattern(files: Mapping[str, str], pattern: str) -> list[FileSet]:
    """Images among `files` (path by its name relative to the folder) by a pattern with placeholders.

    ``{channel}`` is the channel; all other placeholders together name the image; ``*`` stands for anything.
    Letter case does not matter. Files that do not match are left out.
    """
    compiled = compile_pattern(pattern)
    images: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    singles: dict[str, list[str]] = defaultdict(list)
    words: dict[str, str] = {}
    for relative, path in files.items():
        match = compiled.fullmatch(relative) or compiled.fullmatch(PurePath(relative).name)
        if match is None:
            continue
        values = match.groupdict()
        channel = values.pop("channel", None)
        name = "_".join(values.values()) or (PurePath(path).parent.name if channel else stem(relative))
        if channel is None:
            singles[name].append(path)
        else:
            images[name][words.setdefault(channel.lower(), channel)].append(path)
    if not images and not singles:
        example = next(iter(files), None)
        raise ImageError(
            f"No file matches the pattern '{pattern}'"
            + (f" (the first file is '{example}')." if example else ".")
        )
    for name, paths in singles.items():
        if len(paths) > 1:
            raise ImageError(f"The pattern '{pattern}' gives {' and '.join(paths)} the same name '{name}'.")
    return [*_complete(images), *(FileSet(name, (paths[0],)) for name, paths in singles.items())]


def matching_names(files: Mapping[str, str], pattern: str) -> dict[str, str]:
    """Those of `files` (path by its name relative to the folder) that fit a pattern."""
    compiled = compile_pattern(pattern)
    return {
        relative: path
        for relative, path in files.items()
        if compiled.fullmatch(relative) or compiled.fullmatch(PurePath(relative).name)
    }


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """``{field}_{channel}.tif`` as a regular expression; raises `ConfigError` for an invalid pattern."""
    names = re.findall(r"\{([^{}]*)\}", pattern)
    wrong = [name for name in names if not name.isidentifier()]
    if wrong:
        raise ConfigError(
            f"The pattern '{pattern}' has the placeholder '{{{wrong[0]}}}'; names are letters, digits and _."
        )
    if not names:
        raise ConfigError(
            f"The pattern '{pattern}' needs at least one placeholder such as {{field}} or {{channel}}."
        )
    parts: list[str] = []
    seen: set[str] = set()
    for part in re.split(r"(\{[^{}]*\}|\*)", pattern):
        if part == "*":
            parts.append(".*?")
        elif part.startswith("{"):
            name = part[1:-1]
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)")
            seen.add(name)
        else:
            parts.append(re.escape(part))
    return re.compile("".join(parts), re.IGNORECASE)


def name_channels(given: Sequence[str | None], count: int) -> tuple[str, ...]:
    """Names of `count` channels, all different: those `given`, numbered if repeated, ``channel 3`` if empty.

    If more names than channels are given, they belong to something else, and none is used.
    """
    known = [(name or "").strip() for name in given] if len(given) <= count else []
    known += [""] * (count - len(known))
    taken = set(known)
    result: list[str] = []
    for number, name in enumerate(known, start=1):
        base = unique = name or f"channel {number}"
        again = 1
        while unique in result or (unique in taken and unique != name):
            again += 1
            unique = f"{base} {again}"
        result.append(unique)
    return tuple(result)


def matching_channels(name: str, available: Sequence[str]) -> list[int]:
    """Positions of the channels that `name` may mean; several if it is ambiguous.

    Those of that very name; else regardless of letter case; else those that begin with it; else those that
    contain it. Numbers are compared whole: ``w10`` does not contain ``w1``.
    """
    part = re.escape(name)
    part = (r"(?<!\d)" if name[:1].isdigit() else "") + part + (r"(?!\d)" if name[-1:].isdigit() else "")
    for fits in (
        lambda other: other == name,
        lambda other: other.casefold() == name.casefold(),
        lambda other: bool(name) and re.match(part, other, re.IGNORECASE) is not None,
        lambda other: bool(name) and re.search(part, other, re.IGNORECASE) is not None,
    ):
        found = [index for index, other in enumerate(available) if fits(other)]
        if found:
            return found
    return []


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts 2 before 10."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p.lower()) for p in re.split(r"(\d+)", text) if p)


def safe_name(name: str) -> str:
    """`name` without characters that are special to file systems or shells; never empty."""
    name = re.sub(r"[^\w.+()-]+", "_", unicodedata.normalize("NFC", name)).strip("._- ")
    # Most file systems allow 255 bytes, and prefixes and suffixes are added.
    return name.encode()[:_NAME_BYTES].decode(errors="ignore") or "image"


def _is_convincing(kind: str, images: Mapping[str, Mapping[str, list[str]]], total: int) -> bool:
    channels = {channel for by in images.values() for channel in by}
    if len(channels) < 2 or len(channels) > 64:
        return False
    files = sum(len(by) for by in images.values())
    several = [by for by in images.values() if len(by) > 1]
    # Most images must have all channels, or the word is just part of independent names.
    if len(several) * 2 < len(images) or files < 0.6 * len(images) * len(channels):
        return False
    # Words of less certain meaning must explain every file of the folder.
    return (
        kind in ("name", "channel", "ch")
        or sum(len(f) for by in images.values() for f in by.values()) == total
    )


def _complete(images: Mapping[str, Mapping[str, list[str]]]) -> list[FileSet]:
    """File sets with all channels in order; raises `ImageError` if one is missing or exists twice."""
    channels = in_order({channel for by in images.values() for channel in by})
    file_sets = []
    for name, by in images.items():
        for channel, files in by.items():
            if len(files) > 1:
                raise ImageError(
                    f"Channel '{channel}' of image '{name}' exists twice: {' and '.join(sorted(files))}."
                )
        missing = [channel for channel in channels if channel not in by]
        if missing:
            present = ", ".join(sorted(files[0] for files in by.values()))
            raise ImageError(
                f"Image '{name}' lacks channel {', '.join(map(repr, missing))}, which others have; there "
                f"is only {present}. Please add the file, or say with input.pattern which belong together."
            )
        file_sets.append(FileSet(name, tuple(by[c][0] for c in channels), tuple(channels)))
    return file_sets


def in_order(channels: Iterable[str]) -> list[str]:
    """Colours in the order red, green, blue, cyan ...; other channels by name, numbers by value."""
    names = sorted(channels, key=natural_key)
    for order in (COLOURS, ("r", "g", "b", "c", "m", "y")):
        if all(name.lower() in order for name in names):
            return sorted(names, key=lambda name: order.index(name.lower()))
    return names


def _field_name(key: str) -> str:
    before, after = key.split("\0")
    before, after = before.rstrip("_-. "), after.lstrip("_-. ")
    return "_".join(part for part in (before, after) if part)


def stem(file: str) -> str:
    name = PurePath(file).name
    for ending in (".ome.tiff", ".ome.tif", ".ome.zarr"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return PurePath(name).stem


def unique_names(names: Iterable[str]) -> list[str]:
    """Names that are safe as file names, all different even regardless of letter case."""
    taken: set[str] = set()
    result = []
    for name in names:
        safe = base = safe_name(name)
        number = 2
        while safe.lower() in taken:
            safe = f"{base}-{number}"
            number += 1
        taken.add(safe.lower())
        result.append(safe)
    return result
