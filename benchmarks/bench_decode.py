"""Four images and the sound of a 10 s clip: harken against torchcodec, and against PyAV decoding all with torchaudio.

H.264 640x360 at 25 pictures a second (600 to 800 kb/s, x264's preset medium) and AAC 44.1 kHz stereo, with a keyframe
every 250 and every 30 pictures. harken decodes only the groups of pictures that hold a wanted image, and in them only
what others refer to; torchcodec seeks exactly (its default) and is asked for the pictures played at the same times.
The sound goes to 16 kHz: in harken the first channel by soxr VHQ, in torchcodec both channels by FFmpeg's resampler, in
the last both by torchaudio's default kernel, which is cheaper and less sharp.

torchcodec is no dependency: `pip install torchcodec` (the release made for the installed torch) and FFmpeg's shared
libraries; without them its rows are missing, and the benchmark says so.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
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
RATE_IN_HZ, RATE_OUT_HZ = 44_100, 16_000
FPS, SIZE, BITS_PER_S = 25, (640, 360), 700_000


def recording(seconds: float, keyframe_every: int) -> bytes:
    """H.264 and AAC in MP4: two landscapes that drift and fade through each other, objects, a camera's noise; noise."""
    rng = np.random.default_rng(0)
    scenes = [_landscape(rng) for _ in range(2)]
    objects = [(_landscape(rng)[:96, :96], *rng.uniform(-60, 60, 2)) for _ in range(6)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.mp4"
        with av.open(str(path), "w") as out:
            video: Any = out.add_stream("libx264", rate=FPS)
            video.width, video.height, video.pix_fmt, video.bit_rate = *SIZE, "yuv420p", BITS_PER_S
            video.gop_size, video.options = keyframe_every, {"preset": "medium", "x264-params": "scenecut=0"}
            audio: Any = out.add_stream("aac", rate=RATE_IN_HZ)
            audio.layout = "stereo"
            for i in range(round(seconds * FPS)):
                frame = av.VideoFrame.from_ndarray(_picture(scenes, objects, i / FPS, rng), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, FPS)
                out.mux(video.encode(frame))
                sound = (0.1 * rng.standard_normal((2, RATE_IN_HZ // FPS))).astype(np.float32)
                chunk = av.AudioFrame.from_ndarray(sound, format="fltp", layout="stereo")
                chunk.sample_rate, chunk.pts, chunk.time_base = RATE_IN_HZ, i * sound.shape[1], Fraction(1, RATE_IN_HZ)
                out.mux(audio.encode(chunk))
            out.mux(video.encode(None))
            out.mux(audio.encode(None))
        return path.read_bytes()


def _landscape(rng: np.random.Generator) -> np.ndarray:
    """A picture with detail at every scale, twice as large as the recording's: float (height, width, 3) in 0..255."""
    height, width = 2 * SIZE[1], 2 * SIZE[0]
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = 1 / np.maximum(np.hypot(x, y), 1 / height) ** 1.6
    waves = np.fft.rfft2(rng.standard_normal((3, height, width))) * falloff
    field = np.fft.irfft2(waves, s=(height, width)).transpose(1, 2, 0)
    return 128 + 50 * (field - field.mean()) / field.std()


def _picture(scenes: list[np.ndarray], objects: list[Any], time_s: float, rng: np.random.Generator) -> np.ndarray:
    width, height = SIZE
    picture = np.zeros((height, width, 3))
    for i, scene in enumerate(scenes):
        top, left = round(150 + 140 * np.sin((0.5 + i) * time_s)), round(250 + 240 * np.sin((0.4 - 0.9 * i) * time_s))
        share = 0.5 + (0.4 - 0.8 * i) * np.sin(time_s)
        picture += share * scene[top : top + height, left : left + width]
    for i, (patch, vx, vy) in enumerate(objects):
        x, y = int(50 + 80 * i + vx * time_s) % (width - 96), int(40 * i + vy * time_s) % (height - 96)
        picture[y : y + 96, x : x + 96] = patch
    return np.clip(picture + 2.0 * rng.standard_normal((height, width, 1)), 0, 255).astype(np.uint8)


def ours(media: bytes) -> object:
    return decode(media, START_S, END_S, n_images=N_IMAGES, sounds=[("first", RATE_OUT_HZ)])


def torchcodec_peer(media: bytes) -> object:
    """The pictures played at the wanted times, and the sound of the clip."""
    from torchcodec.decoders import AudioDecoder, VideoDecoder

    pictures = VideoDecoder(media, seek_mode="exact", num_ffmpeg_threads=1).get_frames_played_at(_wanted()).data
    sound = AudioDecoder(media, sample_rate=RATE_OUT_HZ).get_samples_played_in_range(START_S, END_S).data
    return pictures, sound


def torchaudio_peer(media: bytes) -> object:
    """Every picture up to the last wanted one, every sound; then cut, pick and resample."""
    wanted = _wanted()
    images: list[np.ndarray] = []
    blocks: list[np.ndarray] = []
    with av.open(io.BytesIO(media)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for frame in container.decode(video=0, audio=0):
            if isinstance(frame, av.AudioFrame):
                blocks.append(frame.to_ndarray())
            elif len(images) < N_IMAGES and float(frame.time) + 1 / FPS > wanted[len(images)] + 1e-6:
                images.append(frame.to_ndarray(format="rgb24"))
    sound = torch.from_numpy(np.concatenate(blocks, axis=1)[:, round(START_S * RATE_IN_HZ) : round(END_S * RATE_IN_HZ)])
    return images, torchaudio.functional.resample(sound, RATE_IN_HZ, RATE_OUT_HZ)


def _wanted() -> list[float]:
    return [START_S + t for t in image_times(0.0, END_S - START_S, N_IMAGES, fps=FPS)]


def has_torchcodec() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as e:  # absent, or no FFmpeg that it can load
        print(f"torchcodec is absent, so it is not compared with: {str(e).strip().splitlines()[0]}")
        return False
    return True


def main() -> None:
    torch.set_num_threads(1)
    peers: dict[str, Callable[[bytes], object]] = {"harken": ours}
    if has_torchcodec():
        peers["torchcodec (exact)"] = torchcodec_peer
    peers["PyAV, all pictures + torchaudio"] = torchaudio_peer
    for keyframe_every in (250, 30):
        media = recording(END_S + 2, keyframe_every)
        medians = interleaved.measure({name: partial(run, media) for name, run in peers.items()})
        kbit_per_s = len(media) * 8 / (END_S + 2) / 1000
        video = f"H.264 {SIZE[0]}x{SIZE[1]}, a keyframe every {keyframe_every}, {kbit_per_s:.0f} kb/s in all"
        interleaved.show(f"{N_IMAGES} images and {RATE_OUT_HZ} Hz sound of 10 s, {video}", medians, "harken")


if __name__ == "__main__":
    main()
