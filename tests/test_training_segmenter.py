"""Training: tiles are true, it learns, it survives a kill, it refuses what it cannot use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import test_images_reader_process
import tifffile
from skimage.io import imread, imsave

from daskcell import models
from daskcell.errors import ComputeError, ImageError, InputError, WeightsError
from daskcell.models import weights_file
from daskcell.training import segmenter_data
from daskcell.training.segmenter_data import (
    draw_membranes,
    draw_samples,
    list_sources,
    make_sample,
    read_samples,
)

SMALL = {
    "steps": 8, "batch": 2, "side": 64, "generated": 1, "generated_side": 96, "widths": (4, 8),
    "blocks": (1,), "warmup": 2, "average": 0.5,
}  # fmt: skip


evil = test_images_reader_process.evil


@pytest.fixture(scope="module")
def sample():
    return next(iter(draw_samples(1, seed=1, side=256)))


def discs(shape=(200, 240), radius=12):
    """Labels and a grey image of discs."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, np.int32)
    for i, (cy, cx) in enumerate([(40, 40), (40, 120), (110, 70), (150, 180), (60, 200)], start=1):
        labels[np.hypot(y - cy, x - cx) < radius] = i
    return labels, np.where(labels > 0, 200, 20).astype(np.uint8)


def test_tile_depends_on_its_seed_only(sample):
    from daskcell.training.augment import tile

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

    from daskcell.training.augment import tile

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
    from daskcell.training.augment import tile

    _, y = tile(sample, np.random.default_rng(0), 128)
    length = np.hypot(y[0], y[1])
    assert np.median(length[y[2] > 0]) == pytest.approx(1, abs=0.05)
    assert not length[y[2] == 0].any()


def test_beyond_the_image_tiles_are_zero_as_cellpose_pads():
    from daskcell.training.augment import tile

    small = np.full((40, 40), 100, np.uint8)
    small[10:30, 10:30] = 200
    one = make_sample("small", small[None], (small == 200).astype(int), "all", "grey")
    for seed in range(6):
        x, y = tile(one, np.random.default_rng(seed), 192)
        corners = [x[:, 0, 0], x[:, 0, -1], x[:, -1, 0], x[:, -1, -1]]
        assert any(not c.any() for c in corners)
        assert np.isfinite(x).all()
        assert np.isfinite(y).all()


@pytest.mark.slow
def test_scales_are_wide_around_thirty_pixels():
    """Cells in tiles are between 0.3 and 3 times 30 pixels across, and about 30 in the middle."""
    from skimage.measure import label, regionprops

    from daskcell.training.augment import tile

    labels, grey = discs(radius=15)
    disc_sample = make_sample("discs", grey[None], labels, "all", "grey")
    sizes = []
    for seed in range(90):
        _, y = tile(disc_sample, np.random.default_rng(seed), 224)
        for p in regionprops(label(y[2] > 0)):
            b = p.bbox
            if b[0] > 0 and b[1] > 0 and b[2] < 224 and b[3] < 224 and p.solidity > 0.9:
                sizes.append(p.equivalent_diameter_area / 30)
    assert len(sizes) > 60
    assert 0.25 < min(sizes) < 0.5
    assert 1.6 < max(sizes) < 3.1
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

    from daskcell.training.segmenter import image_weights

    def of(group):
        return dataclasses.replace(sample, group=group)

    weights = image_weights([of("a")] * 4 + [of("b")] + [of("generated cells")] * 5, 0.3)
    assert weights.sum() == pytest.approx(1)
    assert weights[5:].sum() == pytest.approx(0.3)
    assert weights[:4].sum() / weights[4] == pytest.approx(2)


def stained(shape=(90, 100)):
    """H&E-like pixels ``(3, Y, X)`` on glass, and where the glass is."""
    rng = np.random.default_rng(0)
    image = np.empty((3, *shape))
    image[:] = np.array([240, 235, 245])[:, None, None]
    image[:, 20:60, 20:60] = np.array([190, 130, 180])[:, None, None]
    image[:, 30:40, 30:40] = np.array([90, 60, 140])[:, None, None]
    glass = np.ones(shape, bool)
    glass[20:60, 20:60] = False
    return np.clip(image + rng.normal(0, 1, image.shape), 0, 255).astype(np.float32), glass


@pytest.mark.parametrize("kind", ["colour", "smear"])
def test_another_stain_keeps_glass_clear_and_the_order_of_densities(kind):
    from daskcell.training.augment import _density

    image, glass = stained()
    changed, hues = 0, []
    for seed in range(30):
        new = _density(image, kind, np.random.default_rng(seed))(image)
        assert new.min() >= 0
        assert new.max() <= 255
        assert np.isfinite(new).all()
        clear = np.median(new[:, glass], axis=1)
        plasma, nucleus = (np.median(new[:, a:b, a:b], axis=(1, 2)) for a, b in ((45, 55), (32, 38)))
        assert clear.min() > 150, "glass stays bright"
        assert nucleus.mean() < plasma.mean() < clear.mean()
        changed += not np.array_equal(new, image)
        hues.append(nucleus / clear)
    assert 15 <= changed < 30
    assert np.std(hues, axis=0).max() > 0.05


def test_another_stain_changes_each_pixel_by_itself():
    from daskcell.training.augment import _density

    image, _ = stained()
    change = _density(image, "colour", np.random.default_rng(0))
    whole = change(image)
    assert not np.array_equal(whole, image)
    np.testing.assert_allclose(change(image[:, 10:30, 40:70]), whole[:, 10:30, 40:70], rtol=1e-5)
    black = change(np.zeros_like(image))
    assert np.isfinite(black).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_brightness_and_depth_of_the_pixels_do_not_matter(dtype):
    """8, 12 and 16 bits, dim or not: the same tile, up to rounding."""
    from daskcell.training.augment import tile

    labels, grey = discs()
    tiles = []
    for factor in (1, 16, 200) if dtype != np.uint8 else (1,):
        one = make_sample("discs", (grey * float(factor)).astype(dtype)[None], labels, "all", "grey")
        assert one.channels.dtype == dtype
        tiles += [tile(one, np.random.default_rng(seed), 96)[0] for seed in (1, 2, 3)]
    for first, other in zip(tiles, tiles[3:], strict=False):
        np.testing.assert_allclose(other, first, atol=1e-3)


def test_sheets_show_membranes_between_cells_that_touch():
    for sample in draw_membranes(3, seed=4, side=128):
        labels, image = sample.labels, sample.channels[0]
        across = (labels[:, 1:] != labels[:, :-1]) & (labels[:, 1:] > 0) & (labels[:, :-1] > 0)
        assert across.any()
        assert image[:, 1:][across].mean() > 1.3 * np.median(image[labels > 0])
        assert (sample.group, sample.kind) == ("generated membranes", "grey")


def test_loss_is_least_for_the_truth():
    import torch

    from daskcell.training.segmenter import segmenter_loss

    truth = torch.zeros(1, 3, 8, 8)
    truth[:, 0, 2:5, 2:5], truth[:, 2, 2:5, 2:5] = 1, 1
    right = torch.cat([5 * truth[:, :2], 20 * truth[:, 2:] - 10], 1)
    assert float(segmenter_loss(right, truth)) < 1e-3
    assert float(segmenter_loss(-right, truth)) > 1


@pytest.mark.slow
def test_training_learns_and_gives_usable_weights(tmp_path):
    import torch

    from daskcell.models.unet import KIND, TinyUNet
    from daskcell.training.augment import tile
    from daskcell.training.segmenter import Recipe, segmenter_loss, train_segmenter

    recipe = Recipe(
        steps=150, batch=4, side=64, generated=2, generated_side=128, widths=(8, 16, 24), blocks=(1, 1),
        warmup=5, average=0.9, rate=5e-3,
    )  # fmt: skip
    done = train_segmenter([], tmp_path, recipe, report=lambda line: None)
    assert done.steps == 150
    assert "step 150" in weights_file.load_weights(done.path, KIND)[2]
    trained = models.load_network(done.path)
    assert trained.widths == (8, 16, 24)
    fresh = TinyUNet((8, 16, 24), (1, 1)).eval()
    unseen = list(draw_samples(2, seed=99, side=128))
    tiles = [tile(unseen[i % 2], np.random.default_rng(i), 64) for i in range(8)]
    x, truth = (torch.from_numpy(np.stack(part)) for part in zip(*tiles, strict=True))
    with torch.no_grad():
        losses = [float(segmenter_loss(net(x)[0], truth)) for net in (trained, fresh)]
    assert losses[0] < 0.95 * losses[1]


def test_interrupted_training_equals_an_undisturbed_one(trained, tmp_path):
    from daskcell.training.segmenter import Recipe, train_segmenter

    half = Recipe(**{**SMALL, "steps": 4})
    # The schedule looks at the share done: the first half is stopped by hand, as a kill would.
    from daskcell.training.trainer import Trainer

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
            train_segmenter([], tmp_path / "parts", Recipe(**SMALL), report=lambda line: None)
    parts = train_segmenter([], tmp_path / "parts", Recipe(**SMALL), report=lambda line: None)
    assert parts.steps == 8
    assert models.network_fingerprint(parts.path) == models.network_fingerprint(trained / "segmenter.npz")


def validated(tmp_path, folder, **settings):
    from daskcell.training.segmenter import Recipe, train_segmenter

    recipe = Recipe(**{**SMALL, "validate_steps": 2, **settings})
    return train_segmenter(
        [],
        tmp_path,
        recipe,
        validate=[folder],
        prepared=tmp_path.parent / "prepared",
        report=lambda line: None,
    )


def test_the_weights_that_validate_best_are_kept(tmp_path, folder, monkeypatch):
    from daskcell.models.unet import KIND
    from daskcell.training import segmenter

    losses = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(segmenter.np, "mean", lambda values: next(losses))
    validated(tmp_path / "a", folder)
    monkeypatch.undo()
    assert "step 4," in weights_file.load_weights(tmp_path / "a" / "segmenter.npz", KIND)[2]


def test_training_stops_when_validation_has_not_gained_for_long(tmp_path, folder, monkeypatch):
    from daskcell.training import segmenter

    monkeypatch.setattr(segmenter, "segmenter_loss", lambda y, truth: y.square().mean() * 0 + 1)
    done = validated(tmp_path / "a", folder, steps=40, patience=3)
    assert done.steps == 8, "the first validation is a gain, three more are none"
    assert validated(tmp_path / "a", folder, steps=40, patience=3).steps == 8
    assert validated(tmp_path / "a", folder, steps=40, patience=4).steps == 10


def test_interrupted_validated_training_equals_an_undisturbed_one(tmp_path, folder, monkeypatch):
    import torch

    from daskcell.training import trainer

    whole = validated(tmp_path / "whole", folder)
    learn = trainer.Trainer._learn

    def until_five(self, loss_of, done):
        if self.step == 5:
            raise KeyboardInterrupt
        learn(self, loss_of, done)

    monkeypatch.setattr(trainer.Trainer, "_learn", until_five)
    with pytest.raises(KeyboardInterrupt):
        validated(tmp_path / "parts", folder)
    monkeypatch.undo()
    parts = validated(tmp_path / "parts", folder)
    assert parts.steps == whole.steps == 8
    states = [torch.load(t.path.parent / "checkpoint.pt", weights_only=True) for t in (whole, parts)]
    assert states[0]["best"] == states[1]["best"]
    assert all(torch.equal(a, b) for a, b in zip(*(s["mean"].values() for s in states), strict=True))
    assert models.network_fingerprint(parts.path) == models.network_fingerprint(whole.path)


def test_training_goes_on_from_given_weights(tmp_path):
    from daskcell.training.segmenter import Recipe, train_segmenter

    recipe = Recipe(**{**SMALL, "start": "tiny", "steps": 1, "rate": 0.0, "batch": 1})
    done = train_segmenter([], tmp_path, recipe, report=lambda line: None)
    new, old = (weights_file.load_weights(models.find_network(name))[0] for name in (done.path, "tiny"))
    assert new.keys() == old.keys()
    assert all(np.array_equal(new[k], old[k]) for k in old if k.endswith("weight") and old[k].ndim == 4)


def test_no_steps_give_the_weights_it_starts_from(tmp_path):
    from daskcell.training.segmenter import Recipe, train_segmenter

    recipe = Recipe(**{**SMALL, "steps": 0, "start": "tiny"})
    done = train_segmenter([], tmp_path, recipe, report=lambda line: None)
    assert models.network_fingerprint(done.path) == models.network_fingerprint("tiny")


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch):
    import torch

    from daskcell.training.segmenter import Recipe, train_segmenter

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ComputeError, match="GPU"):
        train_segmenter([], tmp_path, Recipe(**SMALL), device="cuda")


def test_flows_are_prepared_once(folder, tmp_path, monkeypatch):
    (first,) = read_samples([folder], cache=tmp_path / "prepared")
    monkeypatch.setattr(segmenter_data, "_flows", lambda labels: pytest.fail("computed again"))
    (again,) = read_samples([folder], cache=tmp_path / "prepared")
    assert np.array_equal(first.flows, again.flows)
    (kept,) = (tmp_path / "prepared").iterdir()
    kept.write_bytes(kept.read_bytes()[:90])
    monkeypatch.undo()
    (mended,) = read_samples([folder], cache=tmp_path / "prepared")
    assert np.array_equal(first.flows, mended.flows)


@pytest.mark.slow
def test_killed_training_continues(tmp_path):
    import torch

    from daskcell.training.segmenter import Recipe, train_segmenter

    code = (
        "from daskcell.training.segmenter import *\n"
        "r = Recipe(steps=100000, batch=1, side=32, generated=1, generated_side=64, widths=(4, 8),\n"
        "           blocks=(1,), save_minutes=0.01)\n"
        f"train_segmenter([], {str(tmp_path)!r}, r)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "checkpoint.pt"
    try:
        deadline = time.monotonic() + 120
        done = 0
        while not done and time.monotonic() < deadline:
            time.sleep(0.05)
            done = torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = torch.load(checkpoint, weights_only=True)["step"]
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
    import torch

    from daskcell.training import trainer
    from daskcell.training.segmenter import Recipe

    for has in (False, True):
        monkeypatch.setattr(trainer, "has_bfloat16", lambda device, has=has: has)
        for wanted, used in ((None, has), (False, False), (True, True)):
            with Recipe(bfloat16=wanted).autocast():
                product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert product.dtype == (torch.bfloat16 if used else torch.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished training; tests that change it take a copy."""
    from daskcell.training.segmenter import Recipe, train_segmenter

    folder = tmp_path_factory.mktemp("trained")
    train_segmenter([], folder, Recipe(**SMALL), report=lambda line: None)
    return folder


def test_finished_training_is_not_repeated(trained):
    from daskcell.training.segmenter import Recipe, train_segmenter

    lines: list[str] = []
    again = train_segmenter([], trained, Recipe(**SMALL), report=lines.append)
    assert again.steps == 8
    assert not lines


def test_checkpoint_of_other_settings_or_damaged_is_refused(trained, tmp_path):
    from daskcell.training.segmenter import Recipe, train_segmenter

    with pytest.raises(WeightsError, match="another batch and seed"):
        train_segmenter([], trained, Recipe(**{**SMALL, "seed": 1, "batch": 3}))
    content = (trained / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[:1000])
    with pytest.raises(WeightsError, match="cannot be read"):
        train_segmenter([], tmp_path, Recipe(**SMALL))


@pytest.fixture
def folder(tmp_path):
    labels, grey = discs()
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    imsave(tmp_path / "images" / "lab_1.png", grey, check_contrast=False)
    imsave(tmp_path / "masks" / "lab_1.tif", labels.astype(np.uint16), check_contrast=False)
    return tmp_path


def test_a_folder_of_images_and_masks_is_read(folder):
    from daskcell.training.segmenter import Recipe, train_segmenter

    (one,) = read_samples([folder])
    assert (one.name, one.kind, one.group) == ("lab_1", "grey", "lab")
    assert len(one.centres) == 5
    assert train_segmenter([folder], folder / "out", Recipe(**SMALL), report=lambda line: None).steps == 8


@pytest.mark.parametrize("fault", ["no images", "no mask", "other size", "unreadable", "no cell"])
def test_unusable_folders_are_refused_by_name(folder, fault):
    mask = folder / "masks" / "lab_1.tif"
    if fault == "no images":
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
        read_samples([folder])


@pytest.mark.alone
@pytest.mark.skipif(os.name != "posix", reason="limits of processes are POSIX")
@pytest.mark.parametrize("which", ["images/lab_1.png", "masks/lab_1.tif"])
@pytest.mark.parametrize(("words", "reason"), [("crash", "SIGSEGV"), ("fine hang", "not come to an end")])
def test_a_file_whose_decoder_crashes_or_hangs_is_one_sentence(folder, evil, which, words, reason):
    content = (folder / which).read_bytes()
    (folder / which).write_text(f"EVIL {words}")
    with pytest.raises(ImageError, match=f"{which}.*{reason}"):
        read_samples([folder])
    (folder / which).write_bytes(content)
    assert len(read_samples([folder])) == 1, "and the next file is read"


def test_grey_saved_as_colour_is_grey_and_several_planes_are_refused(folder):
    image = folder / "images" / "lab_1.png"
    grey = imread(image)
    imsave(image, np.stack([grey] * 3, -1), check_contrast=False)
    (one,) = read_samples([folder])
    assert (one.kind, one.channels.shape) == ("grey", (1, *grey.shape))
    planes = np.ones((3, *grey.shape), np.uint16)
    tifffile.imwrite(
        folder / "masks" / "lab_1.tif", planes, metadata={"axes": "ZYX"}, photometric="minisblack"
    )
    with pytest.raises(ImageError, match=r"lab_1\.tif holds several planes"):
        read_samples([folder])


def table(folder, *rows, header="image,mask,group,white_cell,rows"):
    path = folder / "images.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_a_table_of_images_is_read(folder):
    sample = "images/lab_1.png,masks/lab_1.tif"
    path = table(folder, f"{sample},ours,,", f"{sample},,,0:130")
    whole, upper = read_samples([path])
    assert (whole.group, upper.group) == ("ours", "all")
    assert upper.labels.shape == (130, 240)
    assert len(upper.centres) < len(whole.centres) == 5
    assert len(read_samples([path, path], most=1)) == 2, "one of each group"


def test_a_smear_of_a_table_is_outlined_and_shrunk(tmp_path):
    from test_training_smears import smear

    image, _ = smear()
    imsave(tmp_path / "blood.png", image, check_contrast=False)
    (sample,) = read_samples([table(tmp_path, "blood.png,,blood,130,")], cache=tmp_path / "prepared")
    assert sample.kind == "smear"
    assert sample.channels.shape == (3, 130, 140)
    assert sample.channels.dtype == np.uint8
    assert len(sample.centres) == 4


@pytest.mark.parametrize(
    ("header", "row", "words"),
    [
        ("image,group", "a.png,x", "column mask"),
        ("image,mask,group", "", "no rows"),
        ("image,mask,group,white_cell", "a.png,,x,", "either a mask or"),
        ("image,mask,group,white_cell", "a.png,b.tif,x,60", "either a mask or"),
        ("image,mask,group,white_cell", "a.png,,x,wide", "white_cell='wide'"),
        ("image,mask,group,rows", "a.png,b.tif,x,top", "rows='top'"),
    ],
)
def test_unusable_tables_are_refused(tmp_path, header, row, words):
    with pytest.raises(InputError, match=words):
        list_sources(table(tmp_path, *[row] * bool(row), header=header))


def test_a_grey_image_is_no_smear(folder):
    with pytest.raises(InputError, match=r"lab_1.*stained smear"):
        read_samples([table(folder, "images/lab_1.png,,x,60,")])


def test_nothing_to_train_on_is_refused(tmp_path):
    from daskcell.training.segmenter import Recipe, train_segmenter

    with pytest.raises(InputError, match="nothing to train on"):
        train_segmenter([], tmp_path, Recipe(**{**SMALL, "generated": 0}))
