"""Names with characters that some library gives a meaning: they are names all the same."""

from __future__ import annotations

import os

import pytest
import tifffile
from test_run import SETTINGS, spots
from typer.testing import CliRunner

import daskcell as dc
from daskcell.cli import app
from daskcell.errors import DaskcellError
from daskcell.pipeline import run
from daskcell.pipeline.status import report, table
from daskcell.storage import atomic, paths
from daskcell.study import Study, create_study

PRINTABLE = [chr(code) for code in range(32, 127) if chr(code) != "/"]
BEYOND = ["ü", "\N{GRINNING FACE}", "\n", "\t", "e\u0301"]
WORDS = [
    "%41",
    "~",
    "$HOME",
    "*",
    "[a]",
    "[red]",
    "::",
    "{v1}",
    "{0}",
    "k=3",
    "file:",
    "-x",
    "s3::a",
    "...",
]
EVERYTHING = " -" + "".join([*PRINTABLE[1:], *BEYOND, "%41~$HOME::{v1}[red]"]) + " "


@pytest.mark.slow
def test_a_run_whose_names_hold_every_character(tmp_path):
    """Input, its folder and the study, the whole way; the results are those of a plain name."""
    folder = tmp_path / f"in{EVERYTHING}"
    folder.mkdir()
    tifffile.imwrite(folder / f"{EVERYTHING}a.tif", spots(1))
    tifffile.imwrite(tmp_path / "plain.tif", spots(1))
    study = run(folder, tmp_path / f"out{EVERYTHING}", SETTINGS)
    plain = run(tmp_path / "plain.tif", tmp_path / "plain", SETTINGS)
    assert study.failures == []
    assert len(study.slides) == 1
    assert study.cells(study.slides[0]).equals(plain.cells("plain"))
    assert (study.paths.clusters / "arrays.npz").read_bytes() == (
        plain.paths.clusters / "arrays.npz"
    ).read_bytes()
    assert table(report(study))
    before = (study.out / "ledger" / f"{study.slides[0]}.json").read_bytes()
    assert run([folder / f"{EVERYTHING}a.tif"], study.out, SETTINGS).failures == []
    assert (study.out / "ledger" / f"{study.slides[0]}.json").read_bytes() == before
    assert dc.export_crops(study, tmp_path / f"crops{EVERYTHING}") == len(study.cells())
    words = ["report", str(study.out), "-o", str(tmp_path / f"page{EVERYTHING}")]
    assert CliRunner().invoke(app, words).exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PRINTABLE, *BEYOND, *WORDS], ids=ascii)
def test_a_name_is_a_name(tmp_path, name):
    folder = tmp_path / f"x{name}"
    folder.mkdir()
    source = folder / f"x{name}a{name}.tif"
    tifffile.imwrite(source, spots(1, 40))
    assert paths.exists(paths.absolute(source))
    image = dc.convert(source, folder / f"{name}b.zarr")
    assert image.data.shape == (1, 40, 40)
    assert dc.open_image(folder / f"{name}b.zarr").data.compute().any()
    assert [os.path.basename(found) for found in paths.matching(f"{folder}/*.tif")] == [source.name]
    atomic.write_json(folder / f"{name}.json", {name: name})
    (study := create_study(folder / f"{name}study", [source], run_config(), ["a"])).record.own("report.html")
    assert Study(study.out).record["inputs"] == [str(source)]


def run_config():
    from daskcell.config import parse_config

    return parse_config(SETTINGS)


@pytest.mark.slow
def test_names_that_are_not_utf_8_are_names(tmp_path):
    folder = tmp_path / os.fsdecode(b"in\xff")
    folder.mkdir()
    for channel in (os.fsdecode(b"r\xfe"), "g"):
        tifffile.imwrite(folder / f"a_{channel}.tif", spots(1))
    study = run(folder, tmp_path / "out", SETTINGS | {"input": {"pattern": "{field}_{channel}.tif"}})
    assert (study.slides, study.failures) == (["a"], [])


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, os.fsdecode(b"b\xff")])
def test_what_cannot_be_written_to_is_refused_in_a_sentence(tmp_path, name):
    tifffile.imwrite(tmp_path / "a.tif", spots(1, 40))
    for verb in (
        lambda: run(tmp_path / "a.tif", tmp_path / name, SETTINGS),
        lambda: dc.convert(tmp_path / "a.tif", tmp_path / name),
        lambda: dc.open_study(tmp_path / name),
    ):
        with pytest.raises(DaskcellError, match=r"name|holds no study"):
            verb()
    assert len(list(tmp_path.iterdir())) == 1
