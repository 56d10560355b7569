"""A table of images, CSV or Parquet: which file is what, told rather than guessed.

    path            file, from the table's folder or from the root
    image           its name; files of one name are one image, with one file a channel
    channel         what the file shows, where there is one file a channel
    channels        the channels to take of a file with several: ``DNA;actin``
    pixel_size      micrometres; or ``pixel_size_y`` and ``pixel_size_x``
    group           anything, such as a treatment: comes back as a column of the cells

Only `path` is needed; other columns are left alone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from daskcell import places
from daskcell.errors import ImageError
from daskcell.images.channels import stem
from daskcell.images.sources import Source

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet")


def is_manifest(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def read_manifest(path: str) -> list[Source]:
    """The images of a table, in its order; raises `ImageError` for a row that cannot be, with its number."""
    table = _read(path)
    if "path" not in table:
        raise ImageError(f"{path} has no column 'path' (it has: {', '.join(map(str, table)) or 'none'}).")
    images: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for number, row in enumerate(table.to_dict("records"), start=2):  # row 1 is the header
        values = {str(name): str(value).strip() for name, value in row.items() if str(value).strip()}
        if "path" not in values:
            raise ImageError(f"{path}, row {number} names no file.")
        file = places.join(os.path.dirname(path), values["path"])
        values["path"] = values["path"] if places.is_remote(values["path"]) else os.path.normpath(file)
        if not places.exists(values["path"]):
            raise ImageError(f"{path}, row {number}: there is no file {values['path']}.")
        name = values.get("image") or (stem(values["path"]) if "channel" not in values else "")
        if not name:
            raise ImageError(f"{path}, row {number} has a channel, but no image that it is one of.")
        # Without a name of its own, every row is an image; `find_images` keeps equal names apart.
        images.setdefault(name if "image" in values else f"{name}\0{number}", []).append((number, values))
    return [_source(path, name.partition("\0")[0], rows) for name, rows in images.items()]


def _read(path: str) -> pd.DataFrame:
    import pandas as pd

    try:
        if path.lower().endswith(".csv"):
            head = places.head(path, 1000).decode("utf-8", "replace").partition("\n")[0]
            separator = max(",;\t", key=head.count)
            # As text throughout: a field called 007 stays one.
            return pd.read_csv(path, dtype=str, keep_default_na=False, sep=separator)
        return pd.read_parquet(path).astype(object).where(lambda t: t.notna(), "")
    except Exception as error:  # pandas and pyarrow raise many kinds
        raise ImageError(f"{path} is not a table: {' '.join(str(error).split())[:200]}.") from None


def _source(path: str, name: str, rows: list[tuple[int, dict[str, str]]]) -> Source:
    number, first = rows[0]
    where = f"{path}, row {number}"
    for other, values in rows:
        for column in ("channels", "pixel_size", "pixel_size_y", "pixel_size_x", "group"):
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
        group=first.get("group"),
        said=said,
    )


def _pixel_size(where: str, values: dict[str, str]) -> tuple[float, float] | None:
    names = ("pixel_size_y", "pixel_size_x") if "pixel_size_y" in values else ("pixel_size", "pixel_size")
    texts = [values.get(name) for name in names]
    if texts == [None, None]:
        return None
    try:
        sizes = [float(text or "") for text in texts]
    except ValueError:
        sizes = [0.0]
    if not all(0 < size < float("inf") for size in sizes):
        raise ImageError(f"{where}: {names[0]} must be micrometres above 0, not {texts[0]!r}.")
    return sizes[0], sizes[1]


__all__: list[Any] = ["is_manifest", "read_manifest"]
