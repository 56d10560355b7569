"""Every error and warning that daskcell raises on purpose.

    DaskcellError
    ├── ConfigError      a setting is unknown, of the wrong type or out of range
    ├── InputError       an array or value passed to a function cannot be used
    │   └── ImageError   a file cannot be read as an image
    ├── WeightsError     a network's weights are missing or damaged
    ├── StudyError       a study's folder cannot be used, or a result is not there yet
    └── ComputeError     the requested workers or devices are not available

    UserWarning
    ├── InputWarning       an input was left out, or its metadata had to be guessed
    ├── MemoryWarning      an image needs more memory than others
    ├── DriftWarning       new cells are unlike those that a model was fitted on
    └── IncompleteWarning  slides without results were left out

A message is one or two sentences: what failed, for which file or value, and what to do. All errors but
`StudyError` and `ComputeError` are also `ValueError`, so that code which does not know daskcell can catch
them. Raise a `DaskcellError` for what a user can correct; use `assert` for our own invariants.
"""

from __future__ import annotations

import sys
import warnings


class DaskcellError(Exception):
    """Base class of all errors that a user can correct."""


class ConfigError(DaskcellError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class InputError(DaskcellError, ValueError):
    """An array or value passed to a function cannot be used."""


class ImageError(InputError):
    """A file cannot be read as an image."""


class WeightsError(DaskcellError, ValueError):
    """A network's weights are missing or damaged."""


class StudyError(DaskcellError):
    """A study's folder cannot be used or continued, or does not have the requested result yet."""


class ComputeError(DaskcellError):
    """The requested workers or devices are not available."""


class InputWarning(UserWarning):
    """An input was left out, or a file does not say something and it was guessed."""


class MemoryWarning(UserWarning):
    """An image needs more memory than others, since its file can only be read as a whole."""


class DriftWarning(UserWarning):
    """New cells lie far from those a model was fitted on, so their clusters may mean something else."""


class IncompleteWarning(UserWarning):
    """Some slides of a study have no results yet, or were set aside, and are left out."""


def warn(sentence: str, category: type[Warning] = InputWarning) -> None:
    """Warn at the line outside this package that called it, however deep the call is."""
    level, frame = 2, sys._getframe(1)
    passed = ("daskcell", "contextlib")  # a context manager of ours is entered through contextlib
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in passed:
        level, frame = level + 1, frame.f_back
    warnings.warn(sentence, category, stacklevel=level)
