"""Vectors equal the bare network's on the same crops, and do not depend on chunks, batches or neighbours."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daskcell.errors import InputError, WeightsError
from daskcell.features import embed, encoders
from daskcell.features.cell_index import block_records
from daskcell.features.crops import Framing, crop_batches
from daskcell.features.encoders import Encoder, as_encoder, encoder_spec
from daskcell.geometry import Box


def field(cells: int = 5, side: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.zeros((cells * side, cells * side), np.uint32)
    numbers = rng.permutation(cells * cells) + 1
    for number, (y, x) in zip(numbers, np.ndindex(cells, cells), strict=True):
        h, w = rng.integers(5, side, 2)
        labels[y * side : y * side + h, x * side : x * side + w] = number
    return rng.random((3, *labels.shape)).astype(np.float32), labels


def small_network():
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 33),
    ).eval()


def plain_crops(image: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    background = tuple(float(np.median(channel[labels == 0])) for channel in image)
    frame = Framing(size=size, low=(0.0,) * 3, high=(1.0,) * 3, background=background)
    box = Box(0, 0, *labels.shape)
    return np.concatenate(list(crop_batches(image, labels, box, block_records(labels), frame)))


@pytest.fixture
def weights_home(tmp_path, monkeypatch):
    """An empty cache of torchvision weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    encoders._load.cache_clear()
    return folder


def find_encoder_url(name: str) -> str:
    import torchvision

    return torchvision.models.get_model_weights(name).IMAGENET1K_V1.url


def save_random(name: str, folder):
    import torch
    import torchvision

    torch.manual_seed(1)
    model = torchvision.models.get_model(name, weights=None).eval()
    url = find_encoder_url(name)
    torch.save(model.state_dict(), folder / url.rsplit("/", 1)[-1])
    return model


@pytest.mark.parametrize(
    ("name", "pooled"), [("resnet18", 512), pytest.param("resnet152", 2048, marks=pytest.mark.slow)]
)
def test_equals_torchvision_on_the_same_crops(weights_home, name, pooled):
    import torch
    import torchvision

    model = save_random(name, weights_home)
    image, labels = field(2)
    crops = plain_crops(image, labels, 224)
    recipe = torchvision.models.get_model_weights(name).IMAGENET1K_V1.transforms()
    tensor = torchvision.transforms.functional.normalize(torch.from_numpy(crops), recipe.mean, recipe.std)
    with torch.inference_mode():
        expected = model(tensor).numpy()
        model.fc = torch.nn.Identity()
        before_last = model(tensor).numpy()
    got = embed(image, labels, name, batch_size=4)
    assert got.dtype == np.float32
    assert got.shape == (4, 1000)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    got = embed(image, labels, name, layer="pool", batch_size=4)
    assert got.shape == (4, pooled)
    np.testing.assert_allclose(got, before_last, rtol=1e-4, atol=1e-4 * np.abs(before_last).max())


def test_missing_weights_are_refused_before_any_work(weights_home):
    def never(block):
        raise AssertionError("the image was looked at")

    labels = da.ones((10, 10), chunks=5, dtype=np.uint32).map_blocks(never, dtype=np.uint32)
    with pytest.raises(WeightsError, match="daskcell weights fetch resnet152"):
        embed(np.zeros((3, 10, 10)), labels, "resnet152")


def test_weights_of_another_network_are_refused(weights_home):
    save_random("resnet18", weights_home)
    url = find_encoder_url("resnet34")
    next(weights_home.iterdir()).rename(weights_home / url.rsplit("/", 1)[-1])
    with pytest.raises(WeightsError, match="does not hold the weights of resnet34"):
        embed(*field(2), "resnet34")


def test_a_pickle_in_place_of_weights_is_not_run(weights_home, tmp_path):
    import torch

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    url = find_encoder_url("resnet18")
    torch.save({"fc.weight": Trap()}, weights_home / url.rsplit("/", 1)[-1])
    with pytest.raises(WeightsError):
        embed(*field(2), "resnet18")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["net.pt", "net.pt2", "net.pth", "net"])
def test_files_that_may_hold_code_are_refused_with_the_way_to_convert_them(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(WeightsError, match=r"hold code.*save_file.*'resnet50@weights\.safetensors'") as error:
        encoder_spec(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.slow
def test_weights_of_your_own_come_with_the_name_of_their_network(tmp_path):
    """As the refusal of other files says to save them; with as many outputs as they have."""
    import torch
    import torchvision
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7).eval()
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    with pytest.raises(WeightsError, match="without their network"):
        encoder_spec(file)
    with pytest.raises(WeightsError, match="does not hold the weights of resnet34"):
        embed(*field(2), f"resnet34@{file}")
    with pytest.raises(WeightsError, match="There is no file"):
        encoder_spec(f"resnet18@{tmp_path / 'other.safetensors'}")
    image, labels = field(2)
    crops = plain_crops(image, labels, 224)
    recipe = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    tensor = torchvision.transforms.functional.normalize(torch.from_numpy(crops), recipe.mean, recipe.std)
    with torch.inference_mode():
        expected = model(tensor).numpy()
    np.testing.assert_allclose(embed(image, labels, f"resnet18@{file}", batch_size=4), expected, atol=1e-4)
    assert embed(image, labels, f"resnet18@{file}", layer="pool", batch_size=4).shape == (4, 512)


@pytest.mark.slow
def test_timm_networks_take_weights_from_a_file(tmp_path, monkeypatch):
    import torch
    import torchvision

    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    monkeypatch.setenv("DASKCELL_WEIGHTS", str(tmp_path))
    image, labels = field(2)
    with pytest.raises(WeightsError, match=r"huggingface\.co/timm/resnet10t.*resnet10t\.safetensors"):
        embed(image, labels, "timm:resnet10t")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False).eval()
    (tmp_path / "timm").mkdir()
    save_file(model.state_dict(), tmp_path / "timm" / "resnet10t.safetensors")
    recipe = timm.data.resolve_model_data_config(model)
    crops = plain_crops(image, labels, recipe["input_size"][1])
    tensor = torchvision.transforms.functional.normalize(
        torch.from_numpy(crops), recipe["mean"], recipe["std"]
    )
    with torch.inference_mode():
        expected = model(tensor).numpy()
    np.testing.assert_allclose(embed(image, labels, "timm:resnet10t", batch_size=4), expected, atol=1e-4)
    assert embed(image, labels, "timm:resnet10t", layer="pool", batch_size=4).shape == (4, 512)


@pytest.mark.slow
def test_bfloat16_is_near_and_for_networks_only(weights_home):
    save_random("resnet18", weights_home)
    image, labels = field(2)
    exact = embed(image, labels, "resnet18", batch_size=4)
    near = embed(image, labels, "resnet18", batch_size=4, precision="bfloat16")
    assert near.dtype == np.float32
    assert not np.array_equal(near, exact)
    assert np.abs(near - exact).max() < 0.05 * np.abs(exact).max()
    assert embed(image, labels, "resnet18", pooling="mask", precision="bfloat16").shape == (4, 1920)
    with pytest.raises(InputError, match="precision is for networks"):
        embed(image, labels, lambda batch: batch[:, 0, 0], precision="bfloat16")


def test_an_encoder_that_fails_while_crops_are_cut_ahead_says_why():
    def cut():
        yield np.zeros((3, 4, 4), np.float32)
        raise ValueError("no more pixels")

    with pytest.raises(ValueError, match="no more pixels"):
        list(Encoder("test", lambda batch: batch[:, 0, 0], size=4, batch_size=1).stream(cut()))


@pytest.mark.parametrize("name", ["resnet5", "imagenet", "lraspp_mobilenet_v3_large"])
def test_unknown_names_are_refused(name):
    with pytest.raises(WeightsError, match="There is no encoder"):
        encoder_spec(name)


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(WeightsError, match=r"no encoder file nowhere\.pt"):
        encoder_spec("nowhere.pt")


@pytest.mark.slow
@given(st.integers(15, 120), st.integers(15, 120), st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_no_bit_depends_on_the_chunks(rows, columns, planes):
    image, labels = field()
    network = small_network()
    expected = embed(image, labels, network, size=32, batch_size=8)
    cut = embed(
        da.from_array(image, chunks=(planes, columns, rows)),
        da.from_array(labels, chunks=(rows, columns)),
        network,
        size=32,
        batch_size=8,
    )
    np.testing.assert_array_equal(cut, expected)


def test_without_a_fixed_batch_bits_would_depend_on_it():
    """Control: the reason for padding."""
    import torch

    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 100)
    inputs = torch.rand(64, 512)
    with torch.inference_mode():
        assert not all(torch.equal(layer(inputs[:n])[0], layer(inputs)[0]) for n in (1, 2, 3, 5, 8, 31))


def test_a_module_and_a_function_agree():
    import torch

    image, labels = field()
    network = small_network()
    crops = plain_crops(image, labels, 40)
    with torch.inference_mode():
        expected = network(torch.from_numpy(crops)).numpy()

    def function(batch):
        assert batch.shape == (32, 3, 40, 40)
        with torch.inference_mode():
            return network(torch.from_numpy(batch)).numpy()

    for encoder in (network, function):
        np.testing.assert_allclose(embed(image, labels, encoder, size=40), expected, atol=1e-5)


def test_a_model_is_built_once_per_process(weights_home):
    save_random("resnet18", weights_home)
    spec = encoder_spec("resnet18")
    assert encoders.load(spec) is encoders.load(spec)
    assert encoders.load(spec) is not encoders.load(encoder_spec("resnet18", layer="pool"))


def test_replaced_weights_are_loaded_anew(weights_home):
    import torch

    save_random("resnet18", weights_home)
    before = encoder_spec("resnet18")
    file = next(weights_home.iterdir())
    state = torch.load(file, weights_only=True)
    state["fc.bias"] += 1
    torch.save(state, file)
    after = encoder_spec("resnet18")
    assert before.fingerprint != after.fingerprint


@pytest.mark.slow
def test_embed_runs_on_other_processes_when_there_is_a_client():
    from distributed import Client

    image, labels = field(3)
    chunked = da.from_array(image, chunks=(3, 40, 40)), da.from_array(labels, chunks=40)
    network = small_network()
    expected = embed(image, labels, network, size=32), embed(image, labels, "tiny")
    with Client(n_workers=1, threads_per_worker=1, dashboard_address=None):
        np.testing.assert_array_equal(embed(*chunked, network, size=32), expected[0])
        np.testing.assert_allclose(embed(*chunked, "tiny"), expected[1], atol=1e-4)


def test_the_network_sees_full_batches_only():
    sizes = []

    def function(batch):
        sizes.append((len(batch), int(batch.any(axis=(1, 2, 3)).sum())))
        return batch[:, 0, 0]

    encoder = Encoder("test", function, size=4, batch_size=8)
    portions = [np.ones((n, 3, 4, 4), np.float32) for n in (3, 7, 1, 9)]
    assert [len(out) for out in encoder.stream(crop for crops in portions for crop in crops)] == [8, 8, 4]
    assert sizes == [(8, 8), (8, 8), (8, 4)]


def test_batches_are_full_across_the_borders_of_blocks():
    image, labels = field()
    filled = []

    def function(batch):
        filled.append(int(batch.any(axis=(1, 2, 3)).sum()))
        return batch[:, 0, 0]

    chunked = da.from_array(image, chunks=(3, 24, 24)), da.from_array(labels, chunks=24)
    assert len(embed(*chunked, function, size=16, batch_size=8)) == 25
    assert filled == [8, 8, 8, 1], "25 blocks of one cell each"


def test_a_missing_label_is_a_row_of_nan_and_no_cell_gives_no_row():
    image, labels = np.ones((1, 30, 30)), np.zeros((30, 30), np.uint32)
    network = small_network()
    assert embed(image, labels, network, size=16).shape == (0, 33)
    labels[5:9, 5:9], labels[20:28, 20:28] = 1, 3
    vectors = embed(image, labels, network, size=16)
    assert np.isnan(vectors).all(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda batch: batch, "one vector per crop"),
        (lambda batch: batch[:1, 0, 0], "one vector per crop"),
    ],
)
def test_functions_that_give_something_else_are_refused(function, words):
    with pytest.raises(InputError, match=words):
        as_encoder(function, size=8)(np.zeros((2, 3, 8, 8), np.float32))


def test_the_embedded_encoder_tells_round_from_long_cells_by_shape_alone():
    labels = np.zeros((240, 240), np.uint32)
    for i in range(16):
        y, x = divmod(i, 4)
        h, w = (12, 36) if i % 2 else (22, 20)
        labels[y * 60 + 10 : y * 60 + 10 + h + i // 4, x * 60 + 10 : x * 60 + 10 + w] = i + 1
    image = np.where(labels > 0, 180, 10).astype(np.uint8)
    vectors = embed(image, labels, "tiny")
    assert len(vectors) == 16
    distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    same = np.arange(16)[:, None] % 2 == np.arange(16)[None] % 2
    assert distance[same & ~np.eye(16, dtype=bool)].max() < distance[~same].min()


@pytest.mark.slow
def test_no_bit_of_the_embedded_encoder_depends_on_the_chunks():
    image, labels = field()
    expected = embed(image, labels, "tiny")
    cut = embed(da.from_array(image, chunks=(3, 31, 50)), da.from_array(labels, chunks=(50, 31)), "tiny")
    np.testing.assert_array_equal(cut, expected)
