"""Weights: where they are looked for, how they are refused, how they come."""

from __future__ import annotations

import hashlib
import http.server
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from daskcell import models
from daskcell.errors import ComputeError, WeightsError
from daskcell.models import registry, weights_file


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    """No weights of this machine's user are seen."""
    for variable in ("DASKCELL_WEIGHTS", "CELLPOSE_LOCAL_MODELS_PATH", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    models.clear_networks()
    yield
    models.clear_networks()


def test_importing_the_room_does_not_import_torch():
    code = "import sys, daskcell.models as m; m.list_weights(); sys.exit('torch' in sys.modules)"
    start = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert time.perf_counter() - start < 20


def test_embedded_weights_are_small_and_hold_no_pickle():
    files = sorted(registry.EMBEDDED.glob("*.npz"))
    assert {"tiny.npz", "tiny_encoder.npz"} <= {f.name for f in files}
    assert sum(f.stat().st_size for f in files) < 8e6
    for file in files:
        weights, kind, note = weights_file.load_weights(file)  # allow_pickle=False inside
        assert kind.startswith("daskcell-")
        assert note
        assert all(np.isfinite(a).all() for a in weights.values())


def test_list_says_what_is_here_and_how_to_get_the_rest(tmp_path):
    entries = {(w.name, w.path.name): w for w in models.list_weights()}
    assert entries["tiny", "tiny.npz"].present
    cpsam = entries["cpsam_v2", "cpsam_v2"]
    assert not cpsam.present
    assert cpsam.fetch == "daskcell weights fetch cpsam_v2"
    assert "CC-BY-NC" in cpsam.licence
    (tmp_path / "CELLPOSE_LOCAL_MODELS_PATH").mkdir()
    (tmp_path / "CELLPOSE_LOCAL_MODELS_PATH" / "cpsam_v2").write_bytes(b"x")
    cpsam = next(w for w in models.list_weights() if w.name == "cpsam_v2")
    assert cpsam.present
    assert cpsam.fetch == ""


@pytest.mark.parametrize("name", ["cpsam_v2", "cpsam"])
def test_missing_cellpose_weights_name_the_command(name):
    with pytest.raises(WeightsError, match=f"daskcell weights fetch {name}"):
        models.load_network(name)


def test_missing_resnet_names_the_command():
    with pytest.raises(WeightsError, match="daskcell weights fetch resnet152"):
        models.load_encoder("resnet152")


def test_a_bare_name_takes_what_is_at_hand_and_a_full_one_nothing_else(tmp_path):
    folder = tmp_path / "TORCH_HOME" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "resnet152-f82ba261.pth").write_bytes(b"x")
    assert models.find_encoder("resnet152") == folder / "resnet152-f82ba261.pth"
    assert models.find_encoder("resnet152@IMAGENET1K_V2") == folder / "resnet152-f82ba261.pth"
    with pytest.raises(WeightsError, match="resnet152@IMAGENET1K_V2', which is here"):
        models.find_encoder("resnet152@IMAGENET1K_V1")
    (folder / "resnet152-394f9c45.pth").write_bytes(b"y")
    assert models.find_encoder("resnet152") == folder / "resnet152-394f9c45.pth"


def test_known_addresses_agree_with_torchvision():
    import torchvision

    for name, releases in registry._KNOWN.items():
        assert releases == {w.name: w.url for w in torchvision.models.get_model_weights(name)}


@pytest.mark.parametrize("name", ["nothing", "no/such/file.npz"])
def test_unknown_models_are_refused(name):
    with pytest.raises(WeightsError, match="neither one of"):
        models.load_network(name)


@pytest.mark.parametrize("name", ["resnet9000", "resnet152@IMAGENET1K_V9", "no/such/file.npz"])
def test_unknown_encoders_are_refused(name):
    with pytest.raises(WeightsError):
        models.load_encoder(name)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_absent_devices_are_refused(device):
    import torch

    if device != "gpu" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ComputeError):
        models.load_network("tiny", device=device)


@pytest.mark.parametrize(
    "content",
    [b"", b"not weights at all", b"PK\x03\x04 torn zip", "truncated", "no kind", "other kind", "pickle"],
)
def test_damaged_or_foreign_files_are_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "net.npz"
    whole = (registry.EMBEDDED / "tiny.npz").read_bytes()
    if content == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "no kind":
        np.savez(path, a=np.zeros(3))
    elif content == "other kind":
        path.write_bytes((registry.EMBEDDED / "tiny_encoder.npz").read_bytes())
    elif content == "pickle":
        np.savez(path, a=np.array([{"evil": 1}], dtype=object))
    else:
        path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        models.load_network(path)
    assert "net.npz" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_tensor_and_nan_are_refused(tmp_path):
    weights, kind, _ = weights_file.load_weights(registry.EMBEDDED / "tiny.npz")
    lacking = {k: v for k, v in weights.items() if k != "out.bias"}
    with pytest.raises(WeightsError, match="out"):
        models.load_network(weights_file.save_weights(tmp_path / "a.npz", lacking, kind))
    broken = dict(weights, **{"out.bias": np.full(3, np.nan, np.float32)})
    with pytest.raises(WeightsError, match="finite"):
        models.load_network(weights_file.save_weights(tmp_path / "b.npz", broken, kind))


def test_fingerprint_is_of_the_values_not_of_the_file(tmp_path):
    weights, kind, note = weights_file.load_weights(registry.EMBEDDED / "tiny.npz")
    copy = weights_file.save_weights(
        tmp_path / "copy.npz", dict(reversed(list(weights.items()))), kind, note + " copied"
    )
    assert models.network_fingerprint(copy) == models.network_fingerprint("tiny")
    changed = dict(weights, **{"out.bias": weights["out.bias"] + 1})
    other = weights_file.save_weights(tmp_path / "other.npz", changed, kind)
    assert models.network_fingerprint(other) != models.network_fingerprint("tiny")


def test_a_file_written_anew_is_loaded_anew(tmp_path):
    weights, kind, _ = weights_file.load_weights(registry.EMBEDDED / "tiny.npz")
    path = weights_file.save_weights(tmp_path / "net.npz", weights, kind)
    first = models.load_network(path)
    assert models.load_network(path) is first
    weights_file.save_weights(path, dict(weights, **{"out.bias": weights["out.bias"] + 1}), kind, "longer")
    second = models.load_network(path)
    assert second is not first
    assert not np.allclose(second.out.bias.numpy(), first.out.bias.numpy())


@pytest.fixture
def server(tmp_path):
    """A web server on this machine; gives its address and folder."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/", folder
        httpd.shutdown()


def test_fetch_checks_the_hash_and_leaves_nothing_half(server, tmp_path, monkeypatch):
    address, folder = server
    content = b"weights" * 1000
    digest = hashlib.sha256(content).hexdigest()
    good, bad = f"net-{digest[:8]}.pth", "net-00000000.pth"
    for name in (good, bad):
        (folder / name).write_bytes(content)
    monkeypatch.setitem(registry._KNOWN, "net", {"IMAGENET1K_V1": address + good, "BAD": address + bad})
    lines: list[str] = []
    path = models.fetch_weights("net", report=lines.append)
    assert path.read_bytes() == content
    assert path.parent == registry.torch_folder()
    assert lines
    lines.clear()
    assert models.fetch_weights("net", report=lines.append) == path
    assert not lines, "fetched a second time"
    with pytest.raises(WeightsError, match="sha256"):
        models.fetch_weights("net@BAD", report=lines.append)
    assert [p.name for p in path.parent.iterdir()] == [good]


def test_fetch_without_connection_says_so(monkeypatch):
    monkeypatch.setitem(registry._KNOWN, "net", {"IMAGENET1K_V1": "http://127.0.0.1:9/net-00000000.pth"})
    with pytest.raises(WeightsError, match="Cannot fetch"):
        models.fetch_weights("net", report=lambda line: None)


def test_unknown_weights_are_not_fetched():
    with pytest.raises(WeightsError, match="no weights called 'nothing'"):
        models.fetch_weights("nothing")


def test_fetched_cellpose_weights_are_found(server, monkeypatch):
    address, folder = server
    (folder / "cpsam_v2").write_bytes(b"weights")
    remote = registry._Remote("segments", "a licence", address + "cpsam_v2")
    monkeypatch.setitem(registry._CELLPOSE_REMOTE, "cpsam_v2", remote)
    lines: list[str] = []
    path = models.fetch_weights("cpsam_v2", report=lines.append)
    assert models.find_network("cpsam_v2") == path
    assert "a licence" in lines[0]
