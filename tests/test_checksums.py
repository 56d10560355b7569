"""Damage to a finished study, years after: it is found, and the very same bytes come back."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace

import pytest
import tifffile

from daskcell.compute import Workers
from daskcell.evaluation.generated import CHANNELS, synthesize_field
from daskcell.pipeline import run
from daskcell.pipeline.progress import Progress
from daskcell.pipeline.stages import STAGES
from daskcell.pipeline.status import damages
from daskcell.study.checksums import checksum, verify

SETTINGS = {
    "segment": {"method": "watershed"},
    "cluster": {"k": 2},
    "compute": {"kind": "inline", "block": 256},
    "output": {"preprocessed": True},
}


def test_a_file_that_is_gone_cut_or_changed_is_named(tmp_path):
    (tmp_path / "a" / "c").mkdir(parents=True)
    for name, data in {"a/zarr.json": b"{}", "a/c/0": b"0123", "a/c/1": b"4567", "b.tif": b"tif"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "a" / ".x.tmp").write_bytes(b"half")
    files = checksum(tmp_path, [tmp_path / "a", tmp_path / "b.tif", tmp_path / "absent"], Workers())
    assert list(files) == ["a/c/0", "a/c/1", "a/zarr.json", "b.tif"]
    assert verify(tmp_path, files, Workers()) == []
    (tmp_path / "a/c/0").write_bytes(b"0124")
    (tmp_path / "a/c/1").write_bytes(b"456")
    (tmp_path / "b.tif").unlink()
    assert verify(tmp_path, files) == ["a/c/1", "b.tif"]
    assert verify(tmp_path, files, Workers()) == ["a/c/0", "a/c/1", "b.tif"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, side in (("a", 256), ("b", 600)):
        field = synthesize_field((side, side), seed=side)
        for channel, pixels in zip(CHANNELS, field.channels, strict=True):
            tifffile.imwrite(folder / f"{name}_{channel}.tif", pixels)
    study = run(folder, tmp_path_factory.mktemp("whole") / "study", SETTINGS)
    assert study.failures == []
    return folder, study.out


def digests(out):
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.relative_to(out).parts[0] != "ledger"
    }


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def unlink(path):
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "harm", "redone"),
    [
        ("images/b.zarr/0/c/0/0/0", flip, {"convert"}),
        ("images/b.zarr/0/zarr.json", unlink, {"convert"}),
        ("images/b.zarr/labels/cells/0/c/1/1", flip, {"segment"}),
        ("images/b.zarr/labels/cells/0/c/0/1", unlink, {"segment"}),
        ("images/b.zarr/labels/zarr.json", cut, {"paint"}),
        ("images/b.zarr/labels/zarr.json", unlink, {"paint"}),
        ("tables/index/b.parquet", flip, {"segment"}),
        ("images/b.zarr/labels/clusters/0/c/0/0", flip, {"paint"}),
        ("tables/cells/b.parquet", flip, {"describe"}),
        ("tables/clusters/b.parquet", cut, {"assign"}),
        ("features/b.zarr/c/0/0", unlink, {"describe"}),
        ("overlays/b.tif", cut, {"paint"}),
        ("preprocessed/b.tif", flip, {"export"}),
        ("clusters/arrays.npz", flip, {"cluster"}),
    ],
)
def test_only_what_is_damaged_is_made_again(whole, tmp_path, monkeypatch, file, harm, redone):
    folder, out = whole
    before = digests(out)
    assert file in before, sorted(before)
    copy = tmp_path / "study"
    shutil.copytree(out, copy)
    harm(copy / file)
    assert damages(copy) == {file}
    said, ran = [], noted(monkeypatch)
    monkeypatch.setattr(Progress, "say", lambda self, text: said.append(text))
    assert run(folder, copy, SETTINGS, verify=True).failures == []
    assert ran == {("b", stage) for stage in redone - {"cluster"}}
    assert len(said) == 1
    assert file in said[0]
    assert digests(copy) == before
    assert damages(copy) == set()


CHANGES = {
    "watershed": ({"segment": {"method": "watershed", "watershed": {"opening": 4}}}, {"segment", "describe"}),
    "margin": ({"features": {"margin": 0.3}}, {"describe"}),
    "groups": ({"cluster": {"k": 3}}, set()),
    "block": ({"compute": {"kind": "inline", "block": 512}}, None),
}


def noted(monkeypatch) -> set[tuple[str, str]]:
    """Slides and stages that run from now on."""
    ran: set[tuple[str, str]] = set()
    for name, stage in STAGES.items():
        if stage.scope == "slide":

            def noting(context, stage=stage):
                ran.add((context.slide, stage.name))
                return stage.run(context)

            monkeypatch.setitem(STAGES, name, replace(stage, run=noting))
    return ran


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_changed_between_runs_leave_what_a_new_study_would_have(
    whole, tmp_path, monkeypatch, change
):
    folder, out = whole
    settings, redone = CHANGES[change]
    settings = SETTINGS | settings
    shutil.copytree(out, tmp_path / "study")
    assert run(folder, tmp_path / "new", settings).failures == []
    ran = noted(monkeypatch)
    assert run(folder, tmp_path / "study", settings).failures == []
    assert ran == {
        (name, stage)
        for name in ("a", "b")
        for stage in (() if redone is None else {*redone, "assign", "paint"})
    }
    found, expected = digests(tmp_path / "study"), digests(tmp_path / "new")
    if redone is None:  # other blocks, the same pixels in other shards: what is done stays
        assert found | {"study.json": ""} == digests(out) | {"study.json": ""}
    else:
        assert found == expected
        assert found != digests(out)


@pytest.mark.slow
def test_a_picture_that_changed_between_runs_leaves_what_a_new_study_would_have(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, seed in (("a", 1), ("b", 2)):
        for channel, pixels in zip(CHANNELS, synthesize_field((256, 256), seed=seed).channels, strict=True):
            tifffile.imwrite(folder / f"{name}_{channel}.tif", pixels)
    assert run(folder, tmp_path / "study", SETTINGS).failures == []
    changed = folder / f"b_{CHANNELS[0]}.tif"
    tifffile.imwrite(changed, tifffile.imread(changed)[::-1].copy())
    ran = noted(monkeypatch)
    assert run(folder, tmp_path / "study", SETTINGS).failures == []
    assert {name for name, stage in ran if stage not in ("assign", "paint")} == {"b"}
    assert run(folder, tmp_path / "new", SETTINGS).failures == []
    assert digests(tmp_path / "study") == digests(tmp_path / "new")


def test_a_missing_shard_reads_as_zeros_which_is_why_there_is_a_list(whole, tmp_path):
    import zarr

    shutil.copytree(whole[1], tmp_path / "study")
    image = tmp_path / "study" / "images" / "b.zarr"
    assert zarr.open_array(image / "0", mode="r")[:].any()
    (image / "0" / "c" / "0" / "0" / "0").unlink()
    assert not zarr.open_array(image / "0", mode="r")[:].any()


def test_the_status_names_what_is_damaged_when_asked(whole, tmp_path):
    from typer.testing import CliRunner

    from daskcell.cli import app

    shutil.copytree(whole[1], tmp_path / "study")
    good = CliRunner().invoke(app, ["status", str(tmp_path / "study"), "--verify"])
    assert (good.exit_code, "every file is as it was written" in good.output) == (0, True)
    flip(tmp_path / "study" / "overlays" / "a.png")
    bad = CliRunner().invoke(app, ["status", str(tmp_path / "study"), "--verify"])
    assert (bad.exit_code, "damaged: overlays/a.png" in bad.output) == (3, True)
