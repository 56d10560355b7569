"""The embedded encoder: its contract, what it sees, that it tells cells apart, and its training."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler

from daskcell import models
from daskcell.errors import InputError, WeightsError
from daskcell.evaluation.generated import synthesize_field
from daskcell.features.cell_index import block_records
from daskcell.features.crops import background_sample, crop_batches, fit_framing
from daskcell.geometry import Box

SMALL = {"steps": 4, "batch": 16, "widths": (8, 8, 8, 8), "dim": 12, "warmup": 1}


@pytest.fixture(scope="module")
def cells():
    """Crops ``(n, 3, 64, 64)`` of generated cells no training saw, as the product cuts them, and types."""
    crops, types = [], []
    for seed in (70_000, 70_001):
        field = synthesize_field((512, 512), seed=seed)
        c = field.channels.astype(np.float32)
        image = np.stack([c[0], c[1] + c[3], c[2] + c[3]])
        low, high = np.percentile(image, [1, 99.8], axis=(1, 2), keepdims=True)
        image = np.clip((image - low) / (high - low), 0, 1).astype(np.float32)
        border = np.unique(
            np.concatenate([field.labels[e].ravel() for e in (np.s_[[0, -1]], np.s_[:, [0, -1]])])
        )
        records = block_records(field.labels)
        records = records[~np.isin(records["label"], border)]
        framing = fit_framing([background_sample(image, field.labels, 1)], size=64)
        cut = crop_batches(image, field.labels, Box(0, 0, 512, 512), records, framing)
        crops.append(np.rint(np.concatenate(list(cut)) * 255).astype(np.uint8))
        types.append(field.types[records["label"].astype(int) - 1])
    return np.concatenate(crops), np.concatenate(types)


@pytest.fixture(scope="module")
def tiny():
    return models.load_encoder("tiny")


def test_gives_a_vector_per_cell(tiny, cells):
    import torch

    from daskcell.models.crop_signal import as_input, signal_of

    x = as_input(cells[0][:5])
    with torch.no_grad():
        vectors = tiny(x)
        maps = tiny.stages(signal_of(x))
    assert vectors.shape == (5, tiny.dim)
    assert vectors.dtype == torch.float32
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 4]
    assert tiny.size == 64
    assert tiny.mean is None
    assert tiny.std is None


@pytest.mark.parametrize("size", [16, 40, 64, 100])
def test_takes_any_size(tiny, size):
    import torch

    assert torch.isfinite(tiny(torch.rand(2, 3, size, size))).all()


def test_a_blank_crop_gives_finite_numbers(tiny):
    import torch

    for level in (0.0, 0.5, 1.0):
        assert torch.isfinite(tiny(torch.full((1, 3, 64, 64), level))).all()


def test_a_cells_vector_does_not_depend_on_the_cells_beside_it(tiny, cells):
    import torch

    from daskcell.models.crop_signal import as_input

    x = as_input(cells[0][:8])
    with torch.no_grad():
        assert torch.allclose(tiny(x)[3], tiny(x[3:4])[0], atol=1e-4)


def test_signal_is_light_above_dark_and_density_below_bright():
    import torch

    from daskcell.models.crop_signal import signal_of

    x = torch.full((1, 3, 20, 20), 0.1)
    x[:, :, 8:12, 8:12] = 1.0
    s = signal_of(x)
    assert s[0, 0, 0, 0] == 0
    assert s[0, 0, 9, 9] == pytest.approx(1.0)
    x = torch.full((1, 3, 20, 20), 0.9)
    x[:, :, 8:12, 8:12] = 0.9 / 5
    s = signal_of(x)
    assert s[0, 0, 0, 0] == 0
    assert s[0, 0, 9, 9] == pytest.approx(1.0, abs=1e-5)


def test_lamp_brightness_does_not_change_stained_cells(tiny):
    """The background's level cancels in the density."""
    import torch

    rng = np.random.default_rng(0)
    density = np.zeros((3, 64, 64), np.float32)
    density[:, 16:48, 16:48] = rng.uniform(0.3, 1.0, (3, 32, 32))
    bright, dim = (torch.from_numpy(level * np.exp(-density))[None] for level in (0.95, 0.76))
    with torch.no_grad():
        a, b, zero = tiny(bright), tiny(dim), tiny(torch.ones(1, 3, 64, 64))
    assert (a - b).norm() < 0.02 * (a - zero).norm()


def test_regions_split_the_cell():
    import torch

    from daskcell.models.crop_signal import cell_regions

    x = torch.zeros(1, 3, 32, 32)
    x[:, :, 8:24, 8:24] = 0.2
    x[:, :, 12:18, 12:18] = 1.0
    cell, core, rest = cell_regions(x)[0]
    assert cell.sum() == 256
    assert torch.allclose(core + rest, cell)
    assert core[14, 14] > 0.9
    assert core[9, 9] < 0.3


@pytest.mark.slow
def test_outputs_weigh_about_the_same(cells):
    """Standardising the encoder's outputs must not amount to whitening."""
    import torch

    from daskcell.models.crop_signal import as_input
    from daskcell.models.encoder import TinyEncoder, fit_projection

    torch.manual_seed(0)
    net = TinyEncoder((8, 8, 16, 16), dim=24).eval()
    fit_projection(net, cells[0])
    with torch.no_grad():
        spread = net(as_input(cells[0])).std(0)
    assert spread.max() / spread.min() < 5
    assert torch.allclose(net.turn @ net.turn.T, torch.eye(24), atol=1e-4), "lengths and angles are kept"


@pytest.mark.slow
def test_both_blocks_weigh_the_same(tiny, cells):
    import torch

    from daskcell.models.crop_measurements import measure_signal
    from daskcell.models.crop_signal import as_input, signal_of

    signal = signal_of(as_input(cells[0][:100]))
    with torch.no_grad():
        blocks = tiny.maps(tiny.pooled(signal)), tiny.measurements(measure_signal(signal))
    lengths = [float((b**2).sum(1).mean()) for b in blocks]
    assert 0.4 < lengths[0] / lengths[1] < 2.5


@pytest.mark.slow
def test_groups_generated_cells_by_type(tiny, cells):
    import torch

    from daskcell.models.crop_signal import as_input

    crops, types = cells
    with torch.no_grad():
        vectors = tiny(as_input(crops)).numpy()
    x = PCA(32, random_state=0).fit_transform(StandardScaler().fit_transform(vectors))
    found = KMeans(11, n_init=5, random_state=0).fit_predict(x)
    assert adjusted_rand_score(types, found) > 0.85


@pytest.mark.slow
def test_neighbours_are_mostly_of_one_type(cells):
    from daskcell.models.crop_measurements import MEASUREMENTS
    from daskcell.training.encoder import measure_crops, neighbours

    crops, types = cells
    features = measure_crops(crops)
    assert features.shape == (len(crops), MEASUREMENTS)
    near = neighbours(features, 6)
    assert near.shape == (len(crops), 6)
    assert not (near == np.arange(len(crops))[:, None]).any()
    assert np.mean(types[near] == types[:, None]) > 0.9


def test_neighbours_of_known_points():
    from daskcell.training.encoder import neighbours

    points = np.array([[0, 0], [0, 1.0], [10, 0], [10, 1.1], [-10, 5], [-10, 6.5]])
    assert neighbours(points, 1)[:, 0].tolist() == [1, 0, 3, 2, 5, 4]


def test_altered_views_keep_background_and_size(cells):
    import torch

    from daskcell.models.crop_signal import as_input, cell_regions, signal_of
    from daskcell.training.encoder import alter

    signal = signal_of(as_input(cells[0][:32]))
    view = alter(signal, np.random.default_rng(0))
    assert view.shape == signal.shape
    assert not torch.equal(view, signal)
    assert torch.equal(view, alter(signal, np.random.default_rng(0)))
    areas = [cell_regions(s)[:, 0].sum((1, 2)) for s in (signal, view)]
    assert float((areas[1] / areas[0]).median()) == pytest.approx(1, abs=0.15)
    assert (view == 0).float().mean() > 0.3


@pytest.mark.slow
def test_training_gives_a_usable_encoder_and_continues(tmp_path, cells):
    import torch

    from daskcell.models.crop_signal import as_input
    from daskcell.training.encoder import EncoderRecipe, train_encoder

    crops = cells[0][:80]
    lines: list[str] = []
    done = train_encoder(crops, tmp_path / "a", EncoderRecipe(**SMALL), report=lines.append)
    assert done.steps == 4
    net = models.load_encoder(done.path)
    with torch.no_grad():
        assert net(as_input(crops[:3])).shape == (3, 12)
    longer = EncoderRecipe(**{**SMALL, "steps": 6})
    assert train_encoder(crops, tmp_path / "a", longer, report=lines.append).steps == 6
    assert any("from step 4" in line for line in lines)
    with pytest.raises(WeightsError, match="another"):
        train_encoder(crops, tmp_path / "a", EncoderRecipe(**{**SMALL, "neighbours": 3}))


@pytest.mark.slow
def test_training_repeats_bit_for_bit(tmp_path, cells):
    from daskcell.training.encoder import EncoderRecipe, train_encoder

    sets, recipe = [cells[0][:60], cells[0][60:100]], EncoderRecipe(**SMALL)
    prints = [
        models.encoder_fingerprint(
            train_encoder(sets, tmp_path / name, recipe, report=lambda line: None).path
        )
        for name in "ab"
    ]
    assert prints[0] == prints[1]


@pytest.mark.slow
def test_training_pulls_neighbours_together(tmp_path, cells):
    from daskcell.training.encoder import EncoderRecipe, train_encoder

    recipe = EncoderRecipe(steps=40, batch=32, widths=(8, 16, 16, 16), dim=16, warmup=4, rate=3e-3)
    done = train_encoder(cells[0], tmp_path, recipe, report=lambda line: None)
    assert done.loss < np.log(2 * 32 - 1) - 0.3, "no better than chance"


@pytest.mark.parametrize("shape", [(10, 3, 64, 64), (40, 1, 64, 64), (40, 64, 64)])
def test_wrong_crops_are_refused(tmp_path, shape):
    from daskcell.training.encoder import train_encoder

    with pytest.raises(InputError):
        train_encoder(np.zeros(shape, np.uint8), tmp_path)
