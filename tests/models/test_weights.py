"""Weights on disk: what was saved comes back, and what is not what it claims is refused with a reason."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harken.errors import DataError
from harken.models import weights
from harken.models.panns import Cnn14, ResNet38


def test_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    state = {"b": torch.randn(3, 2).T, "a": torch.tensor(1.5)}
    for name in ("one", "two"):
        weights.save(
            tmp_path / name, state if name == "one" else dict(reversed(state.items())), {"z": 1, "epoch": [1, "é"]}
        )
    back, meta = weights.load(tmp_path / "one")
    assert meta == {"z": 1, "epoch": [1, "é"]}
    assert all(torch.equal(back[k], state[k]) for k in state)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_what_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such weights file"):
        weights.load(tmp_path / "none")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(DataError, match="not a safetensors file"):
        weights.load(tmp_path / "text")
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(DataError, match="harken did not write"):
        weights.load(tmp_path / "foreign")
    weights.save(tmp_path / "other", {"weight": torch.zeros(2, 3)}, {})
    with pytest.raises(DataError, match="does not fit Linear") as e:
        weights.load_into(torch.nn.Linear(3, 4), tmp_path / "other")
    rows = [line.split(maxsplit=1) for line in str(e.value).splitlines()[1:]]
    assert [(k, " ".join(v.split())) for k, v in rows] == [
        ("key", "found expected"),
        ("bias", "none (4,)"),
        ("weight", "(2, 3) (4, 3)"),
    ]


def upstream(model: torch.nn.Module, n_fft: int = 1024) -> dict[str, torch.Tensor]:
    front = {
        "spectrogram_extractor.stft.conv_real.weight": torch.zeros(n_fft // 2 + 1, 1, n_fft),
        "spectrogram_extractor.stft.conv_imag.weight": torch.zeros(n_fft // 2 + 1, 1, n_fft),
        "logmel_extractor.melW": torch.zeros(n_fft // 2 + 1, 64),
    }
    return front | model.state_dict()


@pytest.mark.parametrize("cls", [Cnn14, ResNet38])
def test_a_panns_checkpoint_loads_whole(cls, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = cls(n_classes=5, width=1), cls(n_classes=5, width=1)
    torch.save({"iteration": 600000, "model": upstream(source)}, tmp_path / "x.pth")
    weights.load_panns(target, tmp_path / "x.pth")
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_panns_checkpoints_of_another_front_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": upstream(Cnn14(n_classes=5, width=1), n_fft=512)}, path)
    with pytest.raises(DataError, match="512 samples"):
        weights.load_panns(Cnn14(n_classes=5, width=1), path)
    torch.save({"model": upstream(Cnn14(n_classes=5, width=1, n_mels=32))}, path)
    with pytest.raises(DataError, match="32 mel bins"):
        weights.load_panns(Cnn14(n_classes=5, width=1), path)
    torch.save({"model": upstream(Cnn14(n_classes=5, width=2))}, path)
    with pytest.raises(DataError, match="does not fit Cnn14"):
        weights.load_panns(Cnn14(n_classes=5, width=1), path)
    for wrong in ({"state": {}}, [1, 2], {"model": {"conv.weight": torch.zeros(1)}}):
        torch.save(wrong, path)
        with pytest.raises(DataError, match="not a PANNs checkpoint"):
            weights.load_panns(Cnn14(n_classes=5, width=1), path)
    with pytest.raises(DataError, match="zenodo"):
        weights.load_panns(Cnn14(n_classes=5, width=1), tmp_path / "none.pth")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


def test_a_checkpoint_that_would_run_code_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "evil.pth").read_bytes()[:100])
    for name in ("evil.pth", "short.pth"):
        with pytest.raises(DataError, match="read safely"):
            weights.load_panns(Cnn14(n_classes=5, width=1), tmp_path / name)
    assert not (tmp_path / "ran").exists()


BODY = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/missing":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY if self.path == "/whole" else BODY[:1000])

        def log_message(self, *args: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()


def test_a_download_is_kept_only_if_it_is_the_promised_one(server: str, tmp_path: Path) -> None:
    right, path = hashlib.sha256(BODY).hexdigest(), tmp_path / "deep" / "w.pth"
    for url, digest, words in (
        (f"{server}/whole", "0" * 64, "nothing was kept"),
        (f"{server}/short", right, "w.pth|nothing was kept"),
        (f"{server}/missing", right, "404"),
        ("http://127.0.0.1:9/x", right, "by hand"),
    ):
        with pytest.raises(DataError, match=words):
            weights.download(url, digest, path, timeout_s=5.0)
        assert not path.exists()
        assert not list(tmp_path.glob("deep/*"))
    assert weights.download(f"{server}/whole", right, path).read_bytes() == BODY
    assert weights.download("http://127.0.0.1:9/not-asked", right, path) == path  # already there


def test_an_unknown_open_clip_model_is_refused() -> None:
    with pytest.raises(DataError, match="-quickgelu"):
        weights.open_clip_pretrained("ViT-B-33", "openai")
