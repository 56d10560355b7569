"""Training an encoder on a study: crops from its files, a kill, and better groups than without training."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import tifffile
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

import daskcell as dc
from daskcell import models
from daskcell.cli import app
from daskcell.compute import threads_limited
from daskcell.errors import ComputeError, StudyError, WeightsError
from daskcell.evaluation.generated import CHANNELS, synthesize_field
from daskcell.preprocess import apply_block
from daskcell.training.crops import Joined, _fair, join, study_crops

SETTINGS = {
    "preprocess": {"reconstruct": {"colors": list(CHANNELS)}},
    "segment": {"method": "watershed"},
    "cluster": {"k": 11},
    "compute": {"kind": "inline", "block": 256},
    "output": {"overlays": []},
}
SMALL = {"steps": 12, "batch": 16, "widths": (8, 8, 8, 8), "dim": 12, "warmup": 2, "save_minutes": 0.0}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three generated fields, run, and the type of each cell of each slide (-1: none or two of them)."""
    folder, types = tmp_path_factory.mktemp("fields"), {}
    fields = {f"field{i}": synthesize_field((448, 448), seed=300 + i, clumping=0) for i in range(3)}
    for name, field in fields.items():
        tifffile.imwrite(
            folder / f"{name}.tif", field.channels, photometric="minisblack", metadata={"axes": "CYX"}
        )
    made = dc.run(folder, tmp_path_factory.mktemp("out") / "study", SETTINGS)
    for name, field in fields.items():
        labels = np.asarray(labels_of(made, name))
        types[name] = np.full(labels.max(), -1)
        for cell in range(1, labels.max() + 1):
            inside = np.bincount(field.labels[labels == cell])
            best = int(np.argmax(inside))
            if (
                best
                and inside[best] > 0.7 * inside.sum()
                and inside[best] > 0.5 * (field.labels == best).sum()
            ):
                types[name][cell - 1] = field.types[best - 1]
    return made, types


def labels_of(study, name):
    from daskcell.geometry import Box
    from daskcell.images import image_info, read_labels

    path = study.paths.image(name)
    return read_labels(path, "cells", Box(0, 0, *image_info(path).shape[1:]))


def image_of(study, name):
    plan = study.prepared(name).plan
    return apply_block(study.open_image(name).data.compute(), plan)


# -- crops ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_crops_are_what_the_encoder_is_given(study, tmp_path):
    """Cut from the study's files, block by block, they are those of `embed` on the whole image."""
    made, _ = study
    sets, _ = study_crops([made], tmp_path, report=lambda line: None)
    seen = []
    for name in made.slides:
        given = []
        dc.embed(
            image_of(made, name),
            labels_of(made, name),
            encoder=lambda crops, given=given: given.append(np.array(crops)) or np.zeros((len(crops), 2)),
            size=64,
        )
        table = made.cells(name)
        good = (table["area"] >= 40) & ~table["touches_edge"]
        seen.append(np.concatenate(given)[: len(table)][good.to_numpy()])
    expected = np.rint(np.concatenate(seen) * 255).astype(np.uint8)
    got = np.concatenate([one[:] for one in sets])
    assert got.shape == expected.shape
    order = [np.lexsort(x.reshape(len(x), -1).T[::997]) for x in (got, expected)]
    np.testing.assert_array_equal(got[order[0]], expected[order[1]])


def test_crops_are_cut_once_and_anew_when_the_cells_change(study, tmp_path):
    made, _ = study
    lines: list[str] = []
    _, first = study_crops([made], tmp_path, report=lines.append)
    assert len(lines) == 3
    _, again = study_crops([made], tmp_path, report=lines.append)
    assert (len(lines), again) == (3, first)
    some, other = study_crops([made], tmp_path, cells=60, report=lines.append)
    assert other != first
    assert sum(map(len, some)) <= 60
    assert len(list(tmp_path.glob("*.npy"))) == 3, "those of other cells are gone"


def test_a_study_without_cells_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "blank.tif", np.full((80, 80), 9, np.uint8))
    made = dc.run(
        tmp_path / "blank.tif", tmp_path / "study", SETTINGS | {"preprocess": {"reconstruct": None}}
    )
    with pytest.raises(StudyError, match="16 whole cells"):
        study_crops([made], tmp_path / "crops")


def test_cells_are_shared_out_fairly():
    assert _fair([10, 1000, 1000], 210) == 100
    assert _fair([5, 5], 100) == 5
    assert _fair([], 100) == 1


def test_joined_files_are_one_array():
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 255, (n, 3, 4, 4)).astype(np.uint8) for n in (5, 1, 9)]
    one, whole = Joined(parts), np.concatenate(parts)
    rows = rng.integers(0, 15, 40)
    np.testing.assert_array_equal(one[rows], whole[rows])
    np.testing.assert_array_equal(one[3:8], whole[3:8])
    assert one.shape == whole.shape
    assert [len(s) for s in join(parts, 6)] == [6, 9]
    assert [len(s) for s in join([*parts, *parts[:1]], 6)] == [6, 14]


@pytest.mark.slow
def test_crops_are_not_held_in_memory(tmp_path):
    """Training on 6000 mapped crops (74 MB) holds little more than on 100."""
    crops = np.lib.format.open_memmap(tmp_path / "crops.npy", "w+", np.uint8, (6000, 3, 64, 64))
    rng = np.random.default_rng(0)
    for i in range(0, 6000, 500):
        crops[i : i + 500] = rng.integers(0, 255, (500, 3, 64, 64))
    tracemalloc.start()
    for i in range(0, 6000, 60):
        Joined([crops])[np.arange(i, 6000, 100)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


# -- training -------------------------------------------------------------------------------------
SCRIPT = """
import sys
import numpy as np
from daskcell.compute import threads_limited
from daskcell.training.encoder import EncoderRecipe, train_encoder
crops = np.load(sys.argv[1], mmap_mode="r")
recipe = EncoderRecipe(steps=12, batch=16, widths=(8, 8, 8, 8), dim=12, warmup=2, save_minutes=0.0)
with threads_limited(1):
    train_encoder(crops, sys.argv[2], recipe)
"""


@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_bits(study, tmp_path):
    import torch

    from daskcell.training.encoder import EncoderRecipe, train_encoder

    made, _ = study
    sets, _ = study_crops([made], tmp_path / "crops", report=lambda line: None)
    np.save(tmp_path / "x.npy", sets[0][:64])
    crops = np.load(tmp_path / "x.npy", mmap_mode="r")
    with threads_limited(1):
        whole = train_encoder(crops, tmp_path / "whole", EncoderRecipe(**SMALL), report=lambda line: None)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "x.npy"), str(tmp_path / "killed")]
    )
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    until, reached = time.monotonic() + 90, 0
    while not reached and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
        reached = torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < reached < 12
    lines: list[str] = []
    with threads_limited(1):
        killed = train_encoder(crops, tmp_path / "killed", EncoderRecipe(**SMALL), report=lines.append)
    assert f"from step {reached}" in lines[0]
    assert models.encoder_fingerprint(killed.path) == models.encoder_fingerprint(whole.path)


def test_a_checkpoint_of_other_cells_is_refused(tmp_path):
    from daskcell.training.encoder import EncoderRecipe, train_encoder

    crops = np.random.default_rng(0).integers(0, 255, (20, 3, 64, 64)).astype(np.uint8)
    recipe = {**SMALL, "steps": 1}
    train_encoder(crops, tmp_path, EncoderRecipe(**recipe), report=lambda line: None)
    with pytest.raises(WeightsError, match="another cells"):
        train_encoder(crops, tmp_path, EncoderRecipe(**{**recipe, "cells": "others"}))


def test_a_gpu_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    import torch

    from daskcell.training.encoder import EncoderRecipe, train_encoder

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ComputeError, match="no GPU"):
        train_encoder(np.zeros((20, 3, 64, 64), np.uint8), tmp_path, EncoderRecipe(**SMALL), device="cuda")


def test_nothing_is_made_on_another_device_than_the_cells():
    """Whatever forgets its device is made on `meta` here, and cannot meet a real tensor."""
    import torch

    from daskcell.training import encoder

    crops = np.random.default_rng(0).integers(0, 255, (8, 3, 64, 64)).astype(np.uint8)
    x = torch.from_numpy(crops).float() / 255
    net = models.encoder.TinyEncoder((8, 8, 8, 8), 12)
    with torch.device("meta"):
        signal = models.crop_signal.signal_of(x)
        view = encoder.alter(signal, np.random.default_rng(0))
        z = net.pooled(view)
        encoder._contrast(torch.nn.functional.normalize(z, dim=1), torch.arange(8, device="cpu"), 0.2)
        models.encoder.fit_projection(net, crops)
        assert net(x).shape == (8, 12)
    assert not any(part.is_meta for part in net.state_dict().values())


@pytest.mark.slow
def test_the_command_trains_and_continues(study, tmp_path):
    made, _ = study
    command = ["train", "encoder", str(made.out), "-o", str(tmp_path / "enc"), "--cells", "80"]
    first = CliRunner().invoke(app, [*command, "--steps", "1"])
    assert first.exit_code == 0, first.output
    assert "cells cut" in first.output
    again = CliRunner().invoke(app, [*command, "--steps", "2"])
    assert "from step 1" in again.output
    assert "cells cut" not in again.output
    weights = tmp_path / "enc" / "encoder.npz"
    name = made.slides[0]
    vectors = dc.embed(image_of(made, name), labels_of(made, name), encoder=str(weights))
    assert vectors.shape == (len(made.cells(name)), 96)
    assert np.isfinite(np.asarray(vectors)).all()


def ari(study, weights) -> float:
    """k-means of the cells of all slides with an encoder, against their types; mean of 3 seeds."""
    made, types = study
    vectors = [
        np.asarray(dc.embed(image_of(made, n), labels_of(made, n), encoder=str(weights))) for n in made.slides
    ]
    x, truth = np.concatenate(vectors), np.concatenate([types[n] for n in made.slides])
    x = PCA(32, random_state=0).fit_transform(StandardScaler().fit_transform(x[truth >= 0]))
    groups = [KMeans(11, n_init=3, random_state=seed).fit_predict(x) for seed in range(3)]
    return float(np.mean([adjusted_rand_score(truth[truth >= 0], found) for found in groups]))


@pytest.mark.slow
def test_training_on_the_study_groups_its_cells_better(study, tmp_path, monkeypatch):
    from daskcell.training import encoder
    from daskcell.training.encoder import EncoderRecipe, train_encoder

    made, _ = study
    sets, _ = study_crops([made], tmp_path / "crops", report=lambda line: None)
    recipe = {"batch": 48, "widths": (16, 32, 48, 64), "dim": 64, "warmup": 5, "rate": 2e-3}

    def score(name: str, **options: float) -> float:
        done = train_encoder(
            sets, tmp_path / name, EncoderRecipe(**recipe, **options), report=lambda line: None
        )
        return ari(study, done.path)

    untrained, trained = score("untrained", minutes=0), score("trained", steps=60)
    # The control: partners at random teach nothing of the types.
    anyone = np.random.default_rng(0)
    monkeypatch.setattr(encoder, "neighbours", lambda x, count: anyone.integers(0, len(x), (len(x), count)))
    blind = score("blind", steps=60, itself=0.0)
    print(f"untrained {untrained:.3f} trained {trained:.3f} blind {blind:.3f}")
    assert trained > untrained + 0.03
    assert trained > blind + 0.03
