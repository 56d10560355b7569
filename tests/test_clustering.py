"""Groups do not depend on the order, chunks or workers their rows came in; and the control, where they do."""

from __future__ import annotations

import json
import warnings

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import zarr
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from daskcell.clustering import (
    ClusterModel,
    feature_blocks,
    fit_clusters,
    fit_features,
    load_clusters,
    predict_slide,
)
from daskcell.clustering.feature_blocks import array_blocks, content_hashes, feature_stats, read_sample
from daskcell.config import ClusterSettings
from daskcell.errors import InputError

ENGINES = ("incremental", "parallel")


def blobs(n=6000, k=8, d=24, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Separated clusters, one after another: the worst order there is."""
    x, y = make_blobs(n, d, centers=k, cluster_std=1.0, random_state=seed)
    order = np.argsort(y, kind="stable")
    return x[order].astype(np.float32), y[order]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that little data makes many, and a sample that holds a part only."""
    import daskcell.clustering.fit
    import daskcell.clustering.kmeans

    monkeypatch.setattr(feature_blocks, "BLOCK", 256)
    monkeypatch.setattr(daskcell.clustering.kmeans, "PORTION", 512)
    monkeypatch.setattr(daskcell.clustering.fit, "SAMPLE", 1500)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_worst_order_gives_the_right_clusters(engine, small_blocks):
    x, y = blobs()
    model = fit_clusters(x, 8, engine=engine)
    assert adjusted_rand_score(y, model.predict(x)) == 1.0


def test_plain_incremental_fails_in_the_worst_order():
    """Control: what is wrapped, without what makes it safe."""
    from dask_ml.wrappers import Incremental

    x, y = blobs()
    plain = Incremental(MiniBatchKMeans(8, random_state=0), shuffle_blocks=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.fit(da.from_array(x, chunks=(750, 24)))
    assert adjusted_rand_score(y, plain.estimator_.predict(x)) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("k", [3, 11])
def test_inertia_is_within_one_percent_of_full_kmeans(engine, k, small_blocks):
    x = np.random.default_rng(0).gamma(2.0, size=(8000, 12)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = KMeans(k, n_init=10, random_state=0).fit(x).inertia_
    model = fit_clusters(x, k, engine=engine, standardise=False)
    assert model.inertia_ < 1.01 * best
    again = ((x.astype(float) - model.centers_[model.predict(x)]) ** 2).sum()
    assert again == pytest.approx(model.inertia_, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunks", [(100, 24), (997, 7), (6000, 24)])
def test_no_bit_depends_on_the_chunks(engine, chunks, small_blocks, monkeypatch):
    monkeypatch.setattr("daskcell.clustering.fit._IN_MEMORY_BYTES", 0)  # streamed, as if it were large
    x = np.random.default_rng(0).gamma(2.0, size=(6000, 24)).astype(np.float32)
    options = {"engine": engine, "standardise": True, "components": 10}
    one = fit_clusters(x, 7, **options)
    cut_model = fit_clusters(da.from_array(x, chunks=chunks), 7, **options)
    np.testing.assert_array_equal(one.reduced_centers_, cut_model.reduced_centers_)
    np.testing.assert_array_equal(one.centers_, cut_model.centers_)
    lazy = cut_model.predict(da.from_array(x, chunks=chunks))
    np.testing.assert_array_equal(one.predict(x), lazy.compute())
    np.testing.assert_array_equal(
        one.distance(x), cut_model.distance(da.from_array(x, chunks=chunks)).compute()
    )


def test_parallel_has_the_same_bits_for_any_order_and_any_blocks(small_blocks, monkeypatch):
    x = np.random.default_rng(0).gamma(2.0, size=(6000, 24)).astype(np.float32) * 1.7
    options = {"engine": "parallel", "standardise": True, "components": 10}
    one = fit_clusters(x, 7, **options)
    for seed, block in enumerate((256, 1000, 6000)):
        monkeypatch.setattr(feature_blocks, "BLOCK", block)
        order = np.random.default_rng(seed).permutation(len(x))
        other = fit_clusters(x[order], 7, **options)
        for name in ("reduced_centers_", "centers_", "spread_", "mean_", "scale_", "components_"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        assert one.inertia_ == other.inertia_
        np.testing.assert_array_equal(one.predict(x)[order], other.predict(x[order]))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_clusters_for_any_order_of_the_rows(engine, small_blocks):
    x, _ = blobs(k=6)
    order = np.random.default_rng(1).permutation(len(x))
    one, other = fit_clusters(x, 6, engine=engine), fit_clusters(x[order], 6, engine=engine)
    np.testing.assert_array_equal(one.predict(x)[order], other.predict(x[order]))
    np.testing.assert_allclose(one.centers_, other.centers_, rtol=1e-3)


def test_clusters_are_numbered_by_size():
    sizes = [50, 400, 100, 250]
    x = np.concatenate([np.random.default_rng(i).normal(20 * i, 1, (n, 3)) for i, n in enumerate(sizes)])
    model = fit_clusters(x, 4)
    assert model.counts_.tolist() == [400, 250, 100, 50]
    assert np.bincount(model.predict(x)).tolist() == [400, 250, 100, 50]


def test_clusters_of_one_size_are_numbered_by_their_centre():
    x = np.repeat([[5.0, 0.0], [-5.0, 1.0], [0.0, 3.0]], 10, axis=0)
    assert fit_clusters(x, 3, standardise=False).centers_[:, 0].tolist() == [-5, 0, 5]


@pytest.mark.parametrize("engine", ENGINES)
def test_missing_features_are_left_out_and_told(engine):
    x, y = blobs(400, 3)
    x = x.copy()
    x[::40, 2] = np.nan
    x[1, 0] = np.inf
    model = fit_clusters(x, 3, engine=engine)
    assert model.missing_ == 11
    clusters, distance = model.predict(x), model.distance(x)
    bad = ~np.isfinite(x).all(axis=1)
    assert (clusters[bad] == -1).all()
    assert np.isnan(distance[bad]).all()
    assert adjusted_rand_score(y[~bad], clusters[~bad]) == 1.0


def test_fewer_cells_than_clusters_are_refused():
    x = np.zeros((5, 3))
    x[0] = np.nan
    with pytest.raises(InputError, match=r"k=11 clusters need at least 11 cells, but there are 4 \(1 more"):
        fit_clusters(x, 11)
    with pytest.raises(InputError, match="there are 0"):
        fit_clusters(np.zeros((0, 3)), 2)


def test_as_many_clusters_as_cells_and_cells_that_are_all_alike():
    x = np.arange(12.0).reshape(4, 3) ** 2
    assert sorted(fit_clusters(x, 4).predict(x)) == [0, 1, 2, 3]
    alike = fit_clusters(np.ones((50, 3)), 3)
    assert alike.counts_.sum() == 50
    assert np.isfinite(alike.centers_).all()


def test_incremental_takes_many_slides_of_one_cell_and_more_clusters_than_a_portion(monkeypatch):
    """dask-ml's refuses a first block of fewer rows than clusters."""
    from daskcell.clustering import kmeans
    from daskcell.clustering.feature_blocks import ArrayBlock

    monkeypatch.setattr(kmeans, "_WINDOW", 8)
    x, _ = blobs(60, 5)
    blocks = [ArrayBlock(x, i, i + 1) for i in range(60)]
    for rows, portion in ((blocks, 512), ([ArrayBlock(x, 0, 60)], 4)):
        monkeypatch.setattr(kmeans, "PORTION", portion)
        centers = kmeans.minibatch(rows, [len(block.read()) for block in rows], x[:20].astype(float), 0)
        assert centers.shape == (20, 24)
        assert np.isfinite(centers).all()


@pytest.mark.parametrize("values", [np.zeros(5), np.zeros((5, 2, 2)), np.full((5, 2), "a")])
def test_what_is_no_table_of_numbers_is_refused(values):
    with pytest.raises(InputError, match=r"features (must be an array|holds values of type)"):
        fit_clusters(values, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0},
        {"k": 2.5},
        {"k": "many"},
        {"components": 0},
        {"components": -3},
        {"engine": "x"},
        {"seed": -1},
    ],
)
def test_an_option_that_cannot_be_is_named_with_what_it_may_be(options):
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=rf"{name} must be .*, not {value!r}"):
        fit_clusters(np.eye(5), **{"k": 2, **options})


def test_cells_without_features_are_refused():
    with pytest.raises(InputError, match=r"shape is \(5, 0\)"):
        fit_clusters(np.zeros((5, 0)), 2)


@pytest.mark.parametrize("kind", ["masked", "object", "complex", "1-d"])
def test_a_dask_array_of_another_kind_is_refused_for_new_cells_too(kind):
    x = np.eye(5)
    made = {"masked": np.ma.masked_less(x, 1), "object": x.astype(object), "complex": x + 1j, "1-d": x[0]}
    model = fit_clusters(x, 2)
    with pytest.raises(InputError):
        model.predict(da.from_array(made[kind], chunks=5))


def test_standardising_lets_every_feature_count():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 500)
    x = np.stack([y + rng.normal(0, 0.1, 500), 1000 * rng.normal(size=500), np.full(500, 1e9)], axis=1)
    assert adjusted_rand_score(y, fit_clusters(x, 2, standardise=False).predict(x)) < 0.1
    assert adjusted_rand_score(y, fit_clusters(x, 2).predict(x)) > 0.9


def test_unit_length_clusters_by_direction():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 600)
    x = (np.eye(3)[y] + rng.normal(0, 0.05, (600, 3))) * rng.uniform(1, 50, (600, 1))
    model = fit_clusters(x, 3, unit_length=True)
    assert adjusted_rand_score(y, model.predict(x)) == 1.0
    np.testing.assert_allclose(np.linalg.norm(model.transform(x), axis=1), 1, rtol=1e-6)


def test_projection_equals_principal_components():
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).normal(size=(2000, 12)) @ np.diag(np.arange(1, 13.0)) + 5
    got = fit_clusters(x, 3, standardise=False, components=4).transform(x)
    expected = PCA(4).fit_transform(x)
    np.testing.assert_allclose(np.abs(got.std(axis=0)), expected.std(axis=0), rtol=0.02)


@pytest.mark.parametrize(
    "options", [{}, {"standardise": True, "components": 5}, {"components": 5, "unit_length": True}]
)
def test_a_saved_model_gives_the_same_answers(tmp_path, options):
    x, _ = blobs(500, 4)
    model = fit_clusters(x, 4, info={"encoder": "tiny"}, **options)
    model.save(tmp_path / "model")
    model.save(tmp_path / "model")  # replaces
    loaded = load_clusters(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
    np.testing.assert_array_equal(loaded.distance(x), model.distance(x))
    np.testing.assert_array_equal(loaded.centers_, model.centers_)
    assert loaded.info == {"encoder": "tiny"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert json.loads((tmp_path / "model" / "model.json").read_text())["k"] == 4


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no cluster model"):
        load_clusters(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    np.savez(tmp_path / "arrays.npz", centers_=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="holds no cluster model"):
        load_clusters(tmp_path)


def test_features_of_another_kind_are_refused():
    x, _ = blobs(300, 3)
    model = fit_clusters(x, 3, info={"encoder": "tiny"})
    with pytest.raises(InputError, match="24 features per cell, but these cells have 10"):
        model.predict(x[:, :10])
    with pytest.raises(InputError, match="encoder 'tiny', but these have 'resnet152'"):
        model.check(24, {"encoder": "resnet152"})


def test_drift_is_told_for_new_cells_far_away():
    x, _ = blobs(2000, 4)
    model = fit_clusters(x, 4)
    near, far = model.drift(*model.assign(x)), model.drift(*model.assign(x + 10))
    assert near["far"] == pytest.approx(0.01, abs=0.005)
    assert near["median_ratio"] == pytest.approx(1, abs=0.02)
    assert far["far"] > 0.9


def test_the_sample_depends_on_content_alone(small_blocks):
    x = np.random.default_rng(0).normal(size=(3000, 5)).astype(np.float32)
    samples = []
    for rows in (x, x[::-1].copy(), x[np.random.default_rng(1).permutation(3000)]):
        blocks = array_blocks(rows)
        samples.append(read_sample(blocks, feature_stats(blocks, 100, 7).sample, 7))
    assert len(samples[0]) == 100
    np.testing.assert_array_equal(samples[0], samples[1])
    np.testing.assert_array_equal(samples[0], samples[2])


def test_a_survey_equals_numpy(small_blocks):
    x = (np.random.default_rng(0).normal(size=(3000, 5)) * [1, 2, 3, 4, 5] + 100).astype(np.float32)
    seen = feature_stats(array_blocks(x), 10, 0)
    np.testing.assert_allclose(seen.mean, x.mean(axis=0, dtype=float), rtol=1e-7)
    np.testing.assert_allclose(seen.deviation, x.std(axis=0, dtype=float), rtol=1e-7)


def test_hashes_are_spread_evenly_and_zero_has_no_sign():
    x = np.arange(20000, dtype=np.float32)[:, None]
    hashes = content_hashes(x, 0)
    assert len(np.unique(hashes)) == 20000
    assert (hashes > 2**63).mean() == pytest.approx(0.5, abs=0.02)
    assert content_hashes(np.array([[0.0]], np.float32), 1) == content_hashes(
        np.array([[-0.0]], np.float32), 1
    )


@pytest.mark.slow
def test_auto_finds_the_number_of_separated_clusters():
    right = 0
    for seed, k in enumerate([3, 4, 6, 9, 12]):
        x, _ = blobs(700, k, 16, seed)
        model = fit_clusters(x, "auto")
        right += len(model.centers_) == k
        assert [entry["k"] for entry in model.curve_] == list(range(2, 21))
    assert right == 5


# -- slides on disk -----------------------------------------------------------------------------------


def write_slide(folder, name: str, features: np.ndarray, **info) -> tuple:
    array = zarr.create_array(
        str(folder / f"{name}.zarr"),
        shape=features.shape,
        chunks=(512, features.shape[1]),
        dtype="f4",
        attributes={"daskcell": {"encoder": "tiny"} | info},
    )
    if len(features):
        array[:] = features
    table = folder / f"{name}.parquet"
    pd.DataFrame({"label": np.arange(1, len(features) + 1)}).to_parquet(table, index=False)
    return folder / f"{name}.zarr", table


@pytest.fixture
def slides(tmp_path, small_blocks):
    """Each slide holds one cluster only, one is empty, and one cell has no features."""
    x, y = blobs(3000, 5)
    x[7, 3] = np.nan
    made = [write_slide(tmp_path, f"slide {i}", x[y == i]) for i in range(5)]
    made.append(write_slide(tmp_path, "empty", x[:0]))
    return made, x, y


@pytest.mark.parametrize("engine", ENGINES)
def test_one_cluster_per_slide_in_any_order_gives_the_same_model(slides, engine, tmp_path):
    made, x, y = slides
    settings = ClusterSettings(k=5, engine=engine, components=8)
    paths = [features for features, _ in made]
    model = fit_features(paths, settings)
    good = np.isfinite(x).all(axis=1)
    assert adjusted_rand_score(y[good], model.predict(x)[good]) == 1.0
    assert model.missing_ == 1
    assert model.info["encoder"] == "tiny"
    again = fit_features(paths[::-1], settings)
    np.testing.assert_array_equal(model.reduced_centers_, again.reduced_centers_)
    assert not list(tmp_path.glob(".*")), "scratch is removed"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_bits_on_a_cluster_of_workers(slides, engine):
    from distributed import Client

    from daskcell.compute import Workers

    made, _, _ = slides
    paths = [features for features, _ in made]
    settings = ClusterSettings(k=5, engine=engine, components=8)
    here = fit_features(paths, settings)
    with Client(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as client:
        there = fit_features(paths, settings, Workers(client))
    np.testing.assert_array_equal(here.reduced_centers_, there.reduced_centers_)


def test_slides_of_different_features_are_refused(slides, tmp_path):
    made, _, _ = slides
    other = write_slide(tmp_path, "slide 9", np.zeros((20, 24), np.float32), encoder="resnet152")
    with pytest.raises(InputError, match=r"slide 9\.zarr was made differently from"):
        fit_features([features for features, _ in [*made, other]])


def test_clusters_are_written_into_a_table_of_their_own(slides, tmp_path):
    made, x, y = slides
    model = fit_features([features for features, _ in made], ClusterSettings(k=5, components=None))
    model.save(tmp_path / "model")
    target = tmp_path / "clusters" / "slide.parquet"
    for i, (features, table) in enumerate(made[:5]):
        before = table.read_bytes()
        report = predict_slide(features, table, tmp_path / "model", target)
        predict_slide(features, table, model, target)  # again: it is replaced
        assert table.read_bytes() == before
        cells = pd.read_parquet(target)
        assert list(cells.columns) == ["cluster", "cluster_name", "distance"]
        np.testing.assert_array_equal(cells["cluster"], model.predict(x[y == i]))
        np.testing.assert_array_equal(cells["distance"], model.distance(x[y == i]))
        assert sum(report["counts"]) + report["unassigned"] == len(cells)
    report = predict_slide(*made[5], model, target)
    assert report["counts"] == [0] * 5
    assert list(pd.read_parquet(target).columns) == ["cluster", "cluster_name", "distance"]


@pytest.fixture
def measured(tmp_path, small_blocks):
    """Two slides of four clusters: the encoder tells two apart, the measurements the other two."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 1200)
    vectors = rng.normal(0, 1, (1200, 16)).astype(np.float32)
    vectors[:, :8] += 6 * (y // 2)[:, None]
    made = []
    for i, part in enumerate((slice(0, 500), slice(500, 1200))):
        features, table = write_slide(tmp_path, f"measured {i}", vectors[part])
        cells = pd.DataFrame({"label": np.arange(1, len(vectors[part]) + 1)})
        cells["centroid-0"] = rng.uniform(0, 1e6, len(cells))
        cells["area"] = (300 + 4000 * (y[part] % 2) + rng.normal(0, 300, len(cells))).astype(int)
        cells["solidity"] = 0.9 - 0.2 * (y[part] % 2) + rng.normal(0, 0.02, len(cells))
        cells["area_um2"] = cells["area"] * 0.25
        cells.to_parquet(table, index=False, row_group_size=130)
        made.append((features, table, y[part]))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("components", [None, 4])
def test_vectors_and_measurements_together_tell_what_neither_can(measured, unit, components, tmp_path):
    scores = {}
    for use in (["encoder"], ["measurements"], ["encoder", "measurements"]):
        settings = ClusterSettings(k=4, use=use, components=components, unit_length=unit)
        features, tables, truth = zip(*measured, strict=True)
        model = fit_features(features, settings, table_paths=tables)
        model.save(tmp_path / "model")
        targets = [tmp_path / f"clusters {i}.parquet" for i in range(len(tables))]
        for paths in zip(features, tables, targets, strict=True):
            predict_slide(*paths[:2], tmp_path / "model", paths[2])
        got = np.concatenate([pd.read_parquet(target)["cluster"] for target in targets])
        scores["+".join(use)] = adjusted_rand_score(np.concatenate(truth), got)
    assert scores["encoder"] < 0.75
    assert scores["measurements"] < 0.75
    assert scores["encoder+measurements"] > 0.97
    assert model.info["measurements"] == ["area", "solidity"]


def test_measurements_that_are_not_there_are_refused(measured, slides, tmp_path):
    features, tables, _ = zip(*measured, strict=True)
    both = ClusterSettings(k=4, use=["encoder", "measurements"])
    with pytest.raises(InputError, match="cells tables are needed"):
        fit_features(features, both)
    with pytest.raises(InputError, match="have no measurements"):
        fit_features([slides[0][0][0]], both, table_paths=[slides[0][0][1]])
    model = fit_features(features, both, table_paths=tables)
    other = pd.read_parquet(tables[0]).drop(columns="solidity")
    other.to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="do not have the same measurements"):
        fit_features(features, both, table_paths=[tables[0], tmp_path / "other.parquet"])
    with pytest.raises(InputError, match="uses the measurements solidity"):
        predict_slide(features[0], tmp_path / "other.parquet", model, tmp_path / "clusters.parquet")


def test_rows_of_a_table_are_read_across_its_row_groups(measured):
    from daskcell.clustering.tables import read_columns

    table = measured[1][1]
    expected = pd.read_parquet(table)[["solidity", "area"]].to_numpy(np.float32)
    for start, stop in ((0, 700), (100, 150), (129, 131), (690, 700), (5, 5)):
        got = read_columns(str(table), ["solidity", "area"], start, stop)
        np.testing.assert_array_equal(got, expected[start:stop])


def test_a_table_that_does_not_fit_its_features_is_refused(slides, tmp_path):
    made, _, _ = slides
    model = ClusterModel(*(np.zeros((2, 24)),) * 2, np.zeros(2), np.zeros((2, 3)), np.zeros(24), np.ones(24))
    with pytest.raises(InputError, match="has 600 cells, but"):
        predict_slide(made[5][0], made[1][1], model, tmp_path / "clusters.parquet")
    assert not (tmp_path / "clusters.parquet").exists()


def test_random_state_is_another_word_for_the_seed():
    x = np.random.default_rng(0).normal(size=(300, 5))
    one, other = fit_clusters(x, 6, seed=3), fit_clusters(x, 6, random_state=3)
    np.testing.assert_array_equal(one.centers_, other.centers_)
    assert not np.array_equal(one.centers_, fit_clusters(x, 6).centers_)
