"""Files that other libraries read: real ones where a writer exists, and the sentence without the extra."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import tifffile

from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box
from daskcell.images import find_images, open_image
from daskcell.images.readers import Reader, extras, open_reader

RNG = np.random.default_rng(0)
CZI = b"ZISRAWFILE" + bytes(600)
ND2 = b"\xda\xce\xbe\x0a" + bytes(600)
LIF = b"\x70\0\0\0" + bytes(600)
DICOM = bytes(128) + b"DICM" + bytes(600)


def parts_agree(reader: Reader, expected: np.ndarray, level: int = 0) -> None:
    assert isinstance(reader, Reader)
    height, width = reader.levels[level]
    assert (len(reader.channels), height, width) == expected.shape
    np.testing.assert_array_equal(reader.read(level, Box(0, 0, height, width)), expected)
    np.testing.assert_array_equal(reader.read(level, Box(3, 5, 21, 17)), expected[:, 3:21, 5:17])
    assert reader.read(level, Box(0, 0, 1, 1)).dtype == reader.dtype
    with pytest.raises(InputError, match="not inside"):
        reader.read(level, Box(0, 0, height + 1, width))
    reader.close()


@pytest.mark.parametrize(
    ("name", "content", "extra"),
    [
        ("a.czi", CZI, "bioio"),
        ("a.nd2", ND2, "bioio"),
        ("a.lif", LIF, "bioio"),
        ("a.dcm", DICOM, "wsidicom"),
        ("a.mrxs", b"\xff\xd8\xff" + bytes(99), "openslide"),
    ],
)
def test_without_the_extra_a_sentence_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, extra: str
) -> None:
    for module in ("bioio", "wsidicom", "openslide"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=rf"{name}.*pip install 'daskcell\[{extra}\]'") as error:
        open_reader(tmp_path / name)
    assert "\n" not in str(error.value)
    assert [source.files[0] for source in find_images(tmp_path)] == [str(tmp_path / name)]


def test_what_is_no_such_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for name, content in (("a.dcm", DICOM), ("a.mrxs", b"\xff\xd8\xff" + bytes(99))):
        pytest.importorskip({"a.dcm": "wsidicom", "a.mrxs": "openslide"}[name])
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=name) as error:
            open_reader(tmp_path / name)
        assert "\n" not in str(error.value)


def test_openslide_reads_levels_and_parts(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    from daskcell.images.readers import openslide

    pixels = RNG.integers(0, 255, (300, 400, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        options = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
        writer.write(pixels, resolution=(40000, 20000), resolutionunit="CENTIMETER", **options)
        writer.write(pixels[::4, ::4].copy(), subfiletype=1, **options)
    reader = openslide.open(str(tmp_path / "a.tif"))
    assert reader.levels == ((300, 400), (75, 100))
    assert reader.pixel_size == pytest.approx((0.5, 0.25))
    assert reader.piece == (64, 64)
    np.testing.assert_array_equal(
        reader.read(1, Box(10, 20, 60, 90)), np.moveaxis(pixels[::4, ::4], 2, 0)[:, 10:60, 20:90]
    )
    parts_agree(reader, np.moveaxis(pixels, 2, 0))


def write_dicom(path: Path, pixels: np.ndarray, tile: int) -> None:
    """A whole slide picture in tiles, row by row, nothing compressed."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    height, width = pixels.shape[:2]
    down, across = -(-height // tile), -(-width // tile)
    filled = np.full((down * tile, across * tile, 3), 255, np.uint8)
    filled[:height, :width] = pixels
    tiles = filled.reshape(down, tile, across, tile, 3).swapaxes(1, 2)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "FrameOfReferenceUID": generate_uid(),
        "Modality": "SM",
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "Rows": tile,
        "Columns": tile,
        "TotalPixelMatrixRows": height,
        "TotalPixelMatrixColumns": width,
        "NumberOfFrames": down * across,
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "RGB",
        "PlanarConfiguration": 0,
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "DimensionOrganizationType": "TILED_FULL",
        "ImagedVolumeWidth": width * 0.5e-3,
        "ImagedVolumeHeight": height * 0.5e-3,
        "ImagedVolumeDepth": 0.001,
        "TotalPixelMatrixFocalPlanes": 1,
        "NumberOfOpticalPaths": 1,
        "FocusMethod": "AUTO",
        "ExtendedDepthOfField": "NO",
        "LossyImageCompression": "00",
        "VolumetricProperties": "VOLUME",
        "BurnedInAnnotation": "NO",
        "SpecimenLabelInImage": "NO",
    }
    data = Dataset()
    for name, value in values.items():
        setattr(data, name, value)
    measures = Dataset()
    measures.PixelSpacing = [0.0005, 0.0005]
    measures.SliceThickness = 0.001
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    optical = Dataset()
    optical.OpticalPathIdentifier = "0"
    data.OpticalPathSequence = [optical]
    data.PixelData = tiles.tobytes()
    data.file_meta = meta
    pydicom.dcmwrite(path, data, enforce_file_format=True)


def test_wsidicom_reads_parts(tmp_path: Path) -> None:
    pytest.importorskip("wsidicom")
    pixels = RNG.integers(0, 255, (200, 300, 3), np.uint8)
    write_dicom(tmp_path / "a.dcm", pixels, 64)
    reader = open_reader(tmp_path / "a.dcm")
    assert reader.pixel_size == pytest.approx((0.5, 0.5))
    assert reader.is_rgb
    assert reader.piece == (64, 64)
    parts_agree(reader, np.moveaxis(pixels, 2, 0))


def test_czi_is_read_by_bioio(tmp_path: Path) -> None:
    pytest.importorskip("bioio_czi")
    czi = pytest.importorskip("pylibCZIrw.czi")
    stack = RNG.integers(0, 4000, (2, 3, 100, 120), np.uint16)
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        for c in range(2):
            for z in range(3):
                file.write(data=stack[c, z][..., None], plane={"C": c, "Z": z, "T": 0})
        file.write_metadata(
            document_name="a", channel_names={0: "DAPI", 1: "GFP"}, scale_x=2.5e-7, scale_y=5e-7, scale_z=1e-6
        )
    reader = open_reader(tmp_path / "a.czi")
    assert reader.channels == ("DAPI", "GFP")
    assert reader.pixel_size == pytest.approx((0.5, 0.25))
    assert reader.sizes == {"t": 1, "z": 3}
    parts_agree(reader, stack.max(axis=1))
    parts_agree(open_reader(tmp_path / "a.czi", z=1), stack[:, 1])
    image = open_image(tmp_path / "a.czi")
    np.testing.assert_array_equal(image.data.compute(), stack.max(axis=1))


class StandIn:
    """What `bioio.BioImage` says of a file of two channels, three planes and two levels.

    ND2 and LIF have no free writer: what is tested of them is what daskcell makes of bioio's answers.
    """

    pixels = RNG.integers(0, 4000, (2, 2, 3, 40, 60), np.uint16)  # TCZYX

    scenes = ("First", "Second")

    def __init__(self, path: str) -> None:
        self.level = self.scene = 0
        self.dims = SimpleNamespace(order="TCZYX", T=2, C=2, Z=3, Y=40, X=60)
        self.dtype = np.dtype(">u2")
        self.channel_names = ["DAPI", "DAPI"]
        self.physical_pixel_sizes = SimpleNamespace(Z=1.0, Y=0.5, X=0.25)
        self.resolution_level_dims = {0: (2, 2, 3, 40, 60), 1: (2, 2, 3, 20, 30)}

    def set_scene(self, number: int) -> None:
        self.scene = number

    def set_resolution_level(self, level: int) -> None:
        self.level = level

    @property
    def dask_data(self):
        import dask.array as da

        step = 2**self.level
        return da.from_array(self.pixels[..., ::step, ::step] + self.scene, chunks=(1, 1, 1, 20, 30))


@pytest.mark.parametrize(("name", "content"), [("a.nd2", ND2), ("a.lif", LIF), ("a.czi", CZI)])
def test_time_planes_levels_and_names_of_bioio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    module = ModuleType("bioio")
    module.BioImage = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bioio", module)
    monkeypatch.setitem(sys.modules, "aicspylibczi", None)
    for plugin in ("bioio_czi", "bioio_nd2", "bioio_lif"):
        monkeypatch.setitem(sys.modules, plugin, ModuleType(plugin))
    (tmp_path / name).write_bytes(content)
    reader = open_reader(tmp_path / name, t=1)
    assert reader.levels == ((40, 60), (20, 30))
    assert reader.channels == ("DAPI", "DAPI 2")
    assert reader.sizes == {"t": 2, "z": 3}
    assert reader.pixel_size == (0.5, 0.25)
    np.testing.assert_array_equal(
        reader.read(1, Box(0, 0, 20, 30)), StandIn.pixels[1, :, :, ::2, ::2].max(axis=1)
    )
    parts_agree(reader, StandIn.pixels[1].max(axis=1))
    parts_agree(open_reader(tmp_path / name, z=2), StandIn.pixels[0, :, 2])
    second = open_reader(tmp_path / name, z=2, scene=1)
    assert second.scenes == ("First", "Second")
    parts_agree(second, StandIn.pixels[0, :, 2] + 1)
    for choice in ({"t": 2}, {"z": 3}, {"scene": 2}):
        with pytest.raises(InputError, match="there is none with number"):
            open_reader(tmp_path / name, **choice)


def test_what_the_built_in_readers_read_is_theirs(tmp_path: Path) -> None:
    """A TIFF slide is not given to OpenSlide, whatever its name."""
    tifffile.imwrite(tmp_path / "a.svs", np.zeros((20, 30, 3), np.uint8))
    assert type(open_reader(tmp_path / "a.svs")).__name__ == "TiffReader"
    assert {kind.name for kind in extras.KINDS} == {"openslide", "wsidicom", "bioio"}
