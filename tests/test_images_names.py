"""Names: of channels, inside a file and in file names as instruments write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st

from daskcell.config import InputSettings
from daskcell.errors import InputError
from daskcell.images import find_images, open_image
from daskcell.images.filename_channels import file_sets_by_name, matching_channels, name_channels

GUIDS = [f"{k:X}F2504E0-4F89-11D3-9A0C-0305E82C330{k:X}" for k in range(10, 16)]
HEX = [f"{k:x}f8fad5bd9cb469fa16570867728950e" for k in range(10, 16)]
WORDS = st.sampled_from(
    ["DAPI", "dapi", "DAPI 2", "channel 2", "channel 1", "", " ", "GFP", " GFP", "GFP 2 2"]
)


def write_ome(path: Path, names: list[str | None]) -> Path:
    pixels = np.arange(len(names), dtype=np.uint8)[:, None, None] * np.ones((20, 30), np.uint8)
    metadata = {"axes": "CYX", "Channel": {"Name": names}}
    tifffile.imwrite(path, pixels, ome=True, metadata=metadata, photometric="minisblack")
    return path


@pytest.mark.parametrize(
    ("given_names", "expected"),
    [
        (["DAPI", "GFP", "DAPI"], ("DAPI", "GFP", "DAPI 2")),
        (["DAPI", "", "GFP"], ("DAPI", "channel 2", "GFP")),
        (["DAPI", "DAPI 2", "DAPI"], ("DAPI", "DAPI 2", "DAPI 3")),
    ],
)
def test_names_that_can_be_kept_are_kept(tmp_path: Path, given_names: list[str], expected) -> None:
    assert open_image(write_ome(tmp_path / "a.ome.tif", given_names)).channels == expected
    group = zarr.open_group(tmp_path / "b.zarr", mode="w", zarr_format=2)
    group.create_array("0", shape=(3, 20, 30), dtype="u1", chunks=(3, 20, 30))
    scale = {"type": "scale", "scale": [1, 1, 1]}
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space"} for n in "yx")]
    datasets = [{"path": "0", "coordinateTransformations": [scale]}]
    labels = [{"label": name, "color": "FFFFFF"} for name in given_names]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    group.attrs["omero"] = {"channels": labels}
    assert open_image(tmp_path / "b.zarr").channels == expected
    own = {"axes": "CYX", "Channel": {"Name": given_names}}
    pixels = np.zeros((3, 20, 30), np.uint8)
    tifffile.imwrite(tmp_path / "c.tif", pixels, metadata=own, photometric="minisblack")
    assert open_image(tmp_path / "c.tif").channels == expected


def test_fewer_names_than_channels_name_the_first(tmp_path: Path) -> None:
    assert name_channels(["DAPI"], 3) == ("DAPI", "channel 2", "channel 3")
    assert name_channels(["a", "b"], 1) == ("channel 1",)


@given(st.lists(WORDS, max_size=8), st.integers(0, 4))
def test_channel_names_are_kept_different_and_stable(names: list[str], more: int) -> None:
    found = name_channels(names, len(names) + more)
    assert len(set(found)) == len(found) == len(names) + more
    assert name_channels(found, len(found)) == found
    stripped = [name.strip() for name in names]
    for at, name in enumerate(stripped):
        if name and name not in stripped[:at]:
            assert found[at] == name


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("DAPI", [1]),
        ("dapi", [0]),
        ("Dapi", [0, 1]),
        ("w1", [2]),
        ("GFP", [4]),
        ("Alexa", [5, 6]),
        ("488", [5]),
        ("w10", []),
        ("", []),
    ],
)
def test_exact_names_come_first_and_parts_last(name: str, positions: list[int]) -> None:
    available = ["dapi", "DAPI", "w1 red", "w11", "anti-GFP", "Alexa 488", "Alexa 568"]
    assert matching_channels(name, available) == positions


def test_a_name_that_fits_two_channels_is_refused(tmp_path: Path) -> None:
    path = write_ome(tmp_path / "a.ome.tif", ["Alexa 488", "Alexa 568", "DAPI"])
    with pytest.raises(InputError, match=r"several channels.*'alexa'.*'Alexa 488', 'Alexa 568'"):
        open_image(path, InputSettings(channels=["alexa"])).data.compute()
    assert open_image(path, InputSettings(channels=["568", "dapi"])).channels == ("Alexa 568", "DAPI")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # MetaXpress: each file has an id of its own, and so has each thumbnail.
        (
            [f"p_A01_s{s}_w{w}{GUIDS[2 * s + w - 3]}.tif" for s in (1, 2) for w in (1, 2)],
            {"p_A01_s1": ("w1", "w2"), "p_A01_s2": ("w1", "w2")},
        ),
        (
            [f"p_A01_s{s}_w{w}_{{{GUIDS[2 * s + w - 3].lower()}}}.tif" for s in (1, 2) for w in (1, 2)],
            {"p_A01_s1": ("w1", "w2"), "p_A01_s2": ("w1", "w2")},
        ),
        (
            [f"{HEX[k]}_s1_{name}.tif" for k, name in enumerate(("red", "green"))],
            {"s1": ("red", "green")},
        ),
        ([f"s1_{HEX[k]}{k}_w{k}.tif" for k in (1, 2)], {"s1": ("w1", "w2")}),
        ([f"s1_w{k}{HEX[k]}.tif" for k in (1, 2)], {"s1": ("w1", "w2")}),
        # An id that tells images apart is part of their name.
        (
            [f"{GUIDS[k]}_{name}.tif" for k in (0, 1) for name in ("red", "green")],
            {GUIDS[0]: ("red", "green"), GUIDS[1]: ("red", "green")},
        ),
        ([f"{GUIDS[k]}_red.tif" for k in (0, 1)], {f"{GUIDS[k]}_red": None for k in (0, 1)}),
        (
            [f"{GUIDS[2 * k + j]}_{n}.tif" for k in (0, 1) for j, n in enumerate(("red", "green"))],
            {f"{GUIDS[2 * k + j]}_{n}": None for k in (0, 1) for j, n in enumerate(("red", "green"))},
        ),
        ([f"{id}.png" for id in HEX], dict.fromkeys(HEX)),
        # InCell
        (
            [f"A - 01(fld {f} wv {w}).tif" for f in (1, 2) for w in ("DAPI - DAPI", "Green - dsRed")],
            {f"A - 01(fld {f}_)": ("DAPI - DAPI", "Green - dsRed") for f in (1, 2)},
        ),
        # scanR
        (
            [f"nuclei--W00001--P00001--Z00000--T00000--{c}.tif" for c in ("DAPI", "Alexa 488")],
            {"nuclei--W00001--P00001--Z00000--T00000": ("Alexa 488", "DAPI")},
        ),
        # Yokogawa CV7000: the action counts with the channel, planes and time points do not
        (
            [
                f"P_A01_T0001F00{f}L01A0{c}Z0{z}C0{c}.tif"
                for f in (1, 2) for z in (1, 2) for c in (1, 2)
            ],
            {f"P_A01_T0001F00{f}L01Z0{z}": ("C01", "C02") for f in (1, 2) for z in (1, 2)},
        ),
        ([f"W0001F0001T0001Z001C{c}.tif" for c in (1, 2)], {"W0001F0001T0001Z001": ("C1", "C2")}),
        # Cytation
        (
            [f"{w}_02_{c}_1_{n}_001.tif" for w in ("B2", "B3") for c, n in ((1, "DAPI"), (2, "GFP"))],
            {f"{w}_02_1_001": ("DAPI", "GFP") for w in ("B2", "B3")},
        ),
        # Leica, Zeiss, Nikon, Olympus
        (
            [f"s_z0{z}_ch0{c}.tif" for z in (0, 1) for c in (0, 1)],
            {f"s_z0{z}": ("ch00", "ch01") for z in (0, 1)},
        ),
        ([f"s_c{c}_ORG.tif" for c in (1, 2)], {"s_ORG": ("c1", "c2")}),
        ([f"s_xy1c{c}t01.tif" for c in (1, 2)], {"s_xy1_t01": ("c1", "c2")}),
        ([f"s_C00{c}T001.tif" for c in (1, 2)], {"s_T001": ("C001", "C002")}),
        # Micro-Manager 2
        (
            [f"img_channel00{c}_position000_time000000000_z00{z}.tif" for c in (0, 1) for z in (0, 1)],
            {
                f"img_position000_time000000000_z00{z}": ("channel000", "channel001")
                for z in (0, 1)
            },
        ),
        # MetaMorph
        (
            [f"e_w{c}_s{s}_t1.TIF" for c in ("1DAPI", "2CSU 488") for s in (1, 2)],
            {f"e_s{s}_t1": ("w1DAPI", "w2CSU 488") for s in (1, 2)},
        ),
        # BD Pathway
        ([f"{c} - n000000.tif" for c in ("DAPI", "FITC")], {"n000000": ("DAPI", "FITC")}),
        # planes and time points alone are no channels
        ([f"s_z0{k}.tif" for k in range(3)], {f"s_z0{k}": None for k in range(3)}),
        ([f"s_t0{k}.tif" for k in range(3)], {f"s_t0{k}": None for k in range(3)}),
        ([f"i_channel000_z00{k}.tif" for k in range(3)], {f"i_channel000_z00{k}": None for k in range(3)}),
    ],
)  # fmt: skip
def test_names_as_instruments_write_them(files: list[str], expected: dict[str, object]) -> None:
    assert {one.name: one.channels for one in file_sets_by_name(files)} == expected


def test_the_word_of_a_channel_takes_its_file(tmp_path: Path) -> None:
    for value, (c, k) in enumerate([(2, 1), (1, 2)], 1):
        name = f"p_A01_s1_w{c}{GUIDS[k]}.tif"
        tifffile.imwrite(tmp_path / name, np.full((20, 30), value, np.uint8))
    (source,) = find_images(tmp_path)
    assert open_image(source).data[:, 0, 0].compute().tolist() == [2, 1]
