"""Real media by real encoders: H.264 and AAC in MP4 for videos, 16-bit PCM in WAV for sounds.

Bytes depend on the record alone: every encoder runs on one thread and the muxer writes no dates. Planned damage is done
last, to a file that was whole.
"""

from __future__ import annotations

import os
import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from harken.world.pictures import Picture, compose
from harken.world.records import Record, Shot, shots
from harken.world.sounds import RATE_HZ, Wave, background, synthesise

# these are refused before any media is asked for, or have none to give
NOT_SERVED = (
    "gone.private",
    "gone.removed_uploader",
    "gone.account_terminated",
    "denied.copyright_country",
    "denied.age",
    "gone.unspecified",
    "denied.members",
    "media.404",
)
_HTML = (
    b"<!DOCTYPE html><html><head><title>Before you continue</title></head>"
    b"<body><p>Please accept our terms.</p></body></html>\n"
)
_TRUNCATED_TO = 0.4
_AAC_BIT_RATE = 64_000  # per channel, as YouTube's m4a


def media_files(record: Record) -> dict[str, str]:
    """What a record is served as: file name -> "both", "video" or "audio" streams; empty where nothing is served."""
    if record.reason in NOT_SERVED:
        return {}
    if record.is_adaptive:  # as YouTube serves most videos: one file per stream, named by its itag
        return {f"{record.key}.f134.mp4": "video", f"{record.key}.f140.m4a": "audio"}
    kinds = {"qc.no_audio": "video", "qc.no_video": "audio"}
    return {record.key if record.host == "zenodo" else f"{record.key}.mp4": kinds.get(record.reason, "both")}


def media_folder(host_dir: Path, record: Record) -> Path:
    """Where a record's media lies: `videoplayback`, or `clotho/ARCHIVE`."""
    return host_dir / "videoplayback" if record.host == "youtube" else host_dir / "clotho" / record.archive


def make_recording(record: Record, host_dir: Path) -> None:
    """Write the media of `record` under `host_dir`, leaving out what is there already.

    A file at its final name is complete: it is written beside it and renamed.
    """
    folder = media_folder(host_dir, record)
    folder.mkdir(parents=True, exist_ok=True)
    for name, kind in media_files(record).items():
        if (folder / name).exists():
            continue
        scratch = folder / f".{os.getpid()}.{record.seed}.part"
        if record.reason == "media.empty":
            scratch.write_bytes(b"")
        elif record.reason == "media.not_media":
            scratch.write_bytes(_HTML)
        elif record.host == "zenodo":
            _write_wav(record, scratch)
        else:
            _write_mp4(record, kind, scratch)
        if record.reason == "media.truncated":
            os.truncate(scratch, int(scratch.stat().st_size * _TRUNCATED_TO))
        scratch.replace(folder / name)


def soundtrack(record: Record) -> Wave:
    """The recording's sound: float32 (channel, time) at RATE_HZ, within -1..1."""
    n = round(record.duration_s * RATE_HZ)
    if record.reason == "qc.silent":
        return np.zeros((record.n_channels, n), dtype=np.float32)
    rng = record.rng(0)
    channels = [background(record.duration_s, record.background_db, rng) for _ in range(record.n_channels)]
    mix = np.stack([c[:n] for c in channels])
    for event in (*record.events, *record.decoys):
        if not event.sounds:
            continue
        gain, pan, lag = 10 ** (rng.uniform(-4, 4) / 20), rng.uniform(0.15, 0.85) * np.pi / 2, int(rng.integers(0, 24))
        sound = synthesise(event.name, event.size, event.end_s - event.start_s, rng) * np.float32(gain)
        start = round((event.start_s + record.start_s) * RATE_HZ)
        for c in range(record.n_channels):
            level = 1.0 if record.n_channels == 1 else np.sqrt(2) * (np.cos(pan) if c == 0 else np.sin(pan))
            first = start + lag * c
            part = sound[max(0, -first) : max(0, n - first)]
            at = max(0, first)
            mix[c, at : at + part.size] += np.float32(level) * part
    return mix * np.float32(min(1.0, 0.95 / max(float(np.abs(mix).max()), 1e-6)))


def picture(record: Record, shot: Shot) -> Picture:
    """What is on screen during `shot`: uint8 (height, width, 3)."""
    return compose(shot.objects, record.rng(1, shot.number), (record.width, record.height), record.place)


def _frames(record: Record) -> Iterator[av.VideoFrame]:
    """The recording's video frames, in order; frame k is what is on screen at k / fps."""
    rate, time_base = record.fps[0] / record.fps[1], Fraction(record.fps[1], record.fps[0])
    plan, reformatter = shots(record), VideoReformatter()
    at, frame = -1, None
    for k in range(max(1, int(record.duration_s * rate + 1e-6))):
        t = k / rate + 1e-9
        while at < 0 or (t >= plan[at].end_s and at + 1 < len(plan)):
            at, frame = at + 1, None
        if frame is None:  # drawn and converted once per shot, not per frame
            rgb = av.VideoFrame.from_ndarray(picture(record, plan[at]), format="rgb24")
            frame = reformatter.reformat(rgb, format="yuv420p")
        frame.pts, frame.time_base = k, time_base
        yield frame


def _write_mp4(record: Record, kind: str, path: Path) -> None:
    """An MP4 with "both" streams, or with only its "audio" or "video"."""
    # no dates, no ids by chance: the same record gives the same bytes
    options = {"fflags": "+bitexact"} | ({"movflags": "faststart"} if record.is_faststart else {})
    with av.open(str(path), "w", format="mp4", options=options) as container:
        video = audio = None
        if kind != "audio":
            video = container.add_stream("libx264", rate=Fraction(*record.fps))
            video.width, video.height, video.pix_fmt = record.width, record.height, "yuv420p"
            video.codec_context.thread_count = 1
            video.options = {
                "preset": record.x264_preset,
                "threads": "1",
                "crf": "23",
                "g": str(record.keyframe_interval),
            }
        if kind != "video":
            audio = container.add_stream("aac", rate=RATE_HZ, layout="mono" if record.n_channels == 1 else "stereo")
            audio.codec_context.bit_rate = _AAC_BIT_RATE * record.n_channels
            audio.options = {"aac_coder": "fast"}  # a third of the default's time
        frames = _frames(record) if video else iter(())
        per_second = round(Fraction(*record.fps))
        wave_ = soundtrack(record) if audio else np.zeros((1, 0), dtype=np.float32)
        seconds = int(np.ceil(record.duration_s)) + 1
        for s in range(seconds):  # a second of each in turn, so that the file interleaves well
            if video:
                for frame in _take(frames, per_second):
                    container.mux(video.encode(frame))
            if audio:
                part = np.ascontiguousarray(wave_[:, s * RATE_HZ : (s + 1) * RATE_HZ])
                if part.size:
                    block = av.AudioFrame.from_ndarray(part, format="fltp", layout=audio.layout.name)
                    block.sample_rate, block.pts, block.time_base = RATE_HZ, s * RATE_HZ, Fraction(1, RATE_HZ)
                    container.mux(audio.encode(block))
        for stream in (video, audio):
            if stream:
                container.mux(stream.encode(None))


def _take(frames: Iterator[av.VideoFrame], n: int) -> Iterator[av.VideoFrame]:
    for _ in range(n):
        frame = next(frames, None)
        if frame is None:
            return
        yield frame


def _write_wav(record: Record, path: Path) -> None:
    samples: NDArray[np.int16] = np.round(soundtrack(record)[0] * 32_767).astype("<i2")
    with wave.open(str(path), "wb") as w:
        w.setnchannels(1)
        w.setsampwidth(2)
        w.setframerate(RATE_HZ)
        w.writeframes(samples.tobytes())
