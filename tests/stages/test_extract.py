"""Extract on real media: same clip, same bytes; one bad clip fails alone; flags; what a changed param makes again."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from harken.config import Paths, load
from harken.engines import inline, local
from harken.errors import ConfigError
from harken.media import quality
from harken.media.fbank import FBANKS
from harken.media.images import read_jpeg
from harken.media.section import cut
from harken.shards import DenseArray, ShardWriter, facts, ledger, read_shard, read_table, shard_path, shards_in
from harken.stages import extract
from harken.stages.download import COLUMNS as MEDIA

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clips(lab: Any) -> dict[str, dict[str, Any]]:
    """A row of a media shard for each kind of clip, cut as the stage `download` does it."""
    made = {
        "plain": lab.make(),
        "vp9": lab.make("webm", vcodec="libvpx-vp9", acodec="libopus", rate=48000, gop=20),
        "mono": lab.make(channels=1, rate=16000),
        "quiet": lab.make(gain=0.002, acodec="pcm_s16le", container="mov"),
        "loud": lab.make(gain=9.0, acodec="pcm_s16le", container="mov"),
        "still": lab.make(vcodec="libx264", fps=1, video_seconds=6.0, size=(64, 48)),
        "sound": lab.make(vcodec=None),
    }
    rows = {}
    for name, data in made.items():
        section = cut(io.BytesIO(data), 1.0, 5.0, name != "sound", silence_dbfs=-90.0)
        rows[name] = {
            "media": section.data,
            "container": section.container,
            "start_s": section.start_s,
            "end_s": section.end_s,
            "has_images": name != "sound",
        }
    rows["broken"] = {**rows["plain"], "media": rows["plain"]["media"][:3000]}
    return rows


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(**{name: tmp_path / name for name in Paths.model_fields})


def put(paths: Paths, clips: Mapping[str, Mapping[str, Any]], shards: Sequence[Sequence[str]]) -> None:
    for number, names in enumerate(shards):
        with ShardWriter(paths.media, number, fingerprint="f", columns=MEDIA) as out:
            for name in names:
                out.write(name, **clips[name])


def config(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> extract.ExtractConfig:
    monkeypatch.setenv("HARKEN_PARAMS", str(ROOT / "params.yaml"))
    return load("extract", extract.ExtractConfig, **changed)


def stored(paths: Paths) -> dict[str, tuple[Any, ...]]:
    """Everything that is kept of each clip, wherever it lies."""
    found = {}
    for shard in shards_in(paths.features):
        arrays = {n: DenseArray(paths.features, shard, n) for n in ("fbank", "logmel")}
        columns = [*extract.COLUMNS, *(f"{n}_{c}" for n in arrays for c in ("start", "rows"))]
        for row in read_shard(paths.features, shard, columns):
            dense = []
            for name, array in arrays.items():
                values = np.empty((row.pop(f"{name}_rows"), array.shape[1]), array.dtype)
                array.read_into(row.pop(f"{name}_start"), values)
                dense.append(values.tobytes())
            found[row.pop("clip_id")] = (row, *dense)
    return found


def test_same_clip_same_bytes_and_one_bad_clip_fails_alone(
    clips: dict[str, dict[str, Any]], paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, names = config(monkeypatch), list(clips)
    put(paths, clips, [names])
    extract.run(paths, cfg, inline)
    found = stored(paths)
    assert set(found) == set(clips) - {"broken"}
    reasons = dict(zip(*(ledger(paths.features)[c].to_pylist() for c in ("clip_id", "reason")), strict=True))
    assert reasons == dict.fromkeys(found, "") | {"broken": "media.truncated"}

    other = Paths(**{name: tmp_path / "other" / name for name in Paths.model_fields})
    put(other, clips, [names[::-1][:3], names[::-1][3:4], names[::-1][4:]])
    monkeypatch.setenv("HARKEN_WORKERS", "2")
    extract.run(other, cfg, local)
    assert stored(other) == found

    row, fbank, _ = found["plain"]
    wave = extract.featurer(cfg)(clips["plain"])["fbank"]
    assert fbank == wave.tobytes()
    assert row["duration_s"] == pytest.approx(4.0)
    assert [read_jpeg(i).shape[0] for i in row["images"]] == [96] * 4
    assert found["sound"][0]["images"] is None
    n_rows = {name: len(f) // (2 * 128) for name, (_, f, _) in found.items()}
    assert n_rows == dict.fromkeys(found, 398)
    told = facts(paths.features, 0)
    assert told["images"] == "short side 96, JPEG quality 95"
    assert told["ended"] == "0"


@pytest.mark.slow
def test_flags_are_judged_again_without_decoding(
    clips: dict[str, dict[str, Any]], paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["plain", "quiet", "loud", "still"]
    put(paths, clips, [names])
    extract.run(paths, config(monkeypatch), inline)
    kept = shard_path(paths.features, 0).stat().st_ino
    assert quality.flagged(paths.features, ["silent"]) == {"quiet"}
    assert quality.flagged(paths.features, ["clipped"]) == {"loud"}
    bounds = {**load("extract", extract.ExtractConfig).quality.model_dump(), "silent_dbfs": 0.0, "frozen_grey": 255.0}
    extract.run(paths, config(monkeypatch, quality=bounds), inline)
    assert shard_path(paths.features, 0).stat().st_ino == kept
    assert quality.counts(paths.features)["silent"] >= 3
    assert quality.counts(paths.features)["frozen"] == 4


@pytest.mark.slow
def test_a_limit_ends_clips_alone_and_only_their_shard_is_made_again(
    clips: dict[str, dict[str, Any]], paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(paths, clips, [["sound"], ["plain", "vp9"]])
    tight = {"limit_s": 1e-4, "memory_gb": 2.0}
    extract.run(paths, config(monkeypatch, **tight), inline)
    assert set(ledger(paths.features)["reason"].to_pylist()) == {"media.too_slow"}
    assert facts(paths.features, 1)["ended"] == "2"
    extract.run(paths, config(monkeypatch), inline)
    assert set(ledger(paths.features)["status"].to_pylist()) == {"ok"}
    made = {s: shard_path(paths.features, s).stat().st_ino for s in (0, 1)}
    extract.run(paths, config(monkeypatch, limit_s=77.0), inline)  # no clip was ended: nothing depends on it
    assert {s: shard_path(paths.features, s).stat().st_ino for s in (0, 1)} == made


def test_rates_and_backends(clips: dict[str, dict[str, Any]], paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    native = extract.featurer(config(monkeypatch, sample_rate_hz="native"))
    of_vp9, of_mono = native(clips["vp9"])["fbank"], native(clips["mono"])["fbank"]
    assert (of_mono[:, 3] == np.float16(-15.942385)).all()  # 16 kHz: its third filter is empty
    assert (of_vp9[:, 3] != np.float16(-15.942385)).any()
    ours = extract.featurer(config(monkeypatch))(clips["plain"])["fbank"]
    for backend in FBANKS:
        theirs = extract.featurer(config(monkeypatch, fbank=backend))(clips["plain"])["fbank"]
        assert np.abs(theirs.astype(np.float32) - ours).max() < 0.02  # a step of float16 there is 0.0078
    put(paths, clips, [["plain"]])
    with pytest.raises(ConfigError, match="refuses 128 filters at 16000 Hz"):
        extract.run(paths, config(monkeypatch, fbank="kaldi", sample_rate_hz=16000), inline)


def test_quality_file_lists_every_ok_clip(
    clips: dict[str, dict[str, Any]], paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(paths, clips, [["quiet", "broken"], ["mono"]])
    extract.run(paths, config(monkeypatch), inline)
    table = pq.read_table(paths.features / quality.FILE)
    assert table["clip_id"].to_pylist() == ["quiet", "mono"]
    assert set(table.column_names) == {"clip_id", *quality.FLAGS}
    measured = read_table(paths.features, list(quality.FACTS)).to_pylist()
    assert measured[0]["peak_dbfs"] == pytest.approx(20 * np.log10(0.4 * 0.002), abs=0.5)
    assert all(m["sound_s"] == pytest.approx(4.0, abs=1e-3) for m in measured)


def test_a_handful_of_samples_is_too_short_and_no_more(
    clips: dict[str, dict[str, Any]], paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = clips["quiet"]
    brief = {**row, "end_s": row["start_s"] + 0.014, "has_images": False}
    put(paths, {"brief": brief, "quiet": row}, [["brief", "quiet"]])
    extract.run(paths, config(monkeypatch), inline)
    assert ledger(paths.features)["reason"].to_pylist() == ["qc.short", ""]
