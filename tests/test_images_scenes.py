"""Files that hold several images: each is a slide of its own, named and chosen; none is left out."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

import daskcell as dc
from daskcell.cli import app
from daskcell.config import InputSettings
from daskcell.errors import ImageError, InputError
from daskcell.images import find_images, open_image
from daskcell.images.readers import open_reader
from daskcell.images.scenes import scene_labels

SETTINGS = {"segment": {"method": "watershed"}, "cluster": {"k": 2}, "compute": {"kind": "inline"}}


def field(count: int, seed: int = 0, side: int = 96) -> np.ndarray:
    """A dark field with `count` bright cells."""
    pixels = np.random.default_rng(seed).integers(0, 20, (side, side)).astype(np.uint16)
    for k in range(count):
        y, x = divmod(k, 3)
        pixels[8 + 30 * y : 26 + 30 * y, 8 + 30 * x : 26 + 30 * x] = 2000
    return pixels


POSITIONS = {"Pos A": field(2), "Pos B": field(3, 1, 128), "Pos C": field(4, 2)}


def ome_tiff(path: Path, names: list[str | None] | None = None) -> Path:
    """An OME-TIFF with three positions of their own sizes."""
    with tifffile.TiffWriter(path, ome=True) as writer:
        for number, (name, pixels) in enumerate(POSITIONS.items()):
            own = names[number] if names else name
            said = {"axes": "YX", "PhysicalSizeX": 0.1 * (number + 1), "PhysicalSizeY": 0.5}
            writer.write(pixels, metadata=said | ({"Name": own} if own is not None else {}))
    return path


def plain_tiff(path: Path) -> Path:
    """Pages of different sizes, which nobody describes."""
    with tifffile.TiffWriter(path) as writer:
        for pixels in POSITIONS.values():
            writer.write(pixels[: len(pixels) - 8 if pixels is POSITIONS["Pos C"] else None], metadata=None)
    return path


def stage_tiff(path: Path) -> Path:
    """Positions of the stage along an axis."""
    tifffile.imwrite(
        path, np.stack([POSITIONS["Pos A"], POSITIONS["Pos C"]]), metadata={"axes": "RYX"}, ome=False
    )
    return path


def series_zarr(path: Path) -> Path:
    """What bioformats2raw writes of a file with three series."""
    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.attrs["bioformats2raw.layout"] = 3
    for number, pixels in enumerate(POSITIONS.values()):
        inner = group.create_group(str(number))
        array = inner.create_array("0", shape=pixels.shape, dtype=">u2", chunks=(64, 64))
        array[...] = pixels
        inner.attrs["multiscales"] = [{"axes": ["y", "x"], "datasets": [{"path": "0"}]}]
    return path


def several_multiscales(path: Path) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=2)
    for number, pixels in enumerate(POSITIONS.values()):
        group.create_array(f"{number}", shape=pixels.shape, dtype=pixels.dtype, chunks=(64, 64))[...] = pixels
    group.attrs["multiscales"] = [
        {"name": name, "axes": ["y", "x"], "datasets": [{"path": f"{number}"}]}
        for number, name in enumerate(POSITIONS)
    ]
    return path


CONTAINERS = {
    "a.ome.tif": (ome_tiff, ["a_Pos_A", "a_Pos_B", "a_Pos_C"]),
    "a.tif": (plain_tiff, ["a_0", "a_1", "a_2"]),
    "stage.tif": (stage_tiff, ["stage_0", "stage_1"]),
    "raw.zarr": (series_zarr, ["raw_0", "raw_1", "raw_2"]),
    "many.zarr": (several_multiscales, ["many_Pos_A", "many_Pos_B", "many_Pos_C"]),
}


def expected_of(name: str) -> list[np.ndarray]:
    whole = list(POSITIONS.values())
    if name == "a.tif":
        return [*whole[:2], whole[2][:-8]]
    return [whole[0], whole[2]] if name == "stage.tif" else whole


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_image_of_a_file_is_found_and_read(tmp_path: Path, name: str) -> None:
    make, names = CONTAINERS[name]
    path = make(tmp_path / name)
    for given in (path, tmp_path, [path], str(tmp_path / "*")):
        found = find_images(given)
        assert [source.name for source in found] == names
    for source, pixels in zip(found, expected_of(name), strict=True):
        image = open_image(source)
        np.testing.assert_array_equal(image.data.compute()[0], pixels)
        made = dc.convert(source, tmp_path / "made" / f"{source.name}.zarr")
        np.testing.assert_array_equal(made.data.compute()[0], pixels)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_of_several_images_is_opened_by_scene(tmp_path: Path, name: str) -> None:
    make, names = CONTAINERS[name]
    path = make(tmp_path / name)
    labels = [each.partition("_")[2] for each in names]
    doors = (
        lambda **scene: open_image(path, **scene),
        lambda **scene: dc.convert(path, tmp_path / f"{scene.get('scene')}.zarr", **scene),
    )
    for door in doors:
        with pytest.raises(ImageError, match=f"holds {len(names)} images") as error:
            door()
        sentence = str(error.value)
        assert "\n" not in sentence
        assert all(label in sentence for label in labels)
        assert f"scene='{labels[0]}'" in sentence
        with pytest.raises(ImageError, match="none of them is 'nowhere'"):
            door(scene="nowhere")
        with pytest.raises(ImageError, match="none of them is 7"):
            door(scene=7)
        for number, label in enumerate(labels):
            np.testing.assert_array_equal(door(scene=label).data.compute()[0], expected_of(name)[number])
    np.testing.assert_array_equal(open_image(path, scene=1).data.compute()[0], expected_of(name)[1])


def test_each_image_has_its_own_metadata(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as writer:
        for number in (1, 2):
            said = {
                "axes": "CYX",
                "Channel": {"Name": [f"dye {number}", f"light {number}"]},
                "PhysicalSizeX": 0.25 * number,
                "PhysicalSizeY": 0.5 * number,
            }
            writer.write(np.zeros((2, 30, 40 * number), np.uint8), metadata=said, photometric="minisblack")
    for number, source in enumerate(find_images(tmp_path / "a.ome.tif"), 1):
        image = open_image(source)
        assert image.channels == (f"dye {number}", f"light {number}")
        assert image.pixel_size == (0.5 * number, 0.25 * number)
        assert image.shape == (2, 30, 40 * number)


def test_times_and_planes_of_each_image(tmp_path: Path) -> None:
    stacks = [np.arange(t * z * 20 * 30, dtype=np.uint16).reshape(t, z, 20, 30) for t, z in ((2, 3), (1, 2))]
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as writer:
        for name, stack in zip("ab", stacks, strict=True):
            writer.write(stack, metadata={"axes": "TZYX", "Name": name}, photometric="minisblack")
    found = find_images(tmp_path)
    assert [source.name for source in found] == ["a_a_t000", "a_a_t001", "a_b"]
    expected = [stacks[0][0].max(0), stacks[0][1].max(0), stacks[1][0].max(0)]
    for source, pixels in zip(found, expected, strict=True):
        np.testing.assert_array_equal(open_image(source).data.compute()[0], pixels)
    names = [source.name for source in find_images(tmp_path, InputSettings(z="all", t=0))]
    assert names == ["a_a_z000", "a_a_z001", "a_a_z002", "a_b_z000", "a_b_z001"]
    one = open_image(tmp_path / "a.ome.tif", InputSettings(t=1, z=2), scene="a")
    np.testing.assert_array_equal(one.data.compute()[0], stacks[0][1, 2])
    with pytest.raises(ImageError, match="a time point t"):
        open_image(tmp_path / "a.ome.tif", scene="a")


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ("all", ["Pos_A", "Pos_B", "Pos_C"]),
        (["Pos B"], ["Pos_B"]),
        (["Pos_C", 0], ["Pos_A", "Pos_C"]),
        (["*b", "2"], ["Pos_B", "Pos_C"]),
        (["Pos*"], ["Pos_A", "Pos_B", "Pos_C"]),
    ],
)
def test_a_setting_chooses_scenes(tmp_path: Path, chosen, found: list[str]) -> None:
    ome_tiff(tmp_path / "a.ome.tif")
    tifffile.imwrite(tmp_path / "single.tif", POSITIONS["Pos A"])
    sources = find_images(tmp_path, InputSettings(scenes=chosen))
    assert [source.name for source in sources] == [*(f"a_{name}" for name in found), "single"]


def test_fields_of_a_plate_are_chosen_by_their_path(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "p.zarr", mode="w", zarr_format=2)
    group.attrs["plate"] = {"wells": [{"path": "A/1"}, {"path": "B/2"}]}
    for well in ("A/1", "B/2"):
        group.require_group(well).attrs["well"] = {"images": [{"path": "0"}, {"path": "1"}]}
        for image in "01":
            inner = group.require_group(f"{well}/{image}")
            inner.create_array("0", shape=(20, 30), dtype="u1", chunks=(20, 30))[...] = ord(well[0]) + int(
                image
            )
            inner.attrs["multiscales"] = [{"axes": ["y", "x"], "datasets": [{"path": "0"}]}]
    names = [source.name for source in find_images(tmp_path, InputSettings(scenes=["B/*"]))]
    assert names == ["p_B_2_0", "p_B_2_1"]
    assert (open_image(tmp_path / "p.zarr", scene="A/1/1").data.compute() == ord("A") + 1).all()
    with pytest.raises(ImageError, match="holds 4 images: A/1/0, A/1/1, B/2/0, B/2/1"):
        open_image(tmp_path / "p.zarr")


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a"], ["0", "1"]),
        (["a", "A", "b"], ["0", "1", "b"]),
        (["", "b", " "], ["0", "b", "2"]),
        (["x/1", "x:1", "y"], ["0", "1", "y"]),
        (["1", "", "2"], ["1", "1-2", "2"]),
    ],
)
def test_names_of_scenes_are_unique_and_do_not_depend_on_what_is_chosen(names, labels) -> None:
    assert scene_labels(names) == labels


def test_names_that_are_missing_or_shared_become_numbers(tmp_path: Path) -> None:
    ome_tiff(tmp_path / "a.ome.tif", ["x", "x", "y"])
    assert [source.name for source in find_images(tmp_path)] == ["a_0", "a_1", "a_y"]


def test_what_lies_beside_a_slide_is_no_image_of_its_own(tmp_path: Path) -> None:
    """Label and macro of a slide that Bio-Formats converted; pages marked as reduced."""
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as writer:
        for name, side in (("Image 1", 300), ("label image", 40), ("macro image", 50)):
            writer.write(np.full((side, side), 3, np.uint8), metadata={"axes": "YX", "Name": name})
    with tifffile.TiffWriter(tmp_path / "b.tif") as writer:
        writer.write(np.full((300, 300), 3, np.uint8), metadata=None)
        writer.write(np.full((150, 150), 3, np.uint8), metadata=None, subfiletype=1)
    assert [source.name for source in find_images(tmp_path)] == ["a", "b"]
    assert open_image(tmp_path / "a.ome.tif").shape == (1, 300, 300)


def test_areas_of_one_leica_slide_are_images_and_its_overview_is_not(tmp_path: Path) -> None:
    areas = [np.full((128, 192, 3), 50, np.uint8), np.full((96, 128, 3), 90, np.uint8)]
    pages = [np.zeros((40, 30, 3), np.uint8), *areas]
    images = "".join(
        f'<image name="image_{k}"><pixels><dimension sizeX="1" sizeY="1" r="0" ifd="{k}"/></pixels></image>'
        for k in range(3)
    )
    description = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection>'
        f"{images}</collection></scn>"
    )
    with tifffile.TiffWriter(tmp_path / "a.scn", bigtiff=True) as writer:
        for k, page in enumerate(pages):
            pixels_per_cm = 40000 if k else 600
            writer.write(
                page,
                photometric="rgb",
                tile=(32, 32),
                metadata=None,
                resolution=(pixels_per_cm, pixels_per_cm),
                resolutionunit="CENTIMETER",
                **({"description": description} if k == 0 else {}),
            )
    found = find_images(tmp_path / "a.scn")
    assert [source.name for source in found] == ["a_image_1", "a_image_2"]
    assert [open_image(source).shape for source in found] == [(3, 128, 192), (3, 96, 128)]


def multi_file(folder: Path) -> list[Path]:
    """Two positions in a file each; either file speaks of both, as Bio-Formats and Micro-Manager write."""
    files = [folder / f"pos{k}.ome.tif" for k in range(2)]
    images = "".join(
        f'<Image ID="Image:{k}" Name="P{k}"><Pixels ID="Pixels:{k}" DimensionOrder="XYZCT" Type="uint16" '
        f'SizeX="96" SizeY="96" SizeZ="1" SizeC="1" SizeT="1"><Channel ID="Channel:{k}" SamplesPerPixel="1"/>'
        f'<TiffData IFD="0" PlaneCount="1"><UUID FileName="{file.name}">urn:uuid:{k}</UUID>'
        "</TiffData></Pixels></Image>"
        for k, file in enumerate(files)
    )
    for k, file in enumerate(files):
        schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
        text = f'<?xml version="1.0"?><OME xmlns="{schema}" UUID="urn:uuid:{k}">'
        tifffile.imwrite(file, field(k + 2, k), description=f"{text}{images}</OME>", metadata=None)
    return files


def test_positions_in_a_file_each_are_read_once_and_a_missing_one_is_said(tmp_path: Path) -> None:
    files = multi_file(tmp_path)
    found = find_images(tmp_path)
    assert [source.name for source in found] == ["pos0_P0", "pos0_P1"]
    for k, source in enumerate(found):
        np.testing.assert_array_equal(open_image(source).data.compute()[0], field(k + 2, k))
    files[0].unlink()
    first, second = find_images(files[1])
    with pytest.raises(ImageError, match=r"image 0 of .*pos1\.ome\.tif \(P0\)"):
        open_image(first)
    np.testing.assert_array_equal(open_image(second).data.compute()[0], field(3, 1))


@pytest.mark.slow
def test_a_run_works_on_every_image_of_a_file_and_goes_on(tmp_path: Path) -> None:
    path = ome_tiff(tmp_path / "a.ome.tif")
    study = dc.run(path, tmp_path / "study", {**SETTINGS, "input": {"scenes": ["Pos B"]}})
    assert {name: len(study.cells(name)) for name in study.slides} == {"a_Pos_B": 3}
    before = study.record.ledger("a_Pos_B").entry("segment")
    study = dc.run(path, tmp_path / "all", SETTINGS)
    assert study.failures == []
    assert {n: len(study.cells(n)) for n in study.slides} == {"a_Pos_A": 2, "a_Pos_B": 3, "a_Pos_C": 4}
    assert (
        study.record.ledger("a_Pos_B").entry("segment")["key"] == before["key"]
    )  # the choice changes no result


def test_commands_say_which_images_a_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ome_tiff(tmp_path / "a.ome.tif")
    app(["channels", str(path)], standalone_mode=False)
    assert re.findall(r"^(a_\S+)", capsys.readouterr().out, re.MULTILINE) == ["a_Pos_A", "a_Pos_B", "a_Pos_C"]
    for command in (["convert", str(path), str(tmp_path / "b.zarr")], ["segment", str(path), "-o", "c.zarr"]):
        with pytest.raises(ImageError, match="holds 3 images: Pos_A, Pos_B, Pos_C"):
            app(command, standalone_mode=False)
    app(
        [
            "convert",
            str(path),
            str(tmp_path / "b.zarr"),
            "-s",
            "input.scenes=[Pos B]",
            "-s",
            "compute.kind=inline",
        ],
        standalone_mode=False,
    )
    np.testing.assert_array_equal(open_image(tmp_path / "b.zarr").data.compute()[0], POSITIONS["Pos B"])


def test_files_of_one_channel_each_are_joined_scene_by_scene(tmp_path: Path) -> None:
    for value, colour in enumerate(("red", "green"), 1):
        with tifffile.TiffWriter(tmp_path / f"a_{colour}.ome.tif", ome=True) as writer:
            for name in ("P1", "P2"):
                pixels = np.full((20, 30), 10 * value + int(name[1]), np.uint8)
                writer.write(pixels, metadata={"axes": "YX", "Name": name})
    found = find_images(tmp_path)
    assert [source.name for source in found] == ["a_P1", "a_P2"]
    for number, source in enumerate(found, 1):
        image = open_image(source)
        assert image.channels == ("red", "green")
        assert image.data.compute()[:, 0, 0].tolist() == [10 + number, 20 + number]


def test_there_is_no_image_beyond_the_last(tmp_path: Path) -> None:
    path = ome_tiff(tmp_path / "a.ome.tif")
    with pytest.raises(InputError, match="holds 3 images; there is none with number 3"):
        open_reader(path, scene=3)


def czi_without_names(path: Path, scenes: list[np.ndarray]) -> Path:
    """pylibCZIrw writes no names of scenes, and bioio then says that there is one."""
    pytest.importorskip("bioio_czi")
    czi = pytest.importorskip("pylibCZIrw.czi")
    with czi.create_czi(str(path)) as file:
        for scene, pixels in enumerate(scenes):
            plane = {"C": 0, "Z": 0, "T": 0}
            file.write(data=pixels[..., None], plane=plane, scene=scene, location=(500 * scene, 0))
        file.write_metadata(document_name="a", channel_names={0: "DAPI"}, scale_x=2.5e-7, scale_y=5e-7)
    return path


def test_scenes_of_a_czi_without_names_are_all_read(tmp_path: Path) -> None:
    scenes = [pixels[:96, :96] for pixels in POSITIONS.values()]
    path = czi_without_names(tmp_path / "a.czi", scenes)
    found = find_images(path)
    assert [source.name for source in found] == ["a_0", "a_1", "a_2"]
    for source, pixels in zip(found, scenes, strict=True):
        image = open_image(source)
        assert image.channels == ("DAPI",)
        assert image.pixel_size == (0.5, 0.25)
        np.testing.assert_array_equal(image.data.compute()[0], pixels)
    with pytest.raises(ImageError, match="holds 3 images"):
        open_image(path)


def test_scenes_of_a_czi_without_names_and_of_several_sizes_say_what_to_do(tmp_path: Path) -> None:
    path = czi_without_names(tmp_path / "a.czi", list(POSITIONS.values()))
    with pytest.raises(ImageError, match=r"holds 3 scenes, .* name 1\. Please name the scenes in ZEN"):
        open_image(path)
