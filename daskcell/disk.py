"""Small files on disk: written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

_CUT = re.compile("[0-9]+ requested and [0-9]+ written|problem writing element [0-9]+ to file")
"""What numpy says when less was written than it should; it forgets why."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it: readers see the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Any, indent: int | None = 1) -> None:
    """`write_atomic` of JSON. Without `indent` it is on one line, and written ten times as fast."""
    text = json.dumps(values, indent=indent, ensure_ascii=False, sort_keys=True)
    write_atomic(path, (text + "\n").encode())


def remove(*paths: Path) -> None:
    """Remove files and folders; what is not there is fine."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or the one it came from, says that a disk takes no more."""
    while error is not None:
        if isinstance(error, OSError) and (error.errno in _NO_ROOM or _CUT.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False
