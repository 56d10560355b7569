"""Which files are which image: recognised by name, by pattern, and never invented."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile

from daskcell.config import InputSettings
from daskcell.errors import ConfigError, ImageError, InputError
from daskcell.geometry import Box
from daskcell.images import describe_sources, find_images, open_image
from daskcell.images.filename_channels import compile_pattern, safe_name, unique_names
from daskcell.images.reader_process import open_safely


def make(folder: Path, *names: str, shape: tuple[int, ...] = (20, 30)) -> Path:
    """Small pictures; the value of each is its place in the list, from 1."""
    for value, name in enumerate(names, 1):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photometric = "rgb" if len(shape) == 3 else "minisblack"
        tifffile.imwrite(path, np.full(shape, value, np.uint8), photometric=photometric)
    return folder


def table(sources) -> dict[str, tuple[str, ...] | None]:
    return {source.name: source.file_channels for source in sources}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            [
                "s1_red.tif",
                "s1_green.tif",
                "s1_blue.tif",
                "s1_cyan.tif",
                "s2_red.tif",
                "s2_green.tif",
                "s2_blue.tif",
                "s2_cyan.tif",
            ],
            {"s1": ("red", "green", "blue", "cyan"), "s2": ("red", "green", "blue", "cyan")},
        ),
        (["Red.tif", "Green.tif"], {"HERE": ("Red", "Green")}),
        (["A_D03f00d0.tif", "A_D03f00d1.tif"], {"A_D03f00": ("d0", "d1")}),
        (["01_P2_D.TIF", "01_P2_F.TIF", "01_P2_R.TIF"], {"01_P2": ("D", "F", "R")}),
        (["x_B.tif", "x_G.tif", "x_R.tif"], {"x": ("R", "G", "B")}),
        (["Channel1-A-01.tif", "Channel2-A-01.tif"], {"A-01": ("Channel1", "Channel2")}),
        (["f_Ch3.tif", "f_Ch6.tif", "f_Ch10.tif"], {"f": ("Ch3", "Ch6", "Ch10")}),
        (["T_A02_s9_w1.tif", "T_A02_s9_w2.tif"], {"T_A02_s9": ("w1", "w2")}),
        (["T_w1DAPI.tif", "T_w2GFP.tif"], {"T": ("w1DAPI", "w2GFP")}),
        (
            [
                "P_s1_w1A0B1C2D3-0000-1111-2222-333344445555.tif",
                "P_s1_w29999AAAA-0000-1111-2222-333344445555.tif",
            ],
            {"P_s1": ("w1", "w2")},
        ),
        (
            [
                "r01c01f01p01-ch1sk1fk1fl1.tiff",
                "r01c01f01p01-ch2sk1fk1fl1.tiff",
                "r01c02f01p01-ch1sk1fk1fl1.tiff",
                "r01c02f01p01-ch2sk1fk1fl1.tiff",
            ],
            {"r01c01f01p01_sk1fk1fl1": ("ch1", "ch2"), "r01c02f01p01_sk1fk1fl1": ("ch1", "ch2")},
        ),
        (
            ["img_000_DAPI_000.tif", "img_000_FITC_000.tif", "img_001_DAPI_000.tif", "img_001_FITC_000.tif"],
            {"img_000_000": ("DAPI", "FITC"), "img_001_000": ("DAPI", "FITC")},
        ),
        # What stays what it is:
        (["a.tif", "b.tif", "c.tif"], {"a": None, "b": None, "c": None}),
        (["t98g_01.tif", "t98g_02.tif", "t98g_11.tif"], {"t98g_01": None, "t98g_02": None, "t98g_11": None}),
        (["plate_A.tif", "plate_B.tif", "plate_C.tif"], {"plate_A": None, "plate_B": None, "plate_C": None}),
        (["day1.tif", "day2.tif"], {"day1": None, "day2": None}),
        (["d1.tif", "d2.tif"], {"d1": None, "d2": None}),
        (["red_blood_cells.tif", "white_cells.tif"], {"red_blood_cells": None, "white_cells": None}),
        (["mouse_red.tif", "rat_green.tif"], {"mouse_red": None, "rat_green": None}),
        (["fluo_16c3d593.tif", "fluo_54cb3328.tif", "fluo_a1c2.tif"], None),
        (["slide_c1.tif"], {"slide_c1": None}),
    ],
)
def test_channels_are_recognised_by_name(tmp_path: Path, names: list[str], expected) -> None:
    sources = find_images(make(tmp_path / "HERE", *names))
    if expected is None:
        expected = {Path(name).stem: None for name in names}
    assert table(sources) == expected


def test_files_beside_a_set_of_channels_stay_pictures(tmp_path: Path) -> None:
    make(tmp_path, "s1_red.tif", "s1_blue.tif", "overview.tif")
    assert table(find_images(tmp_path)) == {"s1": ("red", "blue"), "overview": None}


def test_a_channel_is_the_file_that_its_name_says(tmp_path: Path) -> None:
    make(tmp_path, "s_blue.tif", "s_red.tif", "s_green.tif")
    image = open_image(tmp_path)
    assert image.channels == ("red", "green", "blue")
    assert not image.is_rgb
    assert image.data[:, 0, 0].compute().tolist() == [2, 3, 1]


def test_each_folder_by_itself_and_names_stay_unique(tmp_path: Path) -> None:
    make(
        tmp_path,
        "a/x_red.tif",
        "a/x_green.tif",
        "b/x_red.tif",
        "b/x_green.tif",
        "b/deep/y.tif",
        "notes.txt.tif",
    )
    (tmp_path / "README.md").write_text("no picture")
    (tmp_path / "._hidden.tif").write_text("no picture")
    found = table(find_images(tmp_path))
    assert found == {"a_x": ("red", "green"), "b_x": ("red", "green"), "b_deep_y": None, "notes.txt": None}


def test_a_missing_channel_is_named_not_filled(tmp_path: Path) -> None:
    make(tmp_path, *(f"s{i}_{c}.tif" for i in range(3) for c in ("red", "green")))
    (tmp_path / "s1_green.tif").unlink()
    with pytest.raises(ImageError, match=r"'s1' lacks channel 'green'.*s1_red\.tif"):
        find_images(tmp_path)


def test_a_channel_that_is_there_twice_is_named(tmp_path: Path) -> None:
    make(tmp_path, "s_red.tif", "s_green.tif", "s_red.tiff")
    with pytest.raises(ImageError, match=r"'red' of image 's' exists twice: .*s_red\.tif and .*s_red\.tiff"):
        find_images(tmp_path)


def test_channels_of_different_size_are_named(tmp_path: Path) -> None:
    make(tmp_path, "s_red.tif")
    make(tmp_path, "s_green.tif", shape=(20, 31))
    with pytest.raises(
        ImageError, match=r"differ in size.*\(20, 30\) of .*s_red\.tif, \(20, 31\) of .*s_green\.tif"
    ):
        open_image(tmp_path)


def test_a_channel_saved_in_its_colour_is_one_channel(tmp_path: Path) -> None:
    for name, place in (("red", 0), ("green", 1)):
        pixels = np.zeros((20, 30, 3), np.uint8)
        pixels[..., place] = 50 + place
        tifffile.imwrite(tmp_path / f"s_{name}.tif", pixels, photometric="rgb")
    assert open_image(tmp_path).data[:, 3, 3].compute().tolist() == [50, 51]


def test_stack_where_a_channel_should_be_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "s_red.tif")
    tifffile.imwrite(tmp_path / "s_green.tif", np.zeros((2, 20, 30), np.uint8), photometric="minisblack")
    with pytest.raises(ImageError, match=r"s_green\.tif should be one channel of image 's', but holds 2"):
        open_image(tmp_path)


def test_pattern_names_what_guessing_cannot(tmp_path: Path) -> None:
    make(tmp_path, "p1-x-A.tif", "p1-y-A.tif", "p1-x-B.tif", "p1-y-B.tif", "other.tif")
    assert all(channels is None for channels in table(find_images(tmp_path)).values())
    found = find_images(tmp_path, InputSettings(pattern="{plate}-{channel}-{well}.tif"))
    assert table(found) == {"p1_A": ("x", "y"), "p1_B": ("x", "y")}


def test_pattern_over_folders_stars_and_letter_case(tmp_path: Path) -> None:
    make(tmp_path, "red/one_001.TIF", "green/one_002.TIF", "red/two_003.TIF", "green/two_004.TIF")
    found = find_images(tmp_path, InputSettings(pattern="{channel}/{field}_*.tif"))
    assert table(found) == {"one": ("red", "green"), "two": ("red", "green")}


def test_pattern_without_channel_selects_and_names(tmp_path: Path) -> None:
    make(tmp_path, "a_red.tif", "a_green.tif")
    assert table(find_images(tmp_path, InputSettings(pattern="{name}.tif"))) == {
        "a_green": None,
        "a_red": None,
    }


@pytest.mark.parametrize("pattern", ["no groups.tif", "{a b}.tif", "{}.tif", "{1a}.tif"])
def test_patterns_that_cannot_work_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        compile_pattern(pattern)


def test_pattern_that_matches_nothing_or_makes_names_meet_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a_1.tif", "a_2.tif")
    with pytest.raises(ImageError, match=r"No file matches the pattern.*'a_1\.tif'"):
        find_images(tmp_path, InputSettings(pattern="{field}_{channel}.png"))
    with pytest.raises(ImageError, match="same name 'a'"):
        find_images(tmp_path, InputSettings(pattern="{field}_*.tif"))


def test_channels_are_chosen_and_ordered_by_name(tmp_path: Path) -> None:
    make(tmp_path, "s_red.tif", "s_green.tif", "s_blue.tif")
    image = open_image(tmp_path, InputSettings(channels=["Blue", "red"]))
    assert image.channels == ("blue", "red")
    assert image.data[:, 0, 0].compute().tolist() == [3, 1]
    with pytest.raises(InputError, match="no channel 'cyan'; it has red, green, blue"):
        find_images(tmp_path, InputSettings(channels=["cyan"]))
    make(tmp_path, "rgb/colour.tif", shape=(20, 30, 3))
    picked = open_image(tmp_path / "rgb", InputSettings(channels=["green"]))
    assert picked.channels == ("green",)
    assert not picked.is_rgb


def test_preview_says_which_file_becomes_what(tmp_path: Path) -> None:
    make(tmp_path, "s_red.tif", "s_green.tif", "t.tif")
    rows = describe_sources(
        find_images(tmp_path, InputSettings(channels=["green"], pattern="{field}_{channel}.tif"))
    )
    assert [(r["image"], r["channel"], Path(r["file"]).name) for r in rows] == [
        ("s", "red (left out)", "s_red.tif"),
        ("s", "green", "s_green.tif"),
    ]
    tifffile.imwrite(
        tmp_path / "t.tif", np.zeros((2, 3, 9, 9), np.uint8), imagej=True, metadata={"axes": "ZCYX"}
    )
    (tmp_path / "u.tif").write_text("no picture")
    rows = describe_sources(find_images([tmp_path / "t.tif", tmp_path / "u.tif"]))
    assert [row["channel"] for row in rows] == [
        "channel 1, channel 2, channel 3 (maximum of 2 planes)",
        "(cannot be read)",
    ]


def test_inputs_may_be_files_globs_and_folders(tmp_path: Path) -> None:
    make(tmp_path, "a.tif", "b.tif", "c/d.tif")
    assert sorted(table(find_images([tmp_path / "a.tif", str(tmp_path / "b*.tif"), tmp_path / "c"]))) == [
        "a",
        "b",
        "d",
    ]
    with pytest.raises(ImageError, match="There is no file or folder"):
        find_images(tmp_path / "absent")
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a.xyz").write_bytes(b"some other kind")
    with pytest.raises(ImageError, match=r"There is no image in .*void; .* \.tif"):
        find_images(tmp_path / "void")
    assert len(find_images([tmp_path, tmp_path / "a.tif", tmp_path / "c"])) == 3
    with pytest.raises(ImageError, match="holds 3 images"):
        open_image(tmp_path)


def test_files_are_found_again_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "here/a.tif", "here/b_red.tif", "here/b_green.tif")
    monkeypatch.chdir(tmp_path)
    sources = find_images(["here", "here/a*.tif"])
    monkeypatch.chdir("/")
    assert [source.name for source in sources] == ["b", "a"]
    assert all(open_image(source).shape[1:] == (20, 30) for source in sources)


def test_time_points_become_images_of_their_own(tmp_path: Path) -> None:
    stack = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3, 1, 1) * np.ones((20, 30), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, metadata={"axes": "TZYX"})
    sources = find_images(tmp_path)
    assert [s.name for s in sources] == ["a_t000", "a_t001"]
    assert [int(open_safely(s).read(0, Box(0, 0, 1, 1))[0, 0, 0]) for s in sources] == [2, 5]
    planes = find_images(tmp_path, InputSettings(z="all", t=1))
    assert [s.name for s in planes] == ["a_z000", "a_z001", "a_z002"]
    assert [int(open_safely(s).read(0, Box(0, 0, 1, 1))[0, 0, 0]) for s in planes] == [3, 4, 5]


def test_sources_travel_and_know_when_files_change(tmp_path: Path) -> None:
    make(tmp_path, "s_red.tif", "s_green.tif")
    (source,) = find_images(tmp_path)
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    before = source.identity()
    assert again.identity() == before
    make(tmp_path, "s_green.tif", shape=(21, 30))
    assert source.identity() != before


def test_names_are_safe_and_unique() -> None:
    assert safe_name("a b/c:d*é(1).x") == "a_b_c_d_é(1).x"
    assert safe_name("///") == "image"
    assert unique_names(["a", "A", "a", "b"]) == ["a", "A-2", "a-3", "b"]


@pytest.mark.data
def test_real_sets_are_recognised_without_settings(data_dir: Path) -> None:
    found = {
        name: table(find_images(data_dir / "channels" / name)) for name in ("human", "fly", "sbs", "bbbc022")
    }
    assert found == {
        "human": {"AS_09125_050116030001_D03f00": ("d0", "d1", "d2")},
        "fly": {"01_POS002": ("D", "F", "R")},
        "sbs": dict.fromkeys(("01-A-01", "12-A-12", "49-E-01"), ("Channel1", "Channel2")),
        "bbbc022": {"IXMtest_A02_s9": ("w1", "w2", "w3")},
    }
    assert table(find_images(data_dir / "cellcycle-ifc")) == {"field": ("Ch3", "Ch4", "Ch6")}


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "count"),
    [("dsb2018/val/images", 29), ("t98g-phase/images", 6), ("rbc12/images", 16), ("pbc/images", 257)],
)
def test_independent_pictures_stay_independent(data_dir: Path, folder: str, count: int) -> None:
    sources = find_images(data_dir / folder)
    assert len(sources) == count
    assert all(source.file_channels is None for source in sources)


def write_multi_file_ome(folder: Path, names: list[str], channels: list[str]) -> None:
    """One plane a file; each names all the others."""
    uuids = [f"urn:uuid:00000000-0000-0000-0000-{k:012d}" for k in range(len(names))]
    planes = "".join(
        f'<TiffData FirstC="{k}" PlaneCount="1"><UUID FileName="{name}">{uuid}</UUID></TiffData>'
        for k, (name, uuid) in enumerate(zip(names, uuids, strict=True))
    )
    channel = "".join(f'<Channel ID="Channel:0:{k}" Name="{name}"/>' for k, name in enumerate(channels))
    schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    for k, (name, uuid) in enumerate(zip(names, uuids, strict=True)):
        xml = (
            f'<OME xmlns="{schema}" UUID="{uuid}"><Image ID="Image:0"><Pixels ID="Pixels:0" Type="uint8" '
            f'DimensionOrder="XYCZT" SizeX="30" SizeY="20" SizeC="{len(names)}" SizeZ="1" SizeT="1">'
            f"{channel}{planes}</Pixels></Image></OME>"
        )
        tifffile.imwrite(folder / name, np.full((20, 30), k + 1, np.uint8), description=xml, metadata=None)


def test_files_that_name_each_other_are_one_image(tmp_path: Path) -> None:
    write_multi_file_ome(tmp_path, ["s_c0.ome.tif", "s_c1.ome.tif"], ["DNA", "actin"])
    make(tmp_path, "alone.ome.tif", "plain.tif")
    sources = find_images(tmp_path)
    assert sorted(source.name for source in sources) == ["alone", "plain", "s_c0"]
    both = next(source for source in sources if source.name == "s_c0")
    image = open_image(both)
    assert image.channels == ("DNA", "actin")
    assert image.data[:, 0, 0].compute().tolist() == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_every_field_of_a_plate_is_an_image(tmp_path: Path, version: str) -> None:
    import zarr
    from ome_zarr.format import FormatV04, FormatV05
    from ome_zarr.writer import write_image, write_plate_metadata, write_well_metadata

    form, number = (FormatV04(), 2) if version == "0.4" else (FormatV05(), 3)
    plate = zarr.open_group(tmp_path / "plate.zarr", mode="w", zarr_format=number)
    write_plate_metadata(plate, ["A", "B"], ["1"], ["A/1", "B/1"], fmt=form)
    for value, well in enumerate(("A/1", "B/1"), 1):
        group = plate.require_group(well)
        write_well_metadata(group, ["0", "1"], fmt=form)
        for field in range(2):
            pixels = np.full((1, 20, 30), 10 * value + field, np.uint8)
            write_image(pixels, group.require_group(str(field)), axes="cyx", fmt=form, scaler=None)
    for inputs in (tmp_path, tmp_path / "plate.zarr"):
        sources = find_images(inputs)
        assert [source.name for source in sources] == [
            "plate_A_1_0",
            "plate_A_1_1",
            "plate_B_1_0",
            "plate_B_1_1",
        ]
        assert [int(open_image(source).data[0, 0, 0]) for source in sources] == [10, 11, 20, 21]


def test_plain_arrays_are_pictures(tmp_path: Path) -> None:
    import zarr

    pixels = np.random.default_rng(0).integers(0, 4000, (2, 40, 50)).astype(np.uint16)
    np.save(tmp_path / "a.npy", pixels)
    zarr.save_array(tmp_path / "b.zarr", pixels)
    np.save(tmp_path / "flat.npy", pixels[0].astype(">f4"))
    np.save(tmp_path / "objects.npy", np.array([{}, None]), allow_pickle=True)
    np.save(tmp_path / "line.npy", np.zeros(5))
    np.save(tmp_path / "long.npy", np.zeros((4, 4), np.int64))
    for name in ("a.npy", "b.zarr"):
        image = open_image(tmp_path / name)
        assert image.channels == ("channel 1", "channel 2")
        np.testing.assert_array_equal(image.data.compute(), pixels)
        np.testing.assert_array_equal(image.data[:, 3:9, 5:7].compute(), pixels[:, 3:9, 5:7])
    flat = open_image(tmp_path / "flat.npy")
    assert flat.dtype == np.float32
    np.testing.assert_array_equal(flat.data.compute(), pixels[:1])
    for name, reason in (("objects", "objects.npy"), ("line", r"\(5,\) is no image"), ("long", "int64")):
        with pytest.raises(ImageError, match=reason):
            open_image(tmp_path / f"{name}.npy")


def test_files_that_are_no_stacks_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from daskcell.images import discovery
    from daskcell.images.readers import may_be_stack

    plain = np.zeros((20, 30), np.uint8)
    for name, options in {
        "plain": {},
        "big": {"bigtiff": True},
        "other": {"byteorder": ">", "metadata": None},
        "described": {"description": "x" * 9000, "metadata": None},
        "slide": {"description": "Aperio Image Library", "metadata": None, "tile": (16, 16)},
    }.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", plain, **options)
    Image.fromarray(plain).save(tmp_path / "a.png")
    stacks = tmp_path / "stacks"
    stacks.mkdir()
    many = np.zeros((3, 20, 30), np.uint8)
    tifffile.imwrite(stacks / "pages.tif", many, photometric="minisblack")
    tifffile.imwrite(stacks / "imagej.tif", many, imagej=True, metadata={"axes": "TYX"})
    tifffile.imwrite(stacks / "ome.ome.tif", many, metadata={"axes": "TYX"})
    tifffile.imwrite(stacks / "truncated.tif", many, metadata={"truncate": True}, photometric="minisblack")
    (stacks / "broken.tif").write_bytes(b"II*\0\xff\xff\xff\xff")
    assert all(may_be_stack(str(file)) for file in stacks.iterdir())

    def opened(_: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(discovery, "open_safely", opened)
    assert len(find_images([file for file in tmp_path.iterdir() if file.is_file()])) == 6
    with pytest.raises(AssertionError, match="opened"):
        find_images(stacks)
