"""A corpus as it is met: three datasets, seven splits, reasons at plausible rates, and a loss that is not at random.

Music is lost to copyright more often than speech, one class is nearly gone, a part of the largest split was never
visited. The same arguments give the same tables. Columns are made whole, so two million rows take seconds.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from harken.audit.observations import Observation
from harken.audit.rates import audit
from harken.clips import SCHEMA
from harken.media.reasons import group

SPLITS = (  # dataset, split, clips, share visited, share missing
    ("audioset", "train", 1_400, 0.62, 0.27),
    ("audioset", "test", 800, 1.0, 0.22),
    ("audiocaps", "train", 900, 1.0, 0.15),
    ("audiocaps", "val", 495, 1.0, 0.13),
    ("audiocaps", "test", 975, 1.0, 0.14),
    ("clotho", "train", 300, 1.0, 0.004),
    ("clotho", "test", 130, 0.0, 0.0),
)
CLASSES = (
    """
Music | Speech | Vehicle | Musical instrument | Male speech; man speaking | Inside; small room |
Singing | Guitar | Car | Animal | Outside; rural or natural | Violin; fiddle | Bird | Drum | Engine
| Dog | Water | Electronic music | Crowd | Piano | Train | Wind | Rain | Cat | Siren | Television |
Laughter | Hip hop music | Gunshot; gunfire | Boat; Water vehicle | Thunder | Applause | Church bell
| Sewing machine | Chicken; rooster | Typing | Snoring | Harp | Zither | Chainsaw | Frog | Bicycle
bell | Accordion | Foghorn | Toothbrush | Didgeridoo | Squeak | Yodeling
""".replace("\n", " ")
    .strip()
    .split(" | ")
)
REASONS = {  # reason -> (share of what is missing, its message)
    "gone.private": (0.25, "Private video. Sign in if you've been granted access to this video"),
    "gone.account_terminated": (
        0.19,
        "Video unavailable. This video is no longer available because the YouTube account associated with this "
        "video has been terminated.",
    ),
    "gone.removed_uploader": (0.12, "Video unavailable. This video has been removed by the uploader"),
    "gone.copyright_claim": (0.09, "This video is no longer available due to a copyright claim by a label"),
    "gone.removed_policy": (0.03, "This video has been removed for violating YouTube's Terms of Service"),
    "denied.copyright_country": (0.05, "This video contains content from a label, who has blocked it in your country"),
    "denied.geo": (0.03, "The uploader has not made this video available in your country"),
    "denied.age": (0.04, "Sign in to confirm your age. This video may be inappropriate for some users."),
    "denied.members": (0.005, "Join this channel to get access to members-only content"),
    "qc.past_end": (0.015, "the recording ends at 31.2 s, the clip begins at 40.0 s"),
    "qc.silent": (0.02, "root mean square below -70 dB"),
    "qc.short": (0.01, "4.1 of 10.0 s decoded"),
    "net.timeout": (0.02, "The read operation timed out"),
    "session.rate_limited": (0.03, "Video unavailable. This content isn't available, try again later."),
    "gone.unspecified": (0.09, "Video unavailable"),
    "unknown.unmapped": (0.015, "The following content has been identified by the rights office"),
}
MUSICAL = np.array([any(w in c.lower() for w in ("music", "guitar", "singing", "violin", "piano")) for c in CLASSES])
ALPHABET = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))
SUBJECTS = ("a man", "a woman", "a dog", "an engine", "birds", "a crowd", "rain", "a train", "water", "a child")
VERBS = ("speaks", "hums", "barks", "idles", "chirp", "cheers", "falls", "passes", "splashes", "laughs")
TAILS = ("in the distance", "followed by silence", "with wind", "and a click", "loudly", "near traffic", "")
SONGS = ("music plays with guitar", "a song is sung over piano", "upbeat music plays as a crowd sings")
DAY_MS = 86_400_000
NOW_MS = 1_795_219_200_000  # 2026-11-21


@dataclass(frozen=True)
class Corpus:
    """What an audit reads: the manifest's table, the ledger, the fold of the attempts, and the names of the labels."""

    manifest: pa.Table
    ledger: pd.DataFrame
    attempts_state: pd.DataFrame
    names: dict[str, str]


def corpus(scale: float = 1.0, seed: int = 7) -> Corpus:
    """`scale` times the clips of SPLITS; 1.0 keeps the sizes of AudioCaps' official val and test lists."""
    rng = np.random.default_rng(seed)
    parts = [_part(rng, *row[:2], max(1, round(row[2] * scale)), *row[3:]) for row in SPLITS]
    manifest = pa.concat_tables([p[0] for p in parts])
    ledger = pd.concat([p[1] for p in parts], ignore_index=True)
    names = {_mid(k): name.replace(";", ",") for k, name in enumerate(CLASSES)}
    return Corpus(manifest, ledger, _fold(rng, ledger), names)


def report(scale: float = 1.0, seed: int = 7) -> dict[str, Any]:
    """The audit of the later of two runs, with everything that an audit can hold."""
    found = corpus(scale, seed)
    return audit(
        found.manifest,
        later(found),
        group,
        observations=observations(found),
        attempts_state=found.attempts_state,
        names=found.names,
        previous=found.ledger,
        passport=passport,
    )


def observations(corpus: Corpus, seed: int = 5) -> list[Observation]:
    """What two laboratories held years ago: all that is left today, and a part of what was lost since."""
    rng = np.random.default_rng(seed)
    clips = corpus.manifest.select(["clip_id", "dataset", "split", "key"]).to_pandas()
    lost = set(corpus.ledger["clip_id"][corpus.ledger["status"] != "ok"])
    is_lost = clips["clip_id"].isin(lost).to_numpy()
    draw = rng.random(len(clips))
    found = []
    for who, when, source, kept in (
        ("Laboratory of the north", "2019-06-15", "list beside its paper", 0.7),
        ("Laboratory of the south", "2023-03", "its public copy", 0.25),
    ):
        held = ~is_lost & (draw < 0.99) | is_lost & (draw < kept)
        for (dataset, split), part in clips[held].groupby(["dataset", "split"], sort=True, observed=True):
            if dataset != "clotho":
                found.append(Observation.of(who, when, source, str(dataset), str(split), part["key"]))
    return found


def passport(dataset: str, split: str, ids: Sequence[str], present: np.ndarray, policy: str) -> dict[str, Any]:
    """A passport made as simply as can be: the page prints it, whoever made it."""
    held = [i for i, p in zip(ids, present, strict=True) if p]
    digest = hashlib.sha256("".join(f"{i}\n" for i in sorted(held)).encode()).hexdigest()
    return {
        "text": f"{dataset} {split} {len(held)}/{len(ids)} ids:{digest[:12]}",
        "dataset": dataset,
        "split": split,
        "n_present": len(held),
        "n_total": len(ids),
        "ids_sha256": digest,
        "official_sha256": hashlib.sha256("".join(f"{i}\n" for i in ids).encode()).hexdigest(),
        "bitmap": base64.b64encode(np.packbits(np.asarray(present, bool)).tobytes()).decode(),
        "policy": policy,
    }


def later(corpus: Corpus, seed: int = 11) -> pd.DataFrame:
    """The ledger of a run some months on: two of a hundred are lost meanwhile, a few are back, some reasons differ."""
    rng = np.random.default_rng(seed)
    ledger = corpus.ledger.copy()
    draw, ok = rng.random(len(ledger)), (ledger["status"] == "ok").to_numpy()
    ledger.loc[ok & (draw < 0.02), ["status", "reason", "message"]] = [
        "failed",
        "gone.private",
        REASONS["gone.private"][1],
    ]
    ledger.loc[~ok & (draw < 0.01), ["status", "reason", "message"]] = ["ok", "", ""]
    ledger.loc[~ok & (draw > 0.97), ["reason", "message"]] = [
        "gone.account_terminated",
        REASONS["gone.account_terminated"][1],
    ]
    return ledger


def _part(
    rng: np.random.Generator, dataset: str, split: str, n: int, visited: float, missing: float
) -> tuple[pa.Table, pd.DataFrame]:
    ids, keys, start_s = _ids(rng, dataset, n)
    weights = 1 / np.arange(1, len(CLASSES) + 1) ** 0.7
    labels = np.searchsorted(np.cumsum(weights / weights.sum()), rng.random((n, 2)))
    is_music = MUSICAL[labels].any(axis=1)
    is_harp = (labels == CLASSES.index("Harp")).any(axis=1)
    odds = missing * np.where(is_music, 1.5, 0.8) + 0.5 * is_harp * (missing > 0.01)
    table = _table(dataset, split, ids, keys, start_s, labels, _captions(rng, dataset, is_music))
    lost = rng.random(n) < odds
    shares = np.array([share for share, _ in REASONS.values()])
    drawn = np.array(list(REASONS), dtype=object)[rng.choice(len(REASONS), n, p=shares / shares.sum())]
    drawn = np.where(is_music & (rng.random(n) < 0.25), "gone.copyright_claim", drawn)
    reason = np.where(lost, drawn, "")
    messages = {"": "", **{code: text for code, (_, text) in REASONS.items()}}
    ledger = pd.DataFrame(
        {
            "clip_id": ids,
            "status": np.where(lost, "failed", "ok"),
            "reason": reason,
            "message": [messages[r] for r in reason],
        }
    )
    return table, ledger[rng.random(n) < visited]


def _ids(rng: np.random.Generator, dataset: str, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clip ids, recording keys and starts in seconds."""
    letters = ALPHABET[rng.integers(0, len(ALPHABET), (n, 11))]
    keys = np.array(["".join(row) for row in letters], dtype=object)
    start_s = 10.0 * rng.integers(0, 55, n)
    if dataset == "clotho":
        digests = rng.integers(0, 16, (n, 40))
        ids = [f"zen:4783391/clotho/{''.join('0123456789abcdef'[d] for d in row)}" for row in digests]
    else:
        ids = [f"yt:{k}:{int(s) * 1000}-{int(s) * 1000 + 10_000}" for k, s in zip(keys, start_s, strict=True)]
    return np.array(ids, dtype=object), keys, start_s


def _captions(rng: np.random.Generator, dataset: str, is_music: np.ndarray) -> list[list[str]]:
    if dataset == "audioset":
        return [[] for _ in is_music]
    who, tail, song = (rng.integers(0, len(x), len(is_music)) for x in (SUBJECTS, TAILS, SONGS))
    speech = [f"{SUBJECTS[a]} {VERBS[a]} {TAILS[b]}".strip() for a, b in zip(who, tail, strict=True)]
    return [[SONGS[s]] if m else [text] for m, s, text in zip(is_music, song, speech, strict=True)]


def _table(
    dataset: str,
    split: str,
    ids: np.ndarray,
    keys: np.ndarray,
    start_s: np.ndarray,
    labels: np.ndarray,
    captions: list[list[str]],
) -> pa.Table:
    n = len(ids)
    has_labels = dataset == "audioset"
    mids = np.array([_mid(k) for k in range(len(CLASSES))], dtype=object)
    columns = {
        "clip_id": ids,
        "shard": np.zeros(n, np.int32),
        "dataset": [dataset] * n,
        "split": [split] * n,
        "host": ["zenodo" if dataset == "clotho" else "youtube"] * n,
        "key": keys,
        "archive": [""] * n,
        "start_s": start_s,
        "end_s": start_s + 10,
        "captions": captions,
        "labels": [sorted(set(row)) for row in mids[labels]] if has_labels else [[]] * n,
    }
    return pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def _fold(rng: np.random.Generator, ledger: pd.DataFrame) -> pd.DataFrame:
    """What the fold of the attempts would say of the same clips: states, and when each was seen and missed."""
    ok = (ledger["status"] == "ok").to_numpy()
    family = ledger["reason"].str.partition(".")[0]
    state = family.map({"": "ok", "gone": "gone", "denied": "denied", "qc": "content"}).fillna("retry").astype(object)
    state[(ledger["reason"] == "gone.unspecified").to_numpy()] = "suspect"
    last_ms = NOW_MS - rng.integers(0, 40, len(ledger)) * DAY_MS
    missing = pd.Series(last_ms, dtype="Int64").mask(ok)
    return pd.DataFrame(
        {
            "clip_id": ledger["clip_id"].to_numpy(),
            "state": state.to_numpy(),
            "reason": ledger["reason"].to_numpy(),
            "message": ledger["message"].to_numpy(),
            "n_attempts": 1,
            "n_counted": 1,
            "first_ms": last_ms,
            "last_ms": last_ms,
            "last_ok_ms": pd.Series(last_ms, dtype="Int64").where(ok).to_numpy(),
            "first_missing_ms": missing.to_numpy(),
            "next_ms": pd.array([pd.NA] * len(ledger), dtype="Int64"),
        }
    )


def _mid(k: int) -> str:
    return f"/m/{k:04x}"
