"""Precision, chunks and compilation change no result by more than rounding; operations are counted, not guessed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from harken.errors import ConfigError
from harken.models.audio_vit import AudioViT
from harken.models.losses import infonce
from harken.models.matching import MATCHES
from harken.models.towers import AudioTower, text_similarity
from harken.training.compute import ComputeConfig, Encode, How, peak_flops, prepare, training_flops

N, SEGMENTS, FRAMES, MELS, DIM = 6, 3, 96, 32, 12


pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes: Any) -> ComputeConfig:
    values = {
        "precision": "float32",
        "micro_batch": None,
        "checkpointing": False,
        "fused_attention": True,
        "compile": False,
        "deterministic": False,
    }
    return ComputeConfig.model_validate(values | changes)


def tower(n_segments: int = SEGMENTS, division: str = "segment", **options: Any) -> AudioTower:
    torch.manual_seed(0)
    n_frames = FRAMES if division == "token_pool" else FRAMES // n_segments
    sizes = {"width": 16, "layers": 2, "heads": 2, "embed_dim": DIM, "patch": 16, "stride": (16, 16)}
    vit = AudioViT(**sizes, n_frames=n_frames, n_mels=MELS, **options)  # type: ignore[arg-type]
    return AudioTower(vit, n_segments, division=division)


def fbank(n: int = N) -> Tensor:
    return torch.randn(n, FRAMES, MELS, generator=torch.Generator().manual_seed(1))


def loss_of(model: AudioTower, encode: Encode, how: How, x: Tensor) -> Tensor:
    """InfoNCE of clips with images or texts that are the same at every call."""
    g = torch.Generator().manual_seed(2)
    if how == "pooled":
        sim = text_similarity(torch.randn(len(x), DIM, generator=g).to(x.dtype), encode(x))
    else:
        sim = MATCHES["multiframe"]()(encode(x), torch.randn(len(x), SEGMENTS, DIM, generator=g).to(x.dtype), 0)
    return infonce(model.scaled(sim))


def trained(
    how: How = "segments", dtype: torch.dtype = torch.float64, **changes: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its gradients."""
    cfg = config(**changes)
    model = tower(checkpointing=cfg.checkpointing, fused_attention=cfg.fused_attention).to(dtype)
    loss = loss_of(model, Encode(model, how, cfg), how, fbank().to(dtype))
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference, as a share of the largest number."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a) / max(float(v.abs().max()) for v in b.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", ["segments", "pooled"])
@pytest.mark.parametrize("micro_batch", [1, 2, N - 1, N, N + 3])
def test_chunks_change_neither_loss_nor_gradients(micro_batch: int, how: How, checkpointing: bool) -> None:
    loss, grads = trained(how, micro_batch=micro_batch, checkpointing=checkpointing)
    expected, expected_grads = trained(how)
    assert float(loss) == pytest.approx(float(expected), rel=1e-7)  # the last product is in float32
    assert distance(grads, expected_grads) < 1e-6
    assert len(grads) == len(list(tower().parameters()))


@pytest.mark.parametrize("how", ["segments", "pooled"])
def test_chunks_change_float32_by_rounding_alone(how: How) -> None:
    loss, grads = trained(how, torch.float32, micro_batch=2)
    expected, expected_grads = trained(how, torch.float32)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert distance(grads, expected_grads) < 1e-5


def test_writing_attention_out_changes_rounding_alone() -> None:
    loss, grads = trained(fused_attention=False)
    expected, expected_grads = trained()
    assert float(loss) == pytest.approx(float(expected), rel=1e-7)
    assert distance(grads, expected_grads) < 1e-6


class Held(TorchDispatchMode):
    """The bytes of tensors that were made inside and are still there: now and at the worst."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen and self._seen[key].alive:
            return
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self._seen[key] = weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, n: int) -> None:
        self.now -= n


def bytes_of(**changes: Any) -> tuple[int, int]:
    """What a step on 24 clips keeps between its passes, and the most that it holds."""
    cfg, x = config(**changes), fbank(24)
    model = tower(checkpointing=cfg.checkpointing)
    encode, kept = Encode(model, "segments", cfg), 0

    def keep(saved: Tensor) -> Tensor:
        nonlocal kept
        kept += saved.numel() * saved.element_size()
        return saved

    with Held() as held:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            loss = loss_of(model, encode, "segments", x)
        loss.backward()
    return kept, held.peak


def test_chunks_hold_less_memory() -> None:
    whole, whole_peak = bytes_of()
    kept, peak = bytes_of(micro_batch=4)
    half_kept, half_peak = bytes_of(micro_batch=12)
    assert kept == half_kept  # the FBANK and the losses' own alone
    assert kept - fbank(24).nbytes < whole / 50
    assert peak < half_peak < whole_peak
    assert peak < whole_peak * 0.42
    assert bytes_of(micro_batch=24) == (whole, whole_peak)  # one chunk is not made twice


def test_recomputed_blocks_hold_less_memory() -> None:
    whole, whole_peak = bytes_of()
    kept, peak = bytes_of(checkpointing=True)
    assert kept < whole / 2
    assert peak < whole_peak
    assert bytes_of(checkpointing=True, micro_batch=6)[1] < bytes_of(micro_batch=6)[1]


def test_without_gradients_nothing_is_kept_or_made_twice() -> None:
    model, calls = tower(), []
    model.vit.ln_post.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = Encode(model, "segments", config(micro_batch=4))(fbank())
        expected = model.segments(fbank())
    assert len(calls) == 2 + 1
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("micro_batch", [0, -1])
def test_a_micro_batch_of_nothing_is_refused(micro_batch: int) -> None:
    with pytest.raises(ConfigError, match=rf"compute.micro_batch: {micro_batch} clips; expected 1 or more, or null"):
        Encode(tower(), "segments", config(micro_batch=micro_batch))


@pytest.mark.parametrize("how", ["segments", "pooled"])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_bfloat16_lowers_the_encoder_and_nothing_else(how: How, micro_batch: int | None) -> None:
    model, seen = tower(), set()
    for block in model.vit.transformer.resblocks:
        block.mlp.c_fc.register_forward_hook(lambda _module, _inputs, out: seen.add(out.dtype))  # type: ignore[union-attr]
    encode = Encode(model, how, config(precision="bfloat16", micro_batch=micro_batch))
    encoded = encode(fbank())
    sim = (
        text_similarity(torch.ones(2, DIM), encoded)
        if how == "pooled"
        else MATCHES["multiframe"]()(encoded, torch.randn(N, SEGMENTS, DIM), 0)
    )
    loss = loss_of(model, encode, how, fbank())
    loss.backward()
    assert seen == {torch.bfloat16}
    assert {encoded.dtype, sim.dtype, model.scaled(sim).dtype, loss.dtype} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    expected, expected_grads = trained(how, torch.float32)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=0.03)
    assert float(loss.detach()) != float(expected)
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert distance(grads, expected_grads) < 0.2


def test_float32_is_not_lowered_within_somebody_s_autocast() -> None:
    """A caller's autocast does not reach inside: what `precision` says is so."""
    model, seen = tower(), set()
    model.vit.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        Encode(model, "segments", config())(fbank())
    assert seen == {torch.float32}


# ------------------------------------------------------------------------------------------ how fast, how exact


@pytest.fixture
def as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_determinism_is_set_and_unset(as_before: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    prepare(config(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    loss, grads = trained(micro_batch=2)  # nothing here lacks such a kernel
    again, grads_again = trained(micro_batch=2)
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[k], grads_again[k]) for k in grads)
    prepare(config(deterministic=False))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_workspace_that_was_chosen_is_kept(as_before: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare(config(deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


LIKE_CLIP = {"width": 96, "layers": 4, "heads": 4, "embed_dim": 64, "patch": 32, "stride": (16, 24)}


@pytest.mark.parametrize(
    ("n_segments", "division", "at_pool", "how"),
    [
        (1, "segment", "mean", "segments"),
        (4, "segment", "mean", "segments"),
        (4, "window", "mean", "segments"),
        (4, "token_pool", "mean", "segments"),
        (4, "segment", "mean", "pooled"),
        (4, "segment", "flatten_repeat", "pooled"),
        (4, "segment", "full_clip", "pooled"),
        (4, "token_pool", "full_clip", "pooled"),
    ],
)
def test_operations_are_those_that_torch_counts(n_segments: int, division: str, at_pool: str, how: How) -> None:
    n_frames = 1000 if division == "token_pool" else 1000 // n_segments
    vit = AudioViT(**LIKE_CLIP, n_frames=n_frames, fused_attention=False)  # type: ignore[arg-type]
    model = AudioTower(vit, n_segments, division=division, centres=[0, 1 / 3, 2 / 3, 1], at_pool=at_pool)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        getattr(model, how)(torch.randn(2, 1000, 128))
    with FlopCounterMode(display=False) as both:
        getattr(model, how)(torch.randn(2, 1000, 128)).sum().backward()
    told = training_flops(model, 1000)
    assert told == pytest.approx(3 * forward.get_total_flops() / 2, rel=0.01)
    assert told == pytest.approx(both.get_total_flops() / 2, rel=0.06)  # a little less: the FBANK needs no gradient


@pytest.mark.parametrize(
    ("name", "float32", "bfloat16"),
    [
        ("NVIDIA H100 80GB HBM3", 67e12, 989e12),
        ("NVIDIA H100 PCIe", 51e12, 756e12),
        ("NVIDIA H100 NVL", 60e12, 835e12),
        ("NVIDIA H200", 67e12, 989e12),
        ("NVIDIA A100-SXM4-80GB", 19.5e12, 312e12),
        ("NVIDIA A100 80GB PCIe", 19.5e12, 312e12),
        ("NVIDIA L40S", 91.6e12, 362e12),
        ("NVIDIA A10G", 31.5e12, 70e12),
        ("NVIDIA GeForce RTX 4090", 82.6e12, 165e12),
        ("NVIDIA GeForce RTX 3090", 35.6e12, 71e12),
        ("NVIDIA RTX A1000 Laptop GPU", None, None),
        ("NVIDIA GH200 480GB", None, None),
        ("NVIDIA H20", None, None),
        ("NVIDIA A10", None, None),
        ("Something New", None, None),
    ],
)
def test_a_gpu_s_peak_is_its_maker_s(
    name: str, float32: float | None, bfloat16: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda:0")
    assert peak_flops(gpu, config()) == float32
    assert peak_flops(gpu, config(precision="bfloat16")) == bfloat16
    assert peak_flops(torch.device("cpu"), config()) is None


COMPILED: list[tuple[How, dict[str, Any]]] = [
    ("segments", {}),
    ("segments", {"micro_batch": 4}),  # chunks of 4 and 2
]


@pytest.mark.slow
@pytest.mark.timeout(900)  # most of it is the C++ compiler's
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_is_eager_to_rounding() -> None:
    """In a process of its own: the checks of types at run time, which the tests have, cannot be compiled."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    ran = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert len(found) == len(COMPILED)
    for in_loss, in_gradients, n_graphs in found:
        assert in_loss < 1e-4
        assert in_gradients < 1e-4
        assert n_graphs > 0, "nothing was compiled"


def compare_compiled() -> None:
    """For each way: how far compiled is from eager in the loss and the gradients, and how many graphs were made."""
    found = []
    for how, changes in COMPILED:
        torch.compiler.reset()
        counters.clear()
        loss, grads = trained(how, torch.float32, compile=True, **changes)
        expected, expected_grads = trained(how, torch.float32)
        apart = float((loss - expected).abs() / expected.abs())
        found.append((apart, distance(grads, expected_grads), counters["stats"]["unique_graphs"]))
    print(json.dumps(found))


if __name__ == "__main__":
    from torch._dynamo.utils import counters

    compare_compiled()
