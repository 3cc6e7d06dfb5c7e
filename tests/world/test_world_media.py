"""The media: real files by real encoders, the same bytes every time, and what the truth says is what they hold."""

from __future__ import annotations

import hashlib
import json
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from harken.errors import ConfigError, DataError
from harken.world import build
from harken.world.classes import NAMES, SIZES
from harken.world.corpus import make_recording, plan
from harken.world.picture_captions import pairs
from harken.world.pictures import DRAWINGS, SCENES, compose, draw
from harken.world.recordings import media_files, media_folder, picture, soundtrack
from harken.world.records import Record, shots
from harken.world.sounds import RATE_HZ, SOUNDS, synthesise
from harken.world.truth import Truth


def _usable_videos(records: list[Record]) -> list[Record]:
    return [r for r in records if r.host == "youtube" and not r.reason and not r.is_adaptive]


def _video_file(root: Path, r: Record) -> Path:
    (name,) = (n for n, kind in media_files(r).items() if kind != "audio")
    return media_folder(root / "host", r) / name


def _frames(path: Path) -> list[tuple[float, np.ndarray]]:
    with av.open(str(path)) as f:
        return [(float(x.time), x.to_ndarray(format="rgb24")) for x in f.decode(video=0)]


def _digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_a_world_is_the_same_bytes_whatever_the_order_and_the_workers(tmp_path, make_config):
    cfg = make_config(
        n_train=5, n_captioned=2, n_val=1, n_test=1, n_balanced=1, n_eval=2,
        n_clotho_train=1, n_clotho_val=1, n_clotho_test=1, unavailable=0.1, broken=0.1,
        n_sounds=None, sound_s=None, background_db=(-50.0, -40.0), further=None, told=None,
    )  # fmt: skip
    build(tmp_path / "a", cfg, map)
    with ThreadPoolExecutor(2) as pool:
        build(tmp_path / "b", cfg, lambda fn, items: pool.map(fn, reversed(list(items))))
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b")


def test_a_build_resumes_and_keeps_complete_media(tmp_path, make_config):
    cfg = make_config(
        n_train=3, n_captioned=1, n_val=1, n_test=1, n_balanced=1, n_eval=1,
        n_clotho_train=1, n_clotho_val=1, n_clotho_test=1, unavailable=0.0, broken=0.0,
        n_sounds=None, sound_s=None, background_db=(-50.0, -40.0), further=None, told=None,
    )  # fmt: skip

    def killed(fn, items):
        for k, item in enumerate(items):
            if k == 3:
                raise KeyboardInterrupt
            yield fn(item)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, cfg, killed)
    assert not (tmp_path / "truth.json").exists()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "host" / "videoplayback").iterdir()}
    assert len(done) >= 3
    (tmp_path / "host" / "videoplayback" / ".1.2.part").write_bytes(b"torn")
    build(tmp_path, cfg, map)
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())
    assert not list(tmp_path.rglob("*.part"))
    assert len(Truth.read(tmp_path / "truth.json").clips) == len(plan(cfg))

    other = make_config(**{**cfg.model_dump(), "seed": 6})
    build(tmp_path, other, lambda fn, items: [])  # media of another config are not kept
    assert not (tmp_path / "host" / "videoplayback").exists()


def test_a_build_leaves_a_strangers_files_alone(tmp_path, make_config):
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "thesis.pdf").write_bytes(b"years of work")
    with pytest.raises(DataError, match="no build made"):
        build(tmp_path, make_config(), map)
    assert (tmp_path / "host" / "thesis.pdf").exists()


def test_videos_are_h264_and_aac_as_planned(world, small_plan):
    n_stereo = n_odd_rates = 0
    for r in _usable_videos(small_plan):
        with av.open(str(_video_file(world, r))) as f:
            video, audio = f.streams.video[0], f.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (video.width, video.height) == (r.width, r.height)
            assert audio.rate == RATE_HZ
            assert audio.channels == r.n_channels
            assert float(video.average_rate) == pytest.approx(r.fps[0] / r.fps[1], rel=1e-3)
            assert f.duration / 1e6 == pytest.approx(r.duration_s, abs=0.15)
            n_stereo += r.n_channels == 2
            n_odd_rates += r.fps != (10, 1)
    assert n_stereo
    assert n_odd_rates


def test_what_the_truth_puts_on_screen_is_in_the_decoded_frames(world, small_plan):
    for r in _usable_videos(small_plan)[:8]:
        frames = _frames(_video_file(world, r))
        assert len(frames) == int(r.duration_s * r.fps[0] / r.fps[1] + 1e-6)
        plan_ = shots(r)
        drawn = [picture(r, s).astype(float) for s in plan_]
        for t, frame in frames[:: max(1, len(frames) // 25)]:
            k = next(i for i, s in enumerate(plan_) if t + 1e-6 < s.end_s or i + 1 == len(plan_))
            errors = [np.abs(frame - d).mean() for d in drawn]
            assert int(np.argmin(errors)) == k, (r.key, t)
            assert errors[k] < 9


def test_truth_agrees_with_the_shots_frame_by_frame(world, small_plan):
    truth = Truth.read(world / "truth.json")
    for r in _usable_videos(small_plan):
        rate, plan_ = r.fps[0] / r.fps[1], shots(r)
        for t_s in np.linspace(0, r.length_s, 41):
            at = min(t_s, r.length_s - 1 / rate) + r.start_s
            shown_s = int(at * rate + 1e-6) / rate
            shot = next(s for s in plan_ if shown_s + 1e-9 < s.end_s)
            assert tuple((e.name, e.size) for e in truth[r.clip_id].on_screen(t_s)) == shot.objects
            names = {name for name, _ in shot.objects}
            right = bool(names & set(r.labels)) if names else None
            assert truth.image_is_right(r.clip_id, t_s) is right


def test_truth_answers_for_sounds_and_refuses_unknown_clips(world, small_plan):
    truth = Truth.read(world / "truth.json")
    sound = next(r for r in small_plan if r.host == "zenodo" and not r.reason)
    assert truth.image_is_right(sound.clip_id, 1.0) is None
    assert truth[sound.clip_id].end_s == sound.duration_s
    assert truth[sound.clip_id].sounding(sound.length_s / 2 + 0.01) or len(sound.labels) == 2
    with pytest.raises(DataError, match="not in the built-in corpus"):
        truth["yt:nobody"]
    with pytest.raises(DataError, match="Build it first"):
        Truth.read(world / "nothing.json")
    (world / "broken.json").write_text(json.dumps({"clips": {}}))
    with pytest.raises(DataError, match="Build the corpus anew"):
        Truth.read(world / "broken.json")


def test_events_are_heard_when_the_truth_says_so(small_plan):
    checked = 0
    for r in small_plan:
        if r.reason or len(r.labels) != 1:
            continue
        (event,) = (e for e in r.events if e.sounds)
        alone = replace(r, decoys=(), events=(event,))
        wave_ = soundtrack(alone)
        a, b = (round((t + r.start_s) * RATE_HZ) for t in (event.start_s, event.end_s))
        inside = np.sqrt(np.mean(wave_[:, a:b] ** 2))
        outside = np.concatenate([wave_[:, : max(0, a - 50)], wave_[:, b + 50 :]], axis=1)
        assert inside > 10 ** (-38 / 20)
        if outside.size > 1000:
            assert np.abs(outside).max() < 10 ** (-25 / 20)
        checked += 1
    assert checked >= 3


def test_clotho_sounds_are_mono_16_bit_wav_of_15_to_30_s(world, small_plan):
    for r in small_plan:
        if r.host == "zenodo" and not r.reason:
            with wave.open(str(media_folder(world / "host", r) / r.key)) as w:
                assert (w.getnchannels(), w.getsampwidth(), w.getframerate()) == (1, 2, RATE_HZ)
                assert w.getnframes() == round(r.duration_s * RATE_HZ)
                assert 15 <= r.duration_s <= 30


def _damaged(records: list[Record], reason: str, host: str = "youtube") -> Record:
    return next(r for r in records if r.reason == reason and r.host == host)


def test_damage_is_what_its_reason_says(tmp_path, default_plan):
    def path_of(reason: str, host: str = "youtube") -> Path:
        r = replace(_damaged(default_plan, reason, host), width=64, height=48)
        make_recording(r, tmp_path)
        return media_folder(tmp_path, r) / next(iter(media_files(r)))

    assert path_of("media.empty").read_bytes() == b""
    assert path_of("media.not_media").read_bytes().startswith(b"<!DOCTYPE html>")
    truncated = path_of("media.truncated")
    assert truncated.read_bytes()[4:8] == b"ftyp"
    with pytest.raises(av.error.FFmpegError):
        av.open(str(truncated))
    with av.open(str(path_of("qc.no_audio"))) as f:
        assert not f.streams.audio
    with av.open(str(path_of("qc.no_video"))) as f:
        assert not f.streams.video
    with av.open(str(path_of("qc.silent"))) as f:
        assert max(float(np.abs(x.to_ndarray()).max()) for x in f.decode(audio=0)) < 1e-4
    with av.open(str(path_of("qc.past_end"))) as f:
        assert f.duration / 1e6 < _damaged(default_plan, "qc.past_end").start_s
    short = path_of("media.truncated", "zenodo")
    with wave.open(str(short)) as w:
        assert short.stat().st_size < w.getnframes() * 2
    for reason in ("gone.private", "media.404"):
        r = _damaged(default_plan, reason)
        make_recording(r, tmp_path)
        assert media_files(r) == {}


def test_separate_streams_hold_one_kind_each(tmp_path, default_plan):
    r = replace(next(x for x in default_plan if x.is_adaptive), width=64, height=48)
    make_recording(r, tmp_path)
    for name, kind in media_files(r).items():
        with av.open(str(media_folder(tmp_path, r) / name)) as f:
            assert (len(f.streams.video), len(f.streams.audio)) == ((1, 0) if kind == "video" else (0, 1))


@pytest.mark.parametrize("name", NAMES)
def test_every_class_sounds_and_is_drawn(name):
    for size in SIZES:
        sound = synthesise(name, size, 2.5, np.random.default_rng(1))
        assert sound.dtype == np.float32
        assert sound.shape == (round(2.5 * RATE_HZ),)
        assert np.isfinite(sound).all()
        assert 0.01 < np.sqrt(np.mean(sound**2)) < 0.2
        assert np.abs(sound).max() < 0.7
        again = synthesise(name, size, 2.5, np.random.default_rng(1))
        assert np.array_equal(sound, again)
    empty = compose([], np.random.default_rng(3), (96, 72), "field")
    changed = [
        (np.abs(draw(name, np.random.default_rng(3), (96, 72), size, "field").astype(int) - empty).max(-1) > 12).mean()
        for size in ("small", "big")
    ]
    assert 0.01 < changed[0] < changed[1] < 0.6


def test_a_big_source_sounds_lower_than_a_small_one():
    def centroid(name: str, size: str) -> float:
        spectrum = np.abs(np.fft.rfft(synthesise(name, size, 3.0, np.random.default_rng(4)))) ** 2
        f = np.fft.rfftfreq(3 * RATE_HZ, 1 / RATE_HZ)
        return float(np.exp(np.sum(spectrum[1:] * np.log(f[1:])) / spectrum[1:].sum()))

    assert all(centroid(n, "small") > 1.05 * centroid(n, "big") for n in NAMES)


def test_sounds_are_told_apart_by_their_nearest_neighbour():
    """Mean, spread and flux of a coarse log spectrum are enough: a small network will do better."""
    edges = np.geomspace(150, 14_000, 41)
    bands = np.digitize(np.fft.rfftfreq(2048, 1 / RATE_HZ), edges)

    def features(name: str, k: int) -> np.ndarray:
        rng = np.random.default_rng([k, NAMES.index(name)])
        x = synthesise(name, SIZES[k % 2], 4.0, rng)
        blocks = np.lib.stride_tricks.sliding_window_view(x, 2048)[::1024] * np.hanning(2048)
        power = np.abs(np.fft.rfft(blocks)) ** 2
        log = 10 * np.log10(np.stack([power[:, bands == b].sum(1) for b in range(1, 41)], 1) + 1e-4)
        return np.concatenate([log.mean(0), log.std(0), np.abs(np.diff(log, axis=0)).mean(0)])

    known = np.array([[features(n, k) for k in range(4)] for n in NAMES]).reshape(len(NAMES) * 4, -1)
    asked = np.array([[features(n, k) for k in range(4, 6)] for n in NAMES]).reshape(len(NAMES) * 2, -1)
    scale = known.std(0) + 0.1
    nearest = (((asked[:, None] - known[None]) / scale) ** 2).sum(-1).argmin(1) // 4
    assert (nearest == np.arange(len(NAMES)).repeat(2)).mean() > 0.9


def test_unknown_names_are_refused_with_a_guess():
    rng = np.random.default_rng(0)
    assert list(SOUNDS) == list(DRAWINGS) == list(NAMES)
    with pytest.raises(ConfigError, match="Did you mean 'dog'"):
        synthesise("dogg", "big", 1.0, rng)
    with pytest.raises(ConfigError, match="unknown name 'huge'"):
        synthesise("dog", "huge", 1.0, rng)
    with pytest.raises(ConfigError, match="unknown name 'huge'"):
        draw("dog", rng, how_big="huge")
    with pytest.raises(ConfigError, match="Did you mean 'cat'"):
        draw("catt", rng)
    with pytest.raises(ConfigError, match="Did you mean 'beach'"):
        draw("cat", rng, scene="beech")
    with pytest.raises(ConfigError, match="at most 4"):
        compose([("cat", "big")] * 5, rng, (64, 64))


def test_captioned_pictures_are_the_same_for_every_n():
    first = list(pairs(12, seed=2, size=(64, 48)))
    second = list(pairs(30, seed=2, size=(64, 48)))
    assert all(a[1] == b[1] and np.array_equal(a[0], b[0]) for a, b in zip(first, second, strict=False))
    assert all(p.shape == (48, 64, 3) and p.dtype == np.uint8 for p, _ in first)
    captions = [c for _, c in pairs(400, seed=2, size=(32, 32))]
    for word in ("then", "while", "after", "before", "big", "small", "heavy", "background", "nothing"):
        assert any(word in c.split() for c in captions), word
    assert len(SCENES) == 6
