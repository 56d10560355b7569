"""The command line. Every heavy import waits until a command runs, so that help is there at once.

Exit codes: 0 all done; 1 something broke on the way (a full disk, a lost scheduler, a bug); 2 refused before
any work; 3 done, but something was set aside (`failures.jsonl` lists it with reasons); 130 and 143 stopped by
a signal.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any, NoReturn

# Importing these registers their commands with `app`.
from daskcell.cli import clusters, doctor, exports, images, networks, studies
from daskcell.cli.app import app
from daskcell.errors import DaskcellError


def main() -> NoReturn:
    """Run the command line; errors that the user can fix are one sentence on stderr."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    signal.signal(signal.SIGTERM, _terminated)
    _print_anything()
    try:
        app()
        code = 0
    except DaskcellError as error:
        if debug:
            raise
        from daskcell.storage.paths import printable

        sentence = " ".join([str(error), *getattr(error, "__notes__", [])])
        print(printable(f"daskcell: {sentence}"), file=sys.stderr)
        code = 1 if getattr(error, "after_start", False) else 2
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); keep Python from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if debug:
            raise
        print(f"daskcell: {_unforeseen(error)}", file=sys.stderr)
        code = 1
    raise SystemExit(code)


def _print_anything() -> None:
    """Escape letters of file and channel names that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _unforeseen(error: Exception) -> str:
    from daskcell.storage.atomic import is_full

    if is_full(error):
        return "The disk takes no more. Please make room, and give the same command again."
    return f"this should not happen: {type(error).__name__}: {error} (--debug shows where)"


def _terminated(signum: int, frame: Any) -> NoReturn:
    # As an exception, so that the lock, the workers and half-written files are cleaned up.
    raise SystemExit(128 + signum)


__all__ = ["app", "clusters", "doctor", "exports", "images", "main", "networks", "studies"]
