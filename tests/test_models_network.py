"""The embedded segmenter: its contract with cellpose, and that it finds cells."""

from __future__ import annotations

import numpy as np
import pytest

from daskcell import models
from daskcell.evaluation import score_pair
from daskcell.evaluation.generated import synthesize_field
from daskcell.segmentation import segment
from daskcell.training.segmenter_data import read_samples


@pytest.fixture(scope="module")
def tiny():
    return models.load_network("tiny")


def test_forward_gives_flows_and_a_style_of_zeros(tiny):
    import torch

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


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(100, 90), (256, 256), (300, 270)])
def test_runs_through_cellposes_tiles(tiny, shape):
    from cellpose.core import run_net

    image = np.random.default_rng(0).random((1, *shape, 3), np.float32)
    y, _ = run_net(tiny, image, bsize=256)
    assert y.shape == (1, *shape, 3)
    assert np.isfinite(y).all()


def test_same_answer_twice_and_from_a_fresh_copy(tiny):
    import torch

    x = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    first = tiny(x)[0]
    models.clear_networks()
    assert torch.equal(models.load_network("tiny")(x)[0], first)


def test_bfloat16_weights_are_possible():
    import torch

    net = models.load_network("tiny", dtype=torch.bfloat16)
    assert net.dtype == torch.bfloat16
    y, style = net(torch.rand(1, 3, 64, 64, dtype=torch.bfloat16))
    assert y.dtype == style.dtype == torch.bfloat16


def usual_colors(field):
    """``(3, Y, X)``: the four stains of a generated field as red, green, blue and cyan."""
    c = field.channels.astype(np.float32)
    return np.stack([c[0], c[1] + c[3], c[2] + c[3]])


def average_precision(truth, image, network="tiny", diameter=None):
    return score_pair(truth, segment(image, model=network, diameter=diameter))[0.5].ap


@pytest.mark.slow
def test_an_untrained_network_fails_where_the_embedded_one_succeeds():
    from daskcell.models.unet import TinyUNet

    field = synthesize_field((384, 384), seed=2026)
    assert average_precision(field.labels, usual_colors(field)) > 0.87
    part = np.s_[:192, :192]
    image = usual_colors(field)[:, *part]
    assert average_precision(field.labels[part], image, TinyUNet().eval()) < 0.15


def test_a_constant_image_has_no_cells():
    assert not np.asarray(segment(np.zeros((3, 128, 128), np.float32), diameter=None)).any()


@pytest.mark.slow
@pytest.mark.parametrize("colors", ["usual", "grey", "inverted", "swapped", "one stain empty"])
def test_colors_do_not_matter_much(colors):
    field = synthesize_field((256, 256), seed=7, cells=26)
    image = usual_colors(field)
    if colors == "grey":
        image = image.mean(0, keepdims=True)
    elif colors == "inverted":
        image = image.max() - image
    elif colors == "swapped":
        image = image[[2, 0, 1]]
    elif colors == "one stain empty":
        image[0] = 0
    assert average_precision(field.labels, image) > (0.6 if colors == "one stain empty" else 0.7)


@pytest.mark.data
@pytest.mark.slow
def test_finds_nuclei_in_real_images(data_dir):
    """At least 0.80 in fluorescence without a diameter, more with an estimated one; 0.6 in stained tissue."""
    totals = {}
    for sample in read_samples([data_dir / "dsb2018" / "val"]):
        kind = sample.group[:4]
        for diameter in (None, "auto") if kind == "fluo" else ("auto",):
            found = segment(sample.channels, diameter=diameter)
            counts = score_pair(sample.labels, found)[0.5]
            key = kind, diameter
            totals[key] = totals[key] + counts if key in totals else counts
    ap = {key: counts.ap for key, counts in totals.items()}
    assert ap["fluo", None] > 0.80, ap
    assert ap["fluo", "auto"] > 0.83, ap
    assert ap["purp", "auto"] > 0.60, ap


def test_batch_normalisation_folded_into_the_convolutions_is_the_same_network():
    import torch

    from daskcell.models.unet import TinyUNet, fold_batch_norms

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
