"""Every error daskcell raises on purpose.

    DaskcellError
    ├── ConfigError      a setting is unknown, of the wrong type or out of range
    ├── InputError       an array or value handed to a function cannot be used
    │   └── ImageError   a file cannot be read as the picture it should be
    ├── WeightsError     a network's weights are missing or not what they should be
    ├── StudyError       the output folder cannot be used or continued
    └── ComputeError     the machine asked for is not there

Messages are one sentence or two: what, which file or value, what to do. All but
`StudyError` and `ComputeError` are `ValueError` too, so code that knows nothing of daskcell may catch them.
A `DaskcellError` is for what a user did; `assert` is for our own invariants.
"""

from __future__ import annotations


class DaskcellError(Exception):
    """Base of all errors a user can mend."""


class ConfigError(DaskcellError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class InputError(DaskcellError, ValueError):
    """An array or value handed to a function cannot be used."""


class ImageError(InputError):
    """A file cannot be read as the picture it should be."""


class WeightsError(DaskcellError, ValueError):
    """A network's weights are missing or not what they should be."""


class StudyError(DaskcellError):
    """The output folder cannot be used or continued."""


class ComputeError(DaskcellError):
    """The machine asked for is not there."""


class InputWarning(UserWarning):
    """Something among the inputs was left out, or is not said by a file and was guessed."""


class MemoryWarning(UserWarning):
    """An image takes more memory than others do, since its file can only be read whole."""


class DriftWarning(UserWarning):
    """New cells lie far from those a model was fitted on: what their clusters mean is in doubt."""
