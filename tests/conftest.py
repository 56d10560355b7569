"""Shared fixtures."""

from __future__ import annotations

import logging
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3server import CREDENTIALS, Server, s3_server

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


LONGEST = ("test_training_encoder.py", "test_survival.py", "test_models_network.py", "test_segment_exact.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of two processes neither has one left when the other is done."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="module", autouse=True)
def no_client_left() -> Iterator[None]:
    """A client that outlives its file would take the work of the lazy functions of all files after it."""
    yield
    if "distributed" not in sys.modules:
        return
    from distributed.client import _get_global_client, _global_clients

    left = _get_global_client()
    _global_clients.clear()
    assert left is None, f"{left} was left behind"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real development pictures; tests that ask for it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"the development pictures are not at {DATA}")
    return DATA


SMALL = {
    "segment": {"method": "watershed"},
    "cluster": {"k": 2, "components": 4},
    "compute": {"kind": "inline", "block": 256},
    "output": {"overlays": [], "report": False},
    "preprocess": {"reconstruct": None},
}
"""Settings of `small_study`."""


@pytest.fixture(scope="session")
def small_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two tiny images, ``one`` and ``two``, which tests only read; its inputs are in ``../in``."""
    import daskcell as dc

    folder = tmp_path_factory.mktemp("small")
    with zipfile.ZipFile(Path(__file__).with_name("study_format1.zip")) as file:
        file.extractall(folder, [name for name in file.namelist() if name.startswith("in/")])
    assert dc.run(folder / "in", folder / "study", SMALL).failures == []
    return folder / "study"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A local S3 server, for this process and those it starts."""
    pytest.importorskip("moto.server")
    fsspec = pytest.importorskip("fsspec")
    from daskcell.images import reader_process

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch, s3_server() as found:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setenv("FSSPEC_S3_ENDPOINT_URL", found.endpoint)
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": found.endpoint})  # read once, at its import
        reader_process.get_reader_process().stop()  # its child was started with another environment
        yield found
        reader_process.get_reader_process().stop()


@pytest.fixture
def bucket(server: Server, request: pytest.FixtureRequest) -> str:
    """An empty bucket."""
    import fsspec

    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[:60].strip("-")
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"
