"""A table of images, CSV or Parquet: which file is what, told rather than guessed.

    path            file, from the table's folder or from the root
    image           its name; files of one name are one image, with one file a channel
    channel         what the file shows, where there is one file a channel
    channels        the channels to take of a file with several: ``DNA;actin``
    pixel_size      micrometres; or ``pixel_size_y`` and ``pixel_size_x``
    condition       anything, such as a treatment: comes back as a column of the cells

Only `path` is needed. Letter case, spaces, hyphens and a unit in parentheses do not matter in a header, and
`COLUMNS` lists other names of each column. What is not understood is left alone, and told.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from daskcell.errors import ImageError
from daskcell.images.filename_channels import stem
from daskcell.images.sources import Source
from daskcell.storage import paths

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".tsv", ".parquet")
COLUMNS = {
    "path": (
        "path",
        "file",
        "filename",
        "file_name",
        "filepath",
        "file_path",
        "image_path",
        "image_file",
        "uri",
    ),
    "image": ("image", "image_name", "imagename", "image_id", "slide"),
    "channel": ("channel", "channel_name", "channelname"),
    "channels": ("channels", "channel_names"),
    "pixel_size": ("pixel_size", "pixelsize", "pixel_size_um", "mpp"),
    "pixel_size_y": ("pixel_size_y", "pixelsize_y", "pixel_size_y_um", "mpp_y"),
    "pixel_size_x": ("pixel_size_x", "pixelsize_x", "pixel_size_x_um", "mpp_x"),
    "condition": ("condition", "treatment", "group"),
}
"""Names of each column; the first that a table has counts."""


def is_manifest(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def read_manifest(path: str, tell: Callable[[str], None] | None = None) -> list[Source]:
    """The images of a table, in its order.

    Parameters
    ----------
    tell
        Called with a sentence that names the columns that are not used.

    Raises
    ------
    ImageError
        For a table without a column of paths, or a row that cannot be, with its number.
    """
    table = _read(path)
    table = table.rename(columns=_understood(path, [str(name) for name in table.columns], tell))
    images: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for number, row in enumerate(table.to_dict("records"), start=2):  # row 1 is the header
        values = {str(name): str(value).strip() for name, value in row.items() if str(value).strip()}
        if "path" not in values:
            raise ImageError(f"{path}, row {number} names no file.")
        file = paths.join(os.path.dirname(path), values["path"])
        values["path"] = values["path"] if paths.is_remote(values["path"]) else os.path.normpath(file)
        if not paths.exists(values["path"]):
            raise ImageError(f"{path}, row {number}: there is no file {values['path']}.")
        name = values.get("image") or (stem(values["path"]) if "channel" not in values else "")
        if not name:
            raise ImageError(f"{path}, row {number} has a channel, but no image that it is one of.")
        # Without a name of its own, every row is an image; `find_images` keeps equal names apart.
        images.setdefault(name if "image" in values else f"{name}\0{number}", []).append((number, values))
    return [_source(path, name.partition("\0")[0], rows) for name, rows in images.items()]


def _understood(path: str, header: list[str], tell: Callable[[str], None] | None) -> dict[str, str]:
    """Which column of a header is which of `COLUMNS`."""
    written: dict[str, str] = {}
    for name in header:
        plain = _plain(name)
        if plain in written and plain in {word for words in COLUMNS.values() for word in words}:
            raise ImageError(f"{path} has two columns '{plain}' ({written[plain]!r} and {name!r}).")
        written.setdefault(plain, name)
    found: dict[str, str] = {}
    for column, words in COLUMNS.items():
        known = [word for word in words if word in written]
        if known:
            found[written[known[0]]] = column
    if "path" not in found.values():
        shown = ", ".join(header) or "none"
        raise ImageError(
            f"{path} has no column 'path' that names the files (it has: {shown}). Please add or rename one."
        )
    unused = [name for name in header if name not in found]
    if unused and tell is not None:
        free = {word: column for column, words in COLUMNS.items() for word in words}
        free = {word: column for word, column in free.items() if column not in found.values()}
        said = []
        for name in unused:
            near = difflib.get_close_matches(_plain(name), free, 1, 0.8)
            said.append(f"'{name}'" + (f" (or is it '{free[near[0]]}'?)" if near else ""))
        tell(f"Columns of {path} that are not used: {', '.join(said)}.")
    return found


def _plain(name: str) -> str:
    """A header without letter case, byte order mark, what is in parentheses, and what joins its words."""
    text = re.sub(r"[(\[].*?[)\]]", "", name.lstrip("\ufeff"))
    return re.sub(r"[\s_.-]+", "_", text.strip().casefold()).strip("_")


def _read(path: str) -> pd.DataFrame:
    import pandas as pd

    try:
        if not path.lower().endswith(".parquet"):
            start = paths.head(path, 1000)
            wide = start.startswith((b"\xff\xfe", b"\xfe\xff"))  # Excel's "Unicode text"
            encoding = "utf-16" if wide else "utf-8-sig"
            lines = start.decode(encoding, "ignore").splitlines()
            said = re.fullmatch(r"sep=(.)\s*", lines[0]) if lines else None  # Excel's too
            separator = said[1] if said else max(",;\t", key=(lines or [""])[0].count)
            # As text throughout: a field called 007 stays one.
            table = pd.read_csv(
                path,
                dtype=str,
                keep_default_na=False,
                sep=separator,
                encoding=encoding,
                skiprows=1 if said else 0,
            )
            if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first values for an index
                raise ValueError("its rows have more values than its header has names")
            return table
        return pd.read_parquet(path).astype(object).where(lambda t: t.notna(), "")
    except Exception as error:  # pandas and pyarrow raise many kinds
        raise ImageError(f"{path} is not a table: {' '.join(str(error).split())[:200]}.") from None


def _source(path: str, name: str, rows: list[tuple[int, dict[str, str]]]) -> Source:
    number, first = rows[0]
    where = f"{path}, row {number}"
    for other, values in rows:
        for column in ("channels", "pixel_size", "pixel_size_y", "pixel_size_x", "condition"):
            if values.get(column) != first.get(column):
                raise ImageError(
                    f"{path}, row {other}: image '{name}' has another {column} than in row {number}."
                )
    channels = [values.get("channel") for _, values in rows]
    named = all(channels)
    if (any(channels) and not named) or (len(rows) > 1 and not named) or len(set(channels)) < len(channels):
        raise ImageError(
            f"{where}: image '{name}' has {len(rows)} files, which must each have a channel of their own."
        )
    take = tuple(part.strip() for part in first.get("channels", "").split(";") if part.strip()) or None
    size = _pixel_size(where, first)
    file_channels = tuple(str(channel) for channel in channels) if named else None
    said = tuple(repr(part) for part in (file_channels, take, size))
    return Source(
        name,
        tuple(values["path"] for _, values in rows),
        file_channels,
        take,
        size,
        condition=first.get("condition"),
        said=said,
    )


def _pixel_size(where: str, values: dict[str, str]) -> tuple[float, float] | None:
    names = ("pixel_size_y", "pixel_size_x") if "pixel_size_y" in values else ("pixel_size", "pixel_size")
    texts = [values.get(name) for name in names]
    if texts == [None, None]:
        return None
    try:
        sizes = [float((text or "").replace(",", ".")) for text in texts]
    except ValueError:
        sizes = [0.0]
    if not all(0 < size < float("inf") for size in sizes):
        raise ImageError(f"{where}: {names[0]} must be micrometres above 0, not {texts[0]!r}.")
    return sizes[0], sizes[1]


__all__: list[Any] = ["is_manifest", "read_manifest"]
