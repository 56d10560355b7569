"""The embedded segmenter: its contract with cellpose, and that it finds cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from daskcell import models
from daskcell.models.segmenter_data import make_sample, read_folder
from daskcell.models.segmenter_scores import counts, find_cells, median_diameter, picture_of, score
from daskcell.models.unet import TinyUNet, fold_batch_norms
from daskcell.synthetic import synthesize_field


@pytest.fixture(scope="module")
def tiny():
    return models.load_network("tiny")


def test_forward_gives_flows_and_a_style_of_zeros(tiny):
    y, style = tiny(torch.rand(2, 3, 256, 256))
    assert y.shape == (2, 3, 256, 256)
    assert style.shape == (2, 256)
    assert not style.any()
    assert tiny.device.type == "cpu"
    assert tiny.dtype == torch.float32
    assert not tiny.training
    assert not any(p.requires_grad for p in tiny.parameters())


def test_has_the_size_that_was_planned(tiny):
    assert 1.6e6 < sum(p.numel() for p in tiny.parameters()) < 1.75e6


@pytest.mark.parametrize("shape", [(100, 90), (256, 256), (300, 270)])
def test_runs_through_cellposes_tiles(tiny, shape):
    from cellpose.core import run_net

    picture = np.random.default_rng(0).random((1, *shape, 3), np.float32)
    y, _ = run_net(tiny, picture, bsize=256)
    assert y.shape == (1, *shape, 3)
    assert np.isfinite(y).all()


def test_same_answer_twice_and_from_a_fresh_copy(tiny):
    x = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    first = tiny(x)[0]
    models.clear_networks()
    assert torch.equal(models.load_network("tiny")(x)[0], first)


def test_bfloat16_weights_are_possible():
    net = models.load_network("tiny", dtype=torch.bfloat16)
    assert net.dtype == torch.bfloat16
    y, style = net(torch.rand(1, 3, 64, 64, dtype=torch.bfloat16))
    assert y.dtype == style.dtype == torch.bfloat16


def test_an_untrained_network_fails_where_the_embedded_one_succeeds(tiny):
    field = synthesize_field((384, 384), seed=2026)
    sample = make_sample("field", field.channels, field.labels, "generated", "stains")
    scores = []
    for net in (tiny, TinyUNet().eval()):
        tp, fp, fn = score(net, [sample])["generated"]["one pass"][0]
        scores.append(2 * tp / (2 * tp + fp + fn))
    assert scores[0] > 0.93
    assert scores[1] < 0.2


def test_a_constant_picture_has_no_cells(tiny):
    assert not find_cells(tiny, np.zeros((128, 128, 3), np.float32)).any()


@pytest.mark.parametrize("colours", ["usual", "grey", "inverted", "swapped", "one stain empty"])
def test_colours_do_not_matter_much(tiny, colours):
    field = synthesize_field((256, 256), seed=7, cells=26)
    picture = picture_of(make_sample("f", field.channels, field.labels, "generated", "stains"))
    if colours == "grey":
        picture = np.repeat(picture.mean(-1, keepdims=True), 3, -1)
    elif colours == "inverted":
        picture = 1 - picture
    elif colours == "swapped":
        picture = picture[..., [2, 0, 1]]
    elif colours == "one stain empty":
        picture[..., 0] = 0
    tp, fp, fn = counts(field.labels, find_cells(tiny, np.ascontiguousarray(picture)))[0]
    assert tp / (tp + fp + fn) > (0.6 if colours == "one stain empty" else 0.7)


def test_median_diameter_of_known_squares():
    labels = np.zeros((50, 50), int)
    labels[:10, :10], labels[20:30, 20:30], labels[40:, 40:42] = 1, 2, 3
    assert median_diameter(labels) == pytest.approx(2 * np.sqrt(100 / np.pi))
    assert median_diameter(np.zeros((4, 4), int)) is None


@pytest.mark.data
@pytest.mark.slow
def test_finds_nuclei_in_real_pictures(tiny, data_dir):
    """At least 0.80 in fluorescence without a diameter, more with an estimated one; 0.5 in stained tissue."""
    samples = read_folder(data_dir / "dsb2018" / "val")
    table = score(tiny, samples)
    pooled = {}
    for kind in ("fluo", "purple"):
        parts = [table[group] for group in table if group.startswith(kind)]
        for way in ("one pass", "two passes"):
            tp, fp, fn = np.sum([p[way] for p in parts], axis=0)[0]
            pooled[kind, way] = tp / (tp + fp + fn)
    assert pooled["fluo", "one pass"] > 0.80, pooled
    assert pooled["fluo", "two passes"] > 0.83, pooled
    assert pooled["purple", "two passes"] > 0.60, pooled


def test_batch_normalisation_folded_into_the_convolutions_is_the_same_network():
    torch.manual_seed(0)
    net = TinyUNet((8, 12, 16), (1, 1)).eval()
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(), part.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(part.weight), torch.nn.init.normal_(part.bias)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = net(x)[0]
        after = fold_batch_norms(net)(x)[0]
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in net.modules())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
