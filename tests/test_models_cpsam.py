"""Cellpose-SAM checkpoints: the right ones load, others are refused; on a small stand-in of the network."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from daskcell import models, training
from daskcell.errors import WeightsError


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """cellpose's own class around a tiny vision transformer."""
    import cellpose.vit
    import torch
    from segment_anything.modeling import ImageEncoderViT

    def build(checkpoint):
        encoder = ImageEncoderViT(
            img_size=1024, patch_size=16, embed_dim=16, depth=2, num_heads=2, out_chans=8, qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=14,
            global_attn_indexes=(1,),
        )  # fmt: skip
        return SimpleNamespace(image_encoder=encoder)

    monkeypatch.setattr(cellpose.vit, "sam_model_registry", {"vit_l": build})
    models.clear_networks()
    yield
    models.clear_networks()


@pytest.fixture
def checkpoint(tmp_path):
    import torch
    from cellpose.vit import CPSAM

    torch.manual_seed(0)
    net = CPSAM()
    net.save_model(tmp_path / "cpsam_v2")
    return tmp_path / "cpsam_v2", net


def test_loaded_network_answers_as_cellposes_own(checkpoint):
    import torch

    path, original = checkpoint
    net = models.load_network(path, dtype=torch.float32)
    x = torch.rand(2, 3, 256, 256)
    with torch.no_grad():
        expected = original.eval()(x)[0]
        found, style = net(x)
    assert torch.allclose(found, expected, atol=1e-6)
    assert style.shape == (2, 256)
    assert models.load_network(path, dtype=torch.float32) is net


def test_runs_through_cellpose_in_bfloat16_by_default(checkpoint):
    import torch
    from cellpose.core import run_net

    net = models.load_network(checkpoint[0])
    assert net.dtype == torch.bfloat16
    y, _ = run_net(net, np.random.default_rng(0).random((1, 300, 280, 3), np.float32), bsize=256)
    assert y.shape == (1, 300, 280, 3)
    assert np.isfinite(y).all()


def test_found_by_name_in_cellposes_folder(checkpoint, monkeypatch):
    import torch

    monkeypatch.setenv("DASKCELL_WEIGHTS", str(checkpoint[0].parent / "nothing"))
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(checkpoint[0].parent))
    assert models.load_network("cpsam_v2").dtype == torch.bfloat16


def test_file_of_several_processes_loads(checkpoint, tmp_path):
    import torch

    _, original = checkpoint
    torch.save({f"module.{k}": v for k, v in original.state_dict().items()}, tmp_path / "parallel")
    net = models.load_network(tmp_path / "parallel", dtype=torch.float32)
    assert torch.equal(net.out.bias, original.out.bias)


def _change(state, how):
    import torch

    if how == "missing":
        del state["encoder.blocks.1.attn.qkv.bias"]
    elif how == "unknown":
        state["encoder.extra"] = torch.zeros(3)
    elif how == "shape":
        state["out.bias"] = torch.zeros(5)
    elif how == "dino":
        state["encoder.cls_token"] = torch.zeros(1)
    return state


@pytest.mark.parametrize(
    ("how", "words"),
    [("missing", "qkv.bias"), ("unknown", "encoder.extra"), ("shape", "out.bias"), ("dino", "DINO")],
)
def test_other_checkpoints_are_refused(checkpoint, tmp_path, how, words):
    import torch

    state = _change(dict(checkpoint[1].state_dict()), how)
    torch.save(state, tmp_path / "wrong")
    with pytest.raises(WeightsError, match=words) as error:
        models.load_network(tmp_path / "wrong")
    assert "\n" not in str(error.value)


def test_cellpose_takes_the_checkpoint_we_refuse(checkpoint, tmp_path):
    """The control: with cellpose's own loader a file that lacks weights goes unnoticed."""
    import torch

    state = _change(dict(checkpoint[1].state_dict()), "missing")
    torch.save(state, tmp_path / "wrong")
    type(checkpoint[1])().load_model(tmp_path / "wrong", device=torch.device("cpu"))


def test_records_of_the_training_set_may_be_missing(checkpoint, tmp_path):
    import torch

    state = {k: v for k, v in checkpoint[1].state_dict().items() if not k.startswith("diam_")}
    torch.save(state, tmp_path / "old")
    assert float(models.load_network(tmp_path / "old", dtype=torch.float32).diam_mean) == 30


@pytest.mark.slow
def test_weights_are_fine_tuned_by_the_command_that_trains_the_embedded_ones(checkpoint, tmp_path):
    import torch

    path, original = checkpoint
    before = path.read_bytes()
    recipe = training.Recipe(
        start=str(path), steps=2, side=256, batch=1, generated=1, generated_side=96, rate=1e-3, warmup=1
    )
    done = training.train_segmenter([], tmp_path / "out", recipe, report=lambda line: None)
    assert path.read_bytes() == before
    net = models.load_network(done.path, dtype=torch.float32)
    assert type(net) is type(original)
    assert not torch.equal(net.encoder.neck[0].weight, original.encoder.neck[0].weight)
    longer = training.Recipe(**{**vars(recipe), "steps": 3})
    assert training.train_segmenter([], tmp_path / "out", longer, report=lambda line: None).steps == 3


class _Evil:
    def __reduce__(self):
        return (print, ("code ran while loading",))


@pytest.mark.parametrize("content", ["list", "other tensors", "code", "bytes"])
def test_files_of_something_else_are_refused(tmp_path, content, capsys):
    import torch

    path = tmp_path / "file.pt"
    things = {"list": [1, 2], "other tensors": {"weight": torch.zeros(2)}, "code": {"W2": _Evil()}}
    if content == "bytes":
        path.write_bytes(b"\x00" * 100)
    else:
        torch.save(things[content], path)
    with pytest.raises(WeightsError, match=r"file\.pt"):
        models.load_network(path)
    assert "code ran" not in capsys.readouterr().out
