"""What computes CLIP may be chosen; what it computes may not depend on anything but the clip, and nobody is told."""

from __future__ import annotations

import importlib.metadata
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harken.errors import ConfigError
from harken.models import clip, runtimes

CPU = torch.device("cpu")
CAPTIONS = ["a dog barks", "a man speaks while a dog barks and birds sing", "rain", "a train passes by, then a horn"]
CHOICES = [("torch", "float32"), ("torch", "bfloat16"), ("openvino", "float32"), ("openvino", "bfloat16")]


def has_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def needs(runtime: str, precision: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="it comes with the extra `cpu`")
        if precision == "bfloat16" and not has_bf16():
            pytest.skip("this CPU has no bfloat16")


def small() -> clip.Towers:
    vocabulary = clip.Vocabulary.of(CAPTIONS, 24)
    config = clip.small_config(
        vocab_size=vocabulary.size, image_size=32, width=64, layers=1, embed_dim=32, text_layers=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return clip._towers(clip.build(config), vocabulary, config)


def clips(n: int, size: int = 32, seed: int = 0) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [[rng.integers(0, 256, (size, size + 12, 3), np.uint8) for _ in range(4)] for _ in range(n)]


@pytest.fixture(scope="module", params=CHOICES, ids="-".join)
def encoder(request: pytest.FixtureRequest) -> clip.Encoder:
    needs(*request.param)
    return runtimes.start(small(), *request.param, CPU)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b).min())


def each_alone_and_among_others(encoder: clip.Encoder, given: list[list[np.ndarray]], captions: list[str]) -> None:
    """The 0 ulp promise: by itself, after others, in another order."""
    alone = [clip.image_embeddings(encoder, c) for c in given]
    for i in reversed(range(len(given))):
        assert torch.equal(clip.image_embeddings(encoder, given[i]), alone[i])
    texts = torch.cat([clip.text_embeddings(encoder, [c]) for c in captions])
    assert torch.equal(clip.text_embeddings(encoder, captions), texts)
    assert torch.equal(clip.text_embeddings(encoder, captions[::-1], batch=1), texts.flip(0))
    assert torch.equal(clip.text_embeddings(encoder, captions * 2, batch=64), texts.repeat(2, 1))


def test_the_same_clip_has_the_same_bytes(encoder: clip.Encoder) -> None:
    each_alone_and_among_others(encoder, clips(3), CAPTIONS)


def test_made_again_it_computes_the_same(encoder: clip.Encoder, request: pytest.FixtureRequest) -> None:
    given = clips(1)[0]
    again = runtimes.start(small(), *request.node.callspec.params["encoder"], CPU)
    assert torch.equal(clip.image_embeddings(again, given), clip.image_embeddings(encoder, given))


def test_it_computes_what_open_clip_does(encoder: clip.Encoder, request: pytest.FixtureRequest) -> None:
    _, precision = request.node.callspec.params["encoder"]
    plain, given = small(), clips(6)
    with torch.no_grad():
        images = plain.model.encode_image(clip.preprocess([picture for c in given for picture in c], 32))
        texts = plain.model.encode_text(plain.vocabulary(CAPTIONS))
    found = (
        torch.cat([clip.image_embeddings(encoder, c) for c in given]),
        clip.text_embeddings(encoder, CAPTIONS),
    )
    assert {f.dtype for f in found} == {torch.float32}
    assert encoder.device == CPU
    for f, true in zip(found, (images, texts), strict=True):
        assert cosine(f, true) > (0.999999 if precision == "float32" else 0.9999)
        assert precision == "float32" or cosine(f, true) < 0.9999999  # bfloat16 that changes nothing is none


def test_a_missing_runtime_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    assert runtimes.version("torch") == f"torch {torch.__version__.partition('+')[0]}"
    monkeypatch.setattr("importlib.metadata.version", gone)
    with pytest.raises(ConfigError, match=r"embed\.runtime: openvino.*pip install 'harken\[cpu\]'"):
        runtimes.start(small(), "openvino", "float32", CPU)


def test_openvino_leaves_no_gpu_idle_unsaid() -> None:
    with pytest.raises(ConfigError, match=r"computes on the CPU, and this run has cuda:1\. Set embed\.runtime: torch"):
        runtimes.start(small(), "openvino", "float32", torch.device("cuda:1"))


def test_a_cpu_without_bfloat16_is_refused_it(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino", reason="it comes with the extra `cpu`")

    class Old:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "INT8", "BIN"]

    monkeypatch.setattr(openvino, "Core", Old)
    with pytest.raises(ConfigError, match="no instructions for bfloat16"):
        runtimes.start(small(), "openvino", "bfloat16", CPU)


def test_nothing_is_reported_to_its_makers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="it comes with the extra `cpu`")
    import openvino_telemetry
    from openvino.tools.ovc import telemetry_utils

    def told(*_: Any, **__: Any) -> None:
        raise AssertionError("telemetry")

    monkeypatch.setattr(openvino_telemetry.Telemetry, "__init__", told)
    monkeypatch.setattr(telemetry_utils, "init_telemetry_class", told)
    encoder = runtimes.start(small(), "openvino", "float32", CPU)
    clip.image_embeddings(encoder, clips(1)[0])


def test_what_is_made_ahead_comes_in_order_and_not_too_early() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def items() -> Iterator[int]:
        for i in range(20):
            with lock:
                begun.append(i)
            yield i

    def slow_first(i: int) -> int:
        time.sleep(0.02 if i % 3 == 0 else 0)
        return i * i

    found = runtimes.ahead(slow_first, items(), 3)
    assert next(found) == 0
    assert len(begun) <= 6
    assert list(found) == [i * i for i in range(1, 20)]


def test_an_error_ahead_is_the_caller_s() -> None:
    def divide(i: int) -> float:
        return 1 / (3 - i)

    found = runtimes.ahead(divide, range(1000), 2)
    assert [next(found) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)


@pytest.mark.parametrize("how", ["encoded", "pipelined"])
def test_groups_of_clips_keep_their_keys(how: str) -> None:
    encoder, given = small(), clips(5)
    groups = [given[:2], given[2:4], given[4:]]

    def prepare(group: list[list[np.ndarray]]) -> tuple[int, Tensor]:
        return len(group), clip.crop([picture for c in group for picture in c], 32)

    found = list(getattr(runtimes, how)(encoder, groups, prepare))
    assert [key for key, _ in found] == [2, 2, 1]
    true = torch.cat([clip.image_embeddings(encoder, c) for c in given])
    torch.testing.assert_close(torch.cat([f for _, f in found]), true, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_computes_the_same_to_rounding(precision: runtimes.Precision) -> None:
    given = clips(9)
    true = torch.cat([clip.image_embeddings(small(), c) for c in given])
    texts = clip.text_embeddings(small(), CAPTIONS)
    encoder = runtimes.start(small(), "torch", precision, torch.device("cuda"))

    def prepare(group: list[list[np.ndarray]]) -> tuple[None, Tensor]:
        return None, clip.crop([picture for c in group for picture in c], 32)

    found = torch.cat([f for _, f in runtimes.encoded(encoder, [given[:4], given[4:8], given[8:]], prepare)])
    assert found.device == CPU
    assert cosine(found, true) > 0.9999
    assert cosine(clip.text_embeddings(encoder, CAPTIONS, batch=3), texts) > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(("runtime", "precision"), CHOICES)
def test_the_papers_clip_has_the_same_bytes_too(runtime: runtimes.Runtime, precision: runtimes.Precision) -> None:
    import open_clip

    needs(runtime, precision)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = clip.build(open_clip.get_model_config("ViT-B-32-quickgelu"))
    towers = clip._towers(model, clip.Vocabulary(77), None)
    given = clips(3, 224)
    with torch.no_grad():
        true = torch.cat([model.encode_image(clip.preprocess(c, 224)) for c in given])
    encoder = runtimes.start(towers, runtime, precision, CPU)
    found = [clip.image_embeddings(encoder, c) for c in given]
    assert cosine(torch.cat(found), true) > 0.9999
    clip.image_embeddings(encoder, given[0][:1])  # a pass of another shape between leaves no trace
    each_alone_and_among_others(encoder, given, CAPTIONS)
    assert torch.equal(clip.image_embeddings(encoder, given[0]), found[0])
