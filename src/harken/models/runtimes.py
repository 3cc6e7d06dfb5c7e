"""What computes frozen CLIP: torch on the CPU or a GPU, OpenVINO on the CPU; float32 or bfloat16 (`start`).

On the CPU the unit of a pass is one clip's images, or one caption: shapes, and with them every kernel's order of
summation, depend on nothing else, so equal clips have equal bytes whatever the batch, the order or the neighbours, on
one kind of CPU and with one thread. On a GPU passes hold many clips; there nothing is promised beyond rounding.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, TypeVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from harken.engines import n_cores
from harken.errors import ConfigError
from harken.models.clip import Encoder, Towers, Vocabulary, _encode_text, normalise

Precision = Literal["float32", "bfloat16"]
Runtime = Literal["torch", "openvino"]
MAX_THREADS: Final = 8
Key = TypeVar("Key")
Item = TypeVar("Item")
Made = TypeVar("Made")


def version(runtime: Runtime) -> str:
    """`torch 2.11.0`: what computes, without the build's own mark. Raises ConfigError where it is not installed."""
    try:
        return f"{runtime} {importlib.metadata.version(runtime).partition('+')[0]}"
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"params.yaml: embed.runtime: {runtime} is not installed. It comes with the extra `cpu`: "
            "pip install 'harken[cpu]'; or set embed.runtime: torch."
        ) from None


def start(towers: Towers, runtime: Runtime, precision: Precision, device: torch.device) -> Encoder:
    """A frozen CLIP made ready to embed.

    `torch` computes on `device`, `openvino` on the CPU. Raises ConfigError where the runtime is not installed, where it
    cannot compute on the device, or where the CPU lacks what the precision needs.
    """
    if runtime == "torch":
        torch.backends.cudnn.allow_tf32 = False  # by default it rounds the patches' convolution to ten bits
        return towers.to(device, getattr(torch, precision))
    if device.type != "cpu":
        raise ConfigError(
            f"params.yaml: embed.runtime: openvino computes on the CPU, and this run has {device}. Set embed.runtime: "
            "torch to use it, or HARKEN_DEVICE=cpu to leave it."
        )
    return OpenVino.of(towers, precision)


class _Images(nn.Module):
    """What OpenVINO compiles of the image tower: floats in, embeddings out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)


class _Texts(_Images):
    """And of the text tower."""

    def forward(self, tokens: Tensor) -> Tensor:
        return _encode_text(self.model, tokens)


@dataclass(frozen=True)
class OpenVino:
    """CLIP compiled by OpenVINO for one thread, on first use; float32 in and out.

    Where `precision` is bfloat16, the matrix products are: twice as fast, at a cosine of 0.9999 and more.
    """

    towers: Towers
    precision: Precision
    core: Any
    compiled: dict[tuple[type, tuple[int, ...]], Any] = field(default_factory=dict)

    @staticmethod
    def of(towers: Towers, precision: Precision) -> OpenVino:
        version("openvino")
        import openvino

        core = openvino.Core()
        if precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ConfigError(
                "params.yaml: embed.precision: this CPU has no instructions for bfloat16, and OpenVINO would compute "
                "in float32 instead. Set embed.precision: float32, or embed.runtime: torch."
            )
        return OpenVino(towers.to("cpu"), precision, core)

    @property
    def vocabulary(self) -> Vocabulary:
        return self.towers.vocabulary

    @property
    def image_size(self) -> int:
        return self.towers.image_size

    @property
    def embed_dim(self) -> int:
        return self.towers.embed_dim

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def encode_images(self, pixels: UInt8[Tensor, "image 3 size size"]) -> Float[Tensor, "image dim"]:
        x = normalise(pixels)
        return self._run(_Images, x, tuple(x.shape))

    def encode_texts(self, tokens: Int[Tensor, "caption token"]) -> Float[Tensor, "caption dim"]:
        return self._run(_Texts, tokens, (-1, -1))  # one graph for every length: as fast, and compiled once

    def _run(self, tower: type[_Images], x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if (tower, shape) not in self.compiled:
            self.compiled[tower, shape] = self._compile(tower(self.towers.model).eval(), torch.zeros_like(x), shape)
        request = self.compiled[tower, shape]
        request.infer([x.numpy()])
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    def _compile(self, tower: nn.Module, example: Tensor, shape: tuple[int, ...]) -> Any:
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        # the front end itself, because openvino.convert_model reports each use of it to its makers
        front = FrontEndManager().load_by_framework("pytorch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of checks of shapes, which tracing takes as settled
            decoder = TorchScriptPythonDecoder(tower, example_input=example)  # must outlive the conversion
            graph = front.convert(front.load(decoder))
        graph.reshape(list(shape))
        properties = {
            "INFERENCE_NUM_THREADS": 1,  # results must not depend on how many cores there are
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # every worker would pin itself to the same core
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self.precision],
        }
        return self.core.compile_model(graph, "CPU", properties).create_infer_request()


Prepare = Callable[[Item], tuple[Key, Tensor]]


def encoded(encoder: Encoder, groups: Iterable[Item], prepare: Prepare[Item, Key]) -> Iterator[tuple[Key, Tensor]]:
    """Each group's key and its images' embeddings (image, dim), float32, on the CPU, in order.

    `prepare` gives a group's key and its pixels (`clip.crop`); each group is one pass.
    """
    if encoder.device.type != "cpu":
        yield from pipelined(encoder, groups, prepare)
        return
    for group in groups:
        key, pixels = prepare(group)
        yield key, encoder.encode_images(pixels)


def pipelined(encoder: Encoder, groups: Iterable[Item], prepare: Prepare[Item, Key]) -> Iterator[tuple[Key, Tensor]]:
    """The same for a GPU, which must not wait: threads prepare groups ahead, pixels travel as bytes from pinned memory,
    and the next pass is under way before a result is waited for.
    """
    under_way: deque[tuple[Key, Callable[[], Tensor]]] = deque()
    for key, pixels in ahead(partial(_pinned, prepare), groups, threads()):
        vectors = encoder.encode_images(pixels.to(encoder.device, non_blocking=True))
        under_way.append((key, _to_host(vectors)))
        if len(under_way) > 1:
            key, wait = under_way.popleft()
            yield key, wait()
    for key, wait in under_way:
        yield key, wait()


def threads() -> int:
    """How many threads prepare images for one GPU: its share of the cores."""
    return max(1, min(MAX_THREADS, n_cores() // max(1, torch.cuda.device_count())))


def ahead(make: Callable[[Item], Made], items: Iterable[Item], threads: int) -> Iterator[Made]:
    """`make` of each item, in order, made by `threads` threads at most twice as many items ahead."""
    waiting: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pinned(prepare: Prepare[Item, Key], item: Item) -> tuple[Key, Tensor]:
    key, pixels = prepare(item)
    return key, pixels.pin_memory() if torch.cuda.is_available() else pixels


def _to_host(vectors: Tensor) -> Callable[[], Tensor]:
    """Begin to copy to the host, behind what the GPU has to do so far; the returned function waits for just that."""
    if vectors.device.type != "cuda":
        return vectors.cpu
    host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    host.copy_(vectors, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(vectors.device))

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait
