"""Choice of the number of clusters: compact, well separated, and stable when cells are left out."""

from __future__ import annotations

import warnings

import numpy as np

LARGEST = 20
_CELLS = 3000
_REPEATS = 4


def select_k(sample: np.ndarray, seed: int) -> tuple[int, list[dict[str, float]]]:
    """The best k from 2 to `LARGEST`, and the scores of each.

    Parameters
    ----------
    sample : (n, c) array
        Scaled and projected features, in random order.
    seed : int
        Of the k-means runs and the subsets.

    Returns
    -------
    k : int
    curve : list of dict
        For each k tried: ``silhouette`` (Rousseeuw 1987), ``stability`` (mean adjusted Rand index between the
        clusters of all cells and those found from 80 % of them), and ``score``, their product.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    rows = sample[:_CELLS].astype(np.float64)
    rng = np.random.default_rng(seed)
    subsets = [rng.permutation(len(rows))[: max(2, int(0.8 * len(rows)))] for _ in range(_REPEATS)]
    curve: list[dict[str, float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct cells than k
        for k in range(2, min(LARGEST, len(np.unique(rows, axis=0)) - 1, len(subsets[0])) + 1):
            labels = KMeans(k, n_init=5, random_state=seed).fit_predict(rows)
            if len(np.unique(labels)) < 2:
                continue
            silhouette = float(silhouette_score(rows, labels))
            stability = float(
                np.mean(
                    [
                        adjusted_rand_score(
                            labels, KMeans(k, n_init=3, random_state=seed).fit(rows[part]).predict(rows)
                        )
                        for part in subsets
                    ]
                )
            )
            score = max(silhouette, 0) * max(stability, 0)
            curve.append({"k": k, "silhouette": silhouette, "stability": stability, "score": score})
    if not curve:
        return min(2, len(rows)), curve
    return int(max(curve, key=lambda entry: (entry["score"], -entry["k"]))["k"]), curve
