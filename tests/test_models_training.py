"""Training: tiles are true, it learns, it survives a kill, it refuses what it cannot use."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from skimage.io import imsave

from daskcell import models
from daskcell.errors import ImageError, InputError, WeightsError
from daskcell.models import arrays, training
from daskcell.models.segmenter_augment import tile
from daskcell.models.segmenter_data import draw_samples, make_sample, read_folder
from daskcell.models.segmenter_training import Recipe, picture_weights, segmenter_loss, train_segmenter
from daskcell.models.unet import KIND, TinyUNet

SMALL = Recipe(
    steps=8,
    batch=2,
    side=64,
    generated=1,
    generated_side=96,
    widths=(4, 8),
    blocks=(1,),
    warmup=2,
    average=0.5,
)


@pytest.fixture(scope="module")
def sample():
    return next(iter(draw_samples(1, seed=1, side=256)))


def discs(shape=(200, 240), radius=12):
    """Labels and a grey picture of discs."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, np.int32)
    for i, (cy, cx) in enumerate([(40, 40), (40, 120), (110, 70), (150, 180), (60, 200)], start=1):
        labels[np.hypot(y - cy, x - cx) < radius] = i
    return labels, np.where(labels > 0, 200, 20).astype(np.uint8)


def test_tile_depends_on_its_seed_only(sample):
    a, b = (tile(sample, np.random.default_rng(5), 96) for _ in range(2))
    c = tile(sample, np.random.default_rng(6), 96)
    assert np.array_equal(a[0], b[0])
    assert np.array_equal(a[1], b[1])
    assert not np.array_equal(a[0], c[0])
    assert a[0].dtype == a[1].dtype == np.float32


def test_turned_flows_still_lead_to_the_cells():
    """Whatever turn, mirror and scale a tile has: walking along its flows ends in one point per cell."""
    from cellpose import dynamics
    from skimage.measure import label

    labels, grey = discs()
    disc_sample = make_sample("discs", grey[None], labels, "all", "grey")
    checked = 0
    for seed in range(12):
        _, y = tile(disc_sample, np.random.default_rng(seed), 160)
        truth = label(y[2] > 0)
        if truth.max() == 0:
            continue
        found = dynamics.compute_masks(5 * y[:2], 12 * y[2] - 6, niter=200, flow_threshold=0.4)
        for i in range(1, truth.max() + 1):
            inside = truth == i
            whole = not (inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any())
            if whole and inside.sum() > 80:
                ids = found[inside]
                assert np.mean(ids == np.bincount(ids).argmax()) > 0.9
                assert ids.max() > 0
                checked += 1
    assert checked > 10


def test_flows_are_unit_vectors_in_cells_and_zero_outside(sample):
    _, y = tile(sample, np.random.default_rng(0), 128)
    length = np.hypot(y[0], y[1])
    assert np.median(length[y[2] > 0]) == pytest.approx(1, abs=0.05)
    assert not length[y[2] == 0].any()


def test_beyond_the_picture_tiles_are_zero_as_cellpose_pads():
    small = np.full((40, 40), 100, np.uint8)
    small[10:30, 10:30] = 200
    one = make_sample("small", small[None], (small == 200).astype(int), "all", "grey")
    for seed in range(6):
        x, y = tile(one, np.random.default_rng(seed), 192)
        corners = [x[:, 0, 0], x[:, 0, -1], x[:, -1, 0], x[:, -1, -1]]
        assert any(not c.any() for c in corners)
        assert np.isfinite(x).all()
        assert np.isfinite(y).all()


def test_scales_are_wide_around_thirty_pixels(sample):
    """Cells in tiles are between 0.4 and 1.65 times 30 pixels across, and about 30 in the middle."""
    labels, grey = discs(radius=15)
    disc_sample = make_sample("discs", grey[None], labels, "all", "grey")
    from skimage.measure import regionprops

    sizes = []
    for seed in range(60):
        _, y = tile(disc_sample, np.random.default_rng(seed), 224)
        from skimage.measure import label

        for p in regionprops(label(y[2] > 0)):
            b = p.bbox
            if b[0] > 0 and b[1] > 0 and b[2] < 224 and b[3] < 224 and p.solidity > 0.9:
                sizes.append(p.equivalent_diameter_area / 30)
    assert len(sizes) > 60
    assert min(sizes) < 0.6
    assert max(sizes) > 1.3
    assert min(sizes) > 0.35
    assert max(sizes) < 1.7
    assert 0.75 < np.median(sizes) < 1.2


def test_cells_removed_from_the_labels_are_no_cells():
    labels, grey = discs()
    labels[labels == 2] = 0
    one = make_sample("gap", grey[None], labels, "all", "grey")
    assert len(one.centres) == 4
    assert one.labels.max() == 4
    assert one.diameter == pytest.approx(24, abs=0.5)
    assert make_sample("none", grey[None], np.zeros_like(labels), "all", "grey") is None


def test_groups_are_balanced(sample):
    import dataclasses

    def of(group):
        return dataclasses.replace(sample, group=group)

    weights = picture_weights([of("a")] * 4 + [of("b")] + [of("generated")] * 5, 0.3)
    assert weights.sum() == pytest.approx(1)
    assert weights[5:].sum() == pytest.approx(0.3)
    assert weights[:4].sum() / weights[4] == pytest.approx(2)


def test_loss_is_least_for_the_truth():
    truth = torch.zeros(1, 3, 8, 8)
    truth[:, 0, 2:5, 2:5], truth[:, 2, 2:5, 2:5] = 1, 1
    right = torch.cat([5 * truth[:, :2], 20 * truth[:, 2:] - 10], 1)
    assert float(segmenter_loss(right, truth)) < 1e-3
    assert float(segmenter_loss(-right, truth)) > 1


def test_training_learns_and_gives_usable_weights(tmp_path):
    recipe = Recipe(
        steps=60, batch=4, side=64, generated=2, generated_side=128, widths=(8, 16, 24), blocks=(1, 1),
        warmup=5, average=0.8, rate=5e-3,
    )  # fmt: skip
    done = train_segmenter([], tmp_path, recipe, report=lambda line: None)
    assert done.steps == 60
    assert "step 60" in arrays.load_arrays(done.path, KIND)[2]
    trained = models.load_network(done.path)
    assert trained.widths == (8, 16, 24)
    fresh = TinyUNet((8, 16, 24), (1, 1)).eval()
    unseen = list(draw_samples(2, seed=99, side=128))
    tiles = [tile(unseen[i % 2], np.random.default_rng(i), 64) for i in range(8)]
    x, truth = (torch.from_numpy(np.stack(part)) for part in zip(*tiles, strict=True))
    with torch.no_grad():
        losses = [float(segmenter_loss(net(x)[0], truth)) for net in (trained, fresh)]
    assert losses[0] < 0.85 * losses[1]


def test_interrupted_training_equals_an_undisturbed_one(tmp_path):
    whole = train_segmenter([], tmp_path / "whole", SMALL, report=lambda line: None)
    half = Recipe(**{**vars(SMALL), "steps": 4})
    # The schedule looks at the share done: the first half is stopped by hand, as a kill would.
    from daskcell.models.training import Trainer

    class Stop(Exception):
        pass

    original = Trainer._learn

    def until_four(self, loss_of, done):
        if self.step == half.steps:
            self.save()
            raise Stop
        original(self, loss_of, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_learn", until_four)
        with pytest.raises(Stop):
            train_segmenter([], tmp_path / "parts", SMALL, report=lambda line: None)
    parts = train_segmenter([], tmp_path / "parts", SMALL, report=lambda line: None)
    assert parts.steps == whole.steps == 8
    assert models.network_fingerprint(parts.path) == models.network_fingerprint(whole.path)


@pytest.mark.slow
def test_killed_training_continues(tmp_path):
    code = (
        "from daskcell.models.segmenter_training import *\n"
        "r = Recipe(steps=100000, batch=1, side=32, generated=1, generated_side=64, widths=(4, 8),\n"
        "           blocks=(1,), save_minutes=0.01)\n"
        f"train_segmenter([], {str(tmp_path)!r}, r)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert done > 0
    models.load_network(tmp_path / "segmenter.npz")
    (tmp_path / ".daskcell-0123abcd.tmp").touch()  # killed while it wrote
    recipe = Recipe(
        steps=done + 3,
        batch=1,
        side=32,
        generated=1,
        generated_side=64,
        widths=(4, 8),
        blocks=(1,),
        save_minutes=0.01,
    )
    assert train_segmenter([], tmp_path, recipe, report=lambda line: None).steps == done + 3
    assert not list(tmp_path.glob("*.tmp"))


def test_bfloat16_is_used_where_the_processor_has_it_or_it_is_asked_for(monkeypatch):
    for has in (False, True):
        monkeypatch.setattr(training, "has_bfloat16", lambda device, has=has: has)
        for wanted, used in ((None, has), (False, False), (True, True)):
            with Recipe(bfloat16=wanted).autocast():
                product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert product.dtype == (torch.bfloat16 if used else torch.float32)


def test_finished_training_is_not_repeated(tmp_path):
    train_segmenter([], tmp_path, SMALL, report=lambda line: None)
    lines: list[str] = []
    again = train_segmenter([], tmp_path, SMALL, report=lines.append)
    assert again.steps == 8
    assert not lines


def test_checkpoint_of_other_settings_or_damaged_is_refused(tmp_path):
    train_segmenter([], tmp_path, SMALL, report=lambda line: None)
    with pytest.raises(WeightsError, match="another batch and seed"):
        train_segmenter([], tmp_path, Recipe(**{**vars(SMALL), "seed": 1, "batch": 3}))
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="cannot be read"):
        train_segmenter([], tmp_path, SMALL)


@pytest.fixture
def folder(tmp_path):
    labels, grey = discs()
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    imsave(tmp_path / "images" / "lab_1.png", grey, check_contrast=False)
    imsave(tmp_path / "masks" / "lab_1.tif", labels.astype(np.uint16), check_contrast=False)
    return tmp_path


def test_a_folder_of_pictures_and_masks_is_read(folder):
    (one,) = read_folder(folder)
    assert (one.name, one.kind, one.group) == ("lab_1", "grey", "lab")
    assert len(one.centres) == 5
    assert train_segmenter([folder], folder / "out", SMALL, report=lambda line: None).steps == 8


@pytest.mark.parametrize("fault", ["no pictures", "no mask", "other size", "unreadable", "no cell"])
def test_unusable_folders_are_refused_by_name(folder, fault):
    mask = folder / "masks" / "lab_1.tif"
    if fault == "no pictures":
        (folder / "images" / "lab_1.png").unlink()
    elif fault == "no mask":
        mask.unlink()
    elif fault == "other size":
        imsave(mask, np.ones((5, 5), np.uint16), check_contrast=False)
    elif fault == "unreadable":
        mask.write_bytes(b"II*\x00torn")
    else:
        imsave(mask, np.zeros((200, 240), np.uint16), check_contrast=False)
    kind = ImageError if fault == "unreadable" else InputError
    with pytest.raises(kind, match=str(folder)):
        read_folder(folder)


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing to train on"):
        train_segmenter([], tmp_path, Recipe(**{**vars(SMALL), "generated": 0}))
