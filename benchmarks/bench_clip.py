"""CLIP ViT-B/32's image tower: harken's runtimes against open_clip as it comes (eager, float32).

Weights are random: neither speed nor rounding asks what they have learnt. On the CPU every runtime has one thread, and
harken's passes hold one clip (four images), open_clip's sixteen images, which suits it best. On a GPU (`--device cuda`)
all batches are tried, with images decoded from JPEG and without, and MFU is of the GPU's dense peak for the precision.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor

import interleaved
from harken.media.images import jpeg, read_jpeg
from harken.models import clip, runtimes

NAME, SIZE, PER_CLIP, N_IMAGES = "ViT-B-32-quickgelu", 224, 4, 16
TOKENS, WIDTH, LAYERS, PATCH, DIM = 50, 768, 12, 32, 512
# multiplications and additions: attention's four matrices and the two of four times the width, scores and their use,
# patches, projection
FLOP = 2 * (LAYERS * TOKENS * (12 * WIDTH**2 + 2 * TOKENS * WIDTH) + (TOKENS - 1) * 3 * PATCH**2 * WIDTH + WIDTH * DIM)
BATCHES = (64, 128, 256, 512, 1024)
# dense TFLOP/s from NVIDIA's data sheets, by a part of the device's name, the more special one first
PEAKS = {
    "H100 PCIe": {"float32": 51.2, "tf32": 378.0, "bfloat16": 756.0},
    "H100 NVL": {"float32": 60.0, "tf32": 417.5, "bfloat16": 835.5},
    "H100": {"float32": 66.9, "tf32": 494.7, "bfloat16": 989.4},
    "H200": {"float32": 66.9, "tf32": 494.7, "bfloat16": 989.4},
    "A100": {"float32": 19.5, "tf32": 156.0, "bfloat16": 312.0},
    "L40S": {"float32": 91.6, "tf32": 183.0, "bfloat16": 362.0},
    "L40": {"float32": 90.5, "tf32": 90.5, "bfloat16": 181.0},
    "L4": {"float32": 30.3, "tf32": 60.5, "bfloat16": 121.0},
}


def towers() -> clip.Towers:
    torch.manual_seed(0)
    model = clip.build(open_clip.get_model_config(NAME))
    return clip.Towers(clip.freeze(model), clip.Vocabulary(77), SIZE, WIDTH // 64, DIM)


def pictures(n: int) -> list[bytes]:
    """JPEGs as `extract` stores them: the short side is the model's."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        noise = Image.fromarray(rng.integers(0, 256, (24, 42, 3), np.uint8))
        found.append(jpeg(np.asarray(noise.resize((398, SIZE), Image.Resampling.BICUBIC)), 95))
    return found


def by_clip(encoder: clip.Encoder, images: list[np.ndarray]) -> Tensor:
    clips = [images[i : i + PER_CLIP] for i in range(0, len(images), PER_CLIP)]
    return torch.cat([clip.image_embeddings(encoder, c) for c in clips])


def on_the_cpu() -> None:
    """Images a second and core, and how far each is from open_clip's numbers."""
    torch.set_num_threads(1)
    stored = pictures(N_IMAGES)
    images = [read_jpeg(data) for data in stored]
    peer = towers()
    pixels = clip.preprocess(images, SIZE)

    @torch.no_grad()
    def eager() -> Tensor:
        return peer.model.encode_image(pixels)

    cpu = torch.device("cpu")
    contestants: dict[str, Callable[[], Tensor]] = {"open_clip, eager float32": eager}
    has_openvino = importlib.util.find_spec("openvino") is not None
    for runtime in ("torch", "openvino") if has_openvino else ("torch",):
        for precision in ("float32", "bfloat16"):
            encoder = runtimes.start(towers(), runtime, precision, cpu)
            contestants[f"harken, {runtime} {precision}"] = partial(by_clip, encoder, images)
    if not has_openvino:
        print("openvino is not installed, so it is left out: pip install 'harken[cpu]'")

    true = eager()
    cosines = {n: float(torch.cosine_similarity(run(), true).min()) for n, run in contestants.items()}
    medians = interleaved.measure({**contestants, "JPEG to pixels": lambda: clip.crop([*map(read_jpeg, stored)], SIZE)})
    name = "open_clip, eager float32"
    print(f"{NAME}, {FLOP / 1e9:.2f} GFLOP an image, harken by clips of {PER_CLIP}\n{interleaved.machine()}")
    for who, seconds in medians.items():
        ms = seconds / N_IMAGES * 1e3
        print(
            f"  {who:<28} {ms:7.1f} CPU ms an image {1e3 / ms:7.1f} images/s/core {medians[name] / seconds:6.2f} x"
            + (f"   cosine >= {cosines[who]:.6f}" if who in cosines else "")
        )


def on_a_gpu(device: torch.device, batches: list[int], peak_tflops: float | None) -> None:
    """Images a second and MFU, for each precision and batch, of the tower alone and from JPEG on."""
    gpu = torch.cuda.get_device_name(device)
    peaks = next((p for part, p in PEAKS.items() if part in gpu), {})
    n_threads = runtimes.threads()
    print(f"{NAME}, {FLOP / 1e9:.2f} GFLOP an image, {gpu}, {n_threads} threads decode, median of {interleaved.ROUNDS}")
    stored = pictures(64)
    peer = towers()
    true = by_clip(peer, [read_jpeg(data) for data in stored])
    for precision in ("float32", "tf32", "bfloat16"):
        encoder = runtimes.start(towers(), "torch", "float32" if precision == "tf32" else precision, device)
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        peak = peak_tflops or peaks.get(precision)
        for batch in batches:
            pixels = clip.crop([read_jpeg(stored[i % len(stored)]) for i in range(batch)], SIZE).to(device)
            found = encoder.encode_images(pixels)[: len(stored)].cpu()
            cosine = float(torch.cosine_similarity(found, true[: len(found)]).min())
            n = max(4, 8192 // batch)
            tower = _rate(lambda e=encoder, p=pixels, n=n: _passes(e, p, n), n * batch)
            decoded = _rate(lambda e=encoder, b=batch, n=n: _from_jpeg(e, stored, b, n), n * batch)
            mfu = f"{tower * FLOP / peak / 1e12:6.1%} of {peak:g} TFLOP/s" if peak else "(give --peak-tflops for MFU)"
            print(
                f"  {precision:<9} batch {batch:5d} {tower:9.0f} images/s, MFU {mfu}; "
                f"from JPEG {decoded:8.0f} images/s; cosine >= {cosine:.6f}"
            )


def _passes(encoder: clip.Encoder, pixels: Tensor, n: int) -> None:
    for _ in range(n):
        encoder.encode_images(pixels)


def _from_jpeg(encoder: clip.Encoder, stored: list[bytes], batch: int, n: int) -> None:
    def groups() -> Iterator[list[bytes]]:
        for _ in range(n):
            yield [stored[i % len(stored)] for i in range(batch)]

    def prepare(group: list[bytes]) -> tuple[None, Tensor]:
        return None, clip.crop([read_jpeg(data) for data in group], SIZE)

    for _ in runtimes.encoded(encoder, groups(), prepare):
        pass


def _rate(run: Callable[[], None], n_images: int) -> float:
    """Images a second: the median of some rounds after one that warms up."""
    seconds = []
    for i in range(interleaved.ROUNDS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if i:
            seconds.append(time.perf_counter() - began)
    return n_images / statistics.median(seconds)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    options.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    options.add_argument("--peak-tflops", type=float, help="the GPU's dense peak, where it is not known here")
    given = options.parse_args()
    if torch.device(given.device).type == "cpu":
        on_the_cpu()
    else:
        on_a_gpu(torch.device(given.device), list(given.batches), given.peak_tflops)


if __name__ == "__main__":
    main()
