"""Collections that are told: tables of images, generators of paths, arrays."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tifffile

from daskcell.errors import ImageError, InputError
from daskcell.images import find_images, open_image
from daskcell.images.manifest import read_manifest
from daskcell.pipeline import run

SETTINGS = {"segment": {"method": "watershed"}, "cluster": {"k": 2}, "compute": {"kind": "inline"}}


def picture(seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 20, (120, 120), np.uint8)
    pixels[20:50, 20:50] = pixels[70:100, 60:90] = 200
    return pixels


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c"):
        tifffile.imwrite(tmp_path / f"{name}.tif", picture())
    return tmp_path


def write(folder, text: str):
    (folder / "list.csv").write_text(text)
    return folder / "list.csv"


def test_a_row_is_an_image_and_says_what_the_file_does_not(folder):
    one, two = find_images(write(folder, "path,pixel_size,group,note\na.tif,0.5,007,x\nb.tif,,drug,\n"))
    assert (one.name, one.files, one.pixel_size, one.condition) == (
        "a",
        (str(folder / "a.tif"),),
        (0.5, 0.5),
        "007",
    )
    assert (two.name, two.pixel_size, two.condition) == ("b", None, "drug")


def test_rows_of_one_image_are_its_channels(folder):
    text = "image;channel;path;channels\nx;DNA;a.tif;actin\nx;actin;b.tif;actin\ny;DNA;c.tif;\n"
    x, y = find_images(write(folder, text))
    assert (x.name, x.file_channels, x.take) == ("x", ("DNA", "actin"), ("actin",))
    assert (y.name, y.file_channels, y.take) == ("y", ("DNA",), None)


def test_parquet_does_as_csv_does(folder):
    table = pd.DataFrame({"path": ["a.tif", "b.tif"], "pixel_size": [0.5, None], "group": ["one", None]})
    table.to_parquet(folder / "list.parquet")
    one, two = find_images(folder / "list.parquet")
    assert (one.pixel_size, one.condition, two.pixel_size, two.condition) == ((0.5, 0.5), "one", None, None)


@pytest.mark.parametrize(
    "header",
    [
        "path,image,channel,pixel_size",
        "Path,Image Name,channel ,Pixel Size (um)",
        "\ufefffile,IMAGE, Channel,pixel-size",
        "File Name;image;CHANNEL;MPP",
        "filename\timage_name\tchannel\tpixelsize",
        "sep=;\npath;image;channel;pixel_size",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_header_may_be_spelled_otherwise(folder, header, encoding):
    separator = next(mark for mark in ";\t," if mark in header)
    size = "0,5" if separator == ";" else "0.5"
    rows = [("a.tif", "x", "DNA", size), ("b.tif", "x", "actin", size)]
    text = "\n".join([header, *(separator.join(row) for row in rows)]) + "\n"
    (folder / "list.csv").write_text(text, encoding=encoding)
    (source,) = find_images(folder / "list.csv")
    assert (source.name, source.file_channels, source.pixel_size) == ("x", ("DNA", "actin"), (0.5, 0.5))


def test_columns_that_are_not_used_are_named(folder):
    said = []
    read_manifest(str(write(folder, "path,note,chanel\na.tif,x,DNA\n")), said.append)
    assert len(said) == 1
    assert "list.csv" in said[0]
    assert "'note', 'chanel' (or is it 'channel'?)" in said[0]
    read_manifest(str(write(folder, "path,image\na.tif,x\n")), said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("where\na.tif\n", r"no column 'path' .*\(it has: where\)"),
        ("Path,PATH\na.tif,b.tif\n", "two columns 'path'"),
        ("path,image\na.tif,x,y\n", "more values than its header"),
        ("path\nnowhere.tif\n", "row 2: there is no file .*nowhere.tif"),
        ("path,pixel_size\na.tif,wide\n", "row 2: pixel_size must be micrometres above 0, not 'wide'"),
        ("path,pixel_size\na.tif,-1\n", "must be micrometres above 0"),
        ("path,channel\na.tif,DNA\n", "row 2 has a channel, but no image"),
        ("path,image\na.tif,x\nb.tif,x\n", "image 'x' has 2 files"),
        ("path,image,channel\na.tif,x,DNA\nb.tif,x,DNA\n", "a channel of their own"),
        (
            "path,image,channel,condition\na.tif,x,D,1\nb.tif,x,E,2\n",
            "row 3: image 'x' has another condition",
        ),
        ("path\n\n", "no image"),
        ("", "is not a table"),
    ],
)
def test_a_row_that_cannot_be_is_one_sentence(folder, text, says):
    with pytest.raises(ImageError, match=says):
        find_images(write(folder, text))


def test_names_that_would_leave_the_study_stay_inside(folder):
    names = ["../../escape", "/etc/passwd", "..", "a/b", "C:\\x", "con\0"]
    rows = "".join(f'a.tif,"{name}"\n' for name in names)
    sources = find_images(write(folder, "path,image\n" + rows))
    for source in sources:
        assert "/" not in source.name
        assert "\\" not in source.name
        assert not source.name.startswith(".")
        assert (
            folder / "out" / "images" / f"{source.name}.zarr"
        ).resolve().parent == folder / "out" / "images"
    assert len({source.name for source in sources}) == len(names)


@pytest.mark.slow
def test_names_too_long_for_a_file_system_are_cut_and_kept_apart(folder):
    """File systems count bytes: 300 letters of three bytes each would stop the whole run."""
    names = [letter * 300 for letter in ("x", "胞", "e\u0301")] + ["胞" * 299]
    table = write(folder, "path,image\n" + "".join(f"a.tif,{name}\n" for name in names))
    study = run(table, folder / "out", SETTINGS)
    assert (len(study.slides), study.failures) == (len(names), [])
    assert any(name.startswith("é" * 50) for name in study.slides)


@pytest.mark.slow
def test_what_a_table_says_is_part_of_what_a_slide_depends_on(folder):
    table = write(folder, "path,pixel_size,condition\na.tif,0.5,one\nb.tif,0.5,one\n")
    study = run(table, folder / "out", SETTINGS)
    assert study.failures == []
    assert study.cells().groupby("condition").size().to_dict() == {"one": 4}
    before = {name: study.record.ledger(name).stages["convert"]["key"] for name in study.slides}
    write(folder, "path,pixel_size,condition\na.tif,0.25,one\nb.tif,0.5,two\n")
    study = run(table, folder / "out", SETTINGS)
    after = {name: study.record.ledger(name).stages["convert"]["key"] for name in study.slides}
    assert after["a"] != before["a"]
    assert after["b"] == before["b"]
    assert study.open_image("a").pixel_size == (0.25, 0.25)
    assert study.cells().groupby("condition").size().to_dict() == {"one": 2, "two": 2}


@pytest.mark.slow
def test_a_generator_of_paths_does_as_a_list_does(folder):
    study = run((folder / f"{name}.tif" for name in "ab"), folder / "out", SETTINGS)
    assert (study.slides, study.failures) == (["a", "b"], [])


@pytest.mark.slow
def test_arrays_from_a_generator_are_kept_and_continued(folder):
    def arrays(seed: int = 1):
        yield "flat", picture()
        yield "../stack", np.stack([picture(), picture(seed)])

    study = run(arrays(), folder / "out", SETTINGS)
    assert (study.slides, study.failures) == (["flat", "stack"], [])
    assert study.open_image("stack").data.shape == (2, 120, 120)
    before = {name: (study.out / "ledger" / f"{name}.json").stat().st_mtime_ns for name in study.slides}
    study = run(arrays(), folder / "out", SETTINGS)
    after = {name: (study.out / "ledger" / f"{name}.json").stat().st_mtime_ns for name in study.slides}
    assert after == before
    study = run(arrays(2), folder / "out", SETTINGS)
    keys = [study.record.ledger(name).stages["convert"]["key"] for name in study.slides]
    assert study.failures == []
    assert len(set(keys)) == 2
    np.testing.assert_array_equal(np.asarray(study.open_image("stack").data)[1], picture(2))


@pytest.mark.parametrize(
    "inputs", [["a.tif", 3], [("a", np.zeros(3))], [("a", np.zeros((4, 4))), "b.tif"], [("a", "b", "c")]]
)
def test_inputs_of_other_kinds_are_refused(tmp_path, inputs):
    with pytest.raises(InputError):
        run(inputs, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out" / "study.json").exists()


@pytest.fixture
def positions(tmp_path):
    """An OME-TIFF with three images, named A1, A2 and B1, of values 1 to 3."""
    with tifffile.TiffWriter(tmp_path / "p.ome.tif", ome=True) as file:
        for value, name in enumerate(("A1", "A2", "B1"), 1):
            file.write(np.full((40, 50), value, np.uint8), metadata={"axes": "YX", "Name": name})
    return tmp_path


def values(sources) -> dict[str, int]:
    return {source.name: int(open_image(source).data.compute().max()) for source in sources}


def test_a_row_names_a_scene_of_its_file(positions):
    text = "path,Scene,image,group\np.ome.tif,B1,,x\np.ome.tif,0,first,y\n"
    sources = find_images(write(positions, text))
    assert values(sources) == {"p_B1": 3, "first": 1}
    assert [source.condition for source in sources] == ["x", "y"]


def test_rows_may_name_some_scenes_and_leave_others_to_the_settings(positions):
    tifffile.imwrite(positions / "a.tif", picture())
    pd.DataFrame({"path": ["p.ome.tif", "a.tif"], "series": [2, None]}).to_parquet(positions / "list.parquet")
    assert list(values(find_images(positions / "list.parquet"))) == ["p_2", "a"]
    assert values(find_images(write(positions, "path\np.ome.tif\n"))) == {"p_A1": 1, "p_A2": 2, "p_B1": 3}
    assert values(find_images(write(positions, "path,scene\np.ome.tif,A*\n"))) == {"p_A1": 1, "p_A2": 2}


@pytest.mark.parametrize("file", ["p.ome.tif", "a.tif"])
def test_a_scene_that_a_file_has_not_is_refused(positions, file):
    tifffile.imwrite(positions / "a.tif", picture())
    with pytest.raises(ImageError, match=r"none of them is 'C9'. Please name others in its row"):
        find_images(write(positions, f"path,scene\n{file},C9\n"))
    assert len(find_images(write(positions, f"path,scene\n{file},0\n"))) == 1


def test_channels_of_one_image_are_of_one_scene(positions):
    text = "path,image,channel,scene\np.ome.tif,x,D,A1\na.tif,x,E,A2\n"
    tifffile.imwrite(positions / "a.tif", picture())
    with pytest.raises(ImageError, match="has another scene than in row 2"):
        find_images(write(positions, text))
