"""Four images and the sound of a 10 s clip: harken against PyAV decoding every picture and torchaudio.

harken decodes only the groups of pictures that hold a wanted image. The sound goes from 44.1 to 32 kHz: by soxr VHQ in
harken, by torchaudio's default kernel (cheaper and less sharp) and by its kaiser_best setting in the peer.
"""

from __future__ import annotations

import io
import tempfile
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torchaudio.functional

import interleaved
from harken.media.decode import decode
from harken.media.images import image_times

START_S, END_S, N_IMAGES = 1.0, 11.0, 4
RATE_IN_HZ, RATE_OUT_HZ = 44_100, 32_000
FPS, SIZE, KEY_FRAME_EVERY = 25, (320, 240), 250
KAISER_BEST = {
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 14.769656459379492,
}


def recording(seconds: float) -> bytes:
    """H.264 and AAC in MP4: a moving bright square over noise, stereo noise."""
    rng = np.random.default_rng(0)
    width, height = SIZE
    base = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.mp4"
        with av.open(str(path), "w") as out:
            video: Any = out.add_stream("libx264", rate=FPS)
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            video.gop_size, video.options = KEY_FRAME_EVERY, {"preset": "veryfast"}
            audio: Any = out.add_stream("aac", rate=RATE_IN_HZ)
            audio.layout = "stereo"
            for i in range(round(seconds * FPS)):
                picture = base.copy()
                picture[40:120, (3 * i) % (width - 80) :][:, :80] = 230
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, FPS)
                out.mux(video.encode(frame))
                sound = (0.1 * rng.standard_normal((2, RATE_IN_HZ // FPS))).astype(np.float32)
                chunk = av.AudioFrame.from_ndarray(sound, format="fltp", layout="stereo")
                chunk.sample_rate, chunk.pts, chunk.time_base = RATE_IN_HZ, i * sound.shape[1], Fraction(1, RATE_IN_HZ)
                out.mux(audio.encode(chunk))
            out.mux(video.encode(None))
            out.mux(audio.encode(None))
        return path.read_bytes()


def ours(media: bytes) -> object:
    return decode(media, START_S, END_S, n_images=N_IMAGES, sample_rates_hz=(RATE_OUT_HZ,))


def peer(media: bytes, kernel: dict[str, Any]) -> object:
    """Every picture up to the last wanted one, every sound; then cut, pick and resample."""
    wanted = [START_S + t for t in image_times(0.0, END_S - START_S, N_IMAGES, fps=FPS)]
    images: list[np.ndarray] = []
    blocks: list[np.ndarray] = []
    with av.open(io.BytesIO(media)) as container:
        for frame in container.decode(video=0, audio=0):
            if isinstance(frame, av.AudioFrame):
                blocks.append(frame.to_ndarray())
            elif len(images) < N_IMAGES and float(frame.time) + 1 / FPS > wanted[len(images)] + 1e-6:
                images.append(frame.to_ndarray(format="rgb24"))
    sound = torch.from_numpy(np.concatenate(blocks, axis=1)[:, round(START_S * RATE_IN_HZ) : round(END_S * RATE_IN_HZ)])
    return images, torchaudio.functional.resample(sound, RATE_IN_HZ, RATE_OUT_HZ, **kernel)


def main() -> None:
    torch.set_num_threads(1)
    media = recording(END_S + 2)
    medians = interleaved.measure(
        {
            "harken": partial(ours, media),
            "PyAV + torchaudio (default)": partial(peer, media, {}),
            "PyAV + torchaudio (kaiser_best)": partial(peer, media, KAISER_BEST),
        }
    )
    video = f"H.264 {SIZE[0]}x{SIZE[1]}, a key frame every {KEY_FRAME_EVERY}"
    what = f"{N_IMAGES} images and {RATE_OUT_HZ} Hz sound of 10 s, {video}"
    interleaved.show(what, medians, "harken")


if __name__ == "__main__":
    main()
