"""Search under a text-aware pooling (TAP, X-Pool's block, MaxSim): int8 sketches of all clips, exact scores of a few.

What such a pooling makes of a clip depends on the text, so no one vector stands for a clip. An index keeps, in a
folder of plain files that are read as memory maps:

    frames.npy           (row, dim) float32, all clips' frames one after the other, as the attention reads them: after
                         the layer norm (MaxSim: of length 1). Keys and values are both linear in them, so one row
                         serves both; X-Pool's keys and values would be twice the bytes. 127 kB for 31 frames of 1024
    starts.npy           (clip + 1,) int64, the first row of each clip, then their number
    details.npy          (row, 192) int8: what the pooling would give if it read this frame alone, and the frame's key,
                         in the leading directions of such vectors and of keys. 6 kB
    sketches.npy         (clip, CENTROIDS x 128) int8: the first part of that, of groups of the clip's frames. 1 kB
    basis.npy            (dim, 128) float32, the directions; key_basis.npy the same of keys
    pooling.safetensors  the pooling and its weights
    clips.parquet        one row for each: clip_id, then what `meta` gave
    index.json           sizes, frame_s and hashes; written last, so its presence means that the index is whole

A text meets all sketches (the largest cosine with a group), the details of LOOKED_AT x n clips that are best by them
(attention, in int8), and the frames of the n best by these: exactly. Frames are in float32 because a score is promised
to 1e-5, and a TAP that attends sharply has logits of some tens, of which half precision holds three digits. On a TAP
that was trained to find events (1.3 frames read in effect, logits spread by 23; 2,000 or 3,000 clips of 31 frames), the
exact ten best were among so many best by each, in per cent:

                                                        bytes a clip     10     20     50    100    200
    the mean over frames, whole                                1,024   18.9   24.4   38.3   49.6   63.3
    TAP on 4 groups' means, whole                              4,096   71.2   86.2   93.1   95.7   97.0
    largest cosine of 4 groups, 128 directions                   512   77.0   92.7   97.3   98.3   99.1
    largest cosine of 8 groups, 128 directions                 1,024   79.2   96.0   99.1   99.7   99.9
    TAP on all frames, 128 directions and 64 of keys           5,952   98.9  100.0  100.0  100.0  100.0

One vector for all texts is the worst of them by far. How many directions are enough is the data's to say: events were
made of 64 numbers here, which flatters 128.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from scipy.linalg import hadamard
from torch import Tensor, nn

from harken.errors import ConfigError, DataError
from harken.models import weights
from harken.models.features import AudioFeatures
from harken.models.pooling import POOLINGS, MaxSim, TextAwareAttention, XPool
from harken.models.towers import TextAudio
from harken.search import index as plain
from harken.search import query
from harken.search.folder import (
    BASES,
    CLIPS,
    DETAILS,
    FACTS,
    FRAMES,
    POOLING,
    SKETCHES,
    STARTS,
    read_facts,
    write_facts,
    write_header,
)
from harken.shards import atomic

CENTROIDS = 8  # of a clip's frames
WIDTH, KEY_WIDTH = 128, 64  # of a sketched vector and of a sketched key, at most; powers of two
SAMPLE = 1000  # clips that the bases are made from
ROUNDS = 8  # of k-means
CANDIDATES = 500
LOOKED_AT = 40  # clips whose details are read, for each candidate
TILE = 1 << 16  # clips of which coarse scores are made at once: bounds the memory, not the result
BLOCK = 64  # clips that are read together: 8 MB of frames, which stay in the cache from one product to the next
BLOCKS = " ▁▂▃▄▅▆▇█"
TEMPERATURE = 0.07  # the losses' own: how frames' cosines become a strip that sums to 1
SLACK = 1e-4  # what rounding may take from a float32 score; see `scoring.TapIndex`

TextAware = TextAwareAttention | XPool | MaxSim
Frames = Float[Tensor, "frame dim"]


@dataclass(frozen=True, slots=True)
class TimedHit(query.Hit):
    """A hit, and its frames: `weights` (frame,), how much of each the text reads, which sum to 1; `alone` (frame,), the
    score that each would have if it were all that there is of the clip.

    Weights need not lie where the sound is: a pooling may as well look for what contradicts the text (docs/grounding.md
    has figures). What says when is `alone`.
    """

    weights: tuple[float, ...] = ()
    alone: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class TextAwareIndex:
    """Clips that can be searched under `pooling`: the files of the module's docstring.

    `steps`: what one step of an int8 is worth in `basis` and in `key_basis`. `frame_s`: seconds from frame to frame.
    """

    frames: Float[Tensor, "row dim"]
    starts: Int[Tensor, " clips_and_end"]
    details: Int[Tensor, "row detail"]
    sketches: Int[Tensor, "clip sketch"]
    basis: Float[Tensor, "dim width"]
    key_basis: Float[Tensor, "key key_width"]
    steps: tuple[float, float]
    pooling: TextAware
    pooling_64: TextAware
    clips: pa.Table
    frame_s: float | None

    def __len__(self) -> int:
        return len(self.sketches)

    @property
    def dim(self) -> int:
        return int(self.frames.shape[1])


def build(
    clip_ids: Sequence[str],
    frames: Iterable[npt.NDArray[np.floating] | Tensor],
    pooling: nn.Module,
    folder: Path,
    meta: pa.Table | None = None,
    frame_s: float | None = None,
) -> TextAwareIndex:
    """Write the index of clips into `folder`, in place of one that may be there, and load it.

    `frames` gives each clip's frames that count (frame, dim), in the order of clip_ids: projected, as
    `scoring.score_matrix` takes them, without padding that a pooling does not look at. One clip is in memory at a time.
    `meta`: as in `index.build`. Raises ConfigError for sizes or a pooling that do not fit and ids that come twice, and
    DataError for frames that are not finite. A stop in between leaves no index, not half of one.
    """
    kept = _plain_copy(pooling)
    table = plain.clips_table(clip_ids, meta)
    if not table.num_rows:
        raise ConfigError("index: no clips. Give at least one.")
    (folder / FACTS).unlink(missing_ok=True)
    with torch.inference_mode():
        starts = _write_frames(folder / FRAMES, table["clip_id"].to_pylist(), frames, kept)
        rows = _mapped(folder / FRAMES)
        bases, steps, centre = _bases(kept, rows, starts)
        _write_sketches(folder, kept, rows, starts, bases, steps, centre)
    for name, array in ((STARTS, starts), *zip(BASES, (b.numpy() for b in bases), strict=True)):
        with atomic(folder / name) as f:
            np.save(f, array, allow_pickle=False)
    weights.save(folder / POOLING, kept.state_dict(), _spec(kept, rows.shape[1]))
    with atomic(folder / CLIPS) as f:
        pq.write_table(table, f)
    facts = {"n_clips": table.num_rows, "n_rows": int(starts[-1]), "dim": rows.shape[1]}
    facts |= {"frame_s": frame_s, "steps": steps, "centroids": CENTROIDS, "bases": [list(b.shape) for b in bases]}
    write_facts(folder, facts)
    return load(folder)


def save_run(
    folder: Path,
    model: TextAudio,
    clip_ids: Sequence[str],
    audio: AudioFeatures,
    meta: pa.Table,
    frame_s: float | None,
) -> None:
    """The index of a run's gallery, for `harken search`: of the kind that its pooling needs.

    `audio`: its projected frames, as `TextToAudio.clips` gives them, a clip for each of clip_ids.
    """
    pooling, frames, mask = model.pooling, audio.frames.detach().cpu(), audio.mask.cpu()
    if not model.pools_first and getattr(pooling, "is_text_aware", True):
        reads_padding = not getattr(getattr(pooling, "tap", pooling), "key_mask", True)
        kept = (f if reads_padding else f[m] for f, m in zip(frames, mask, strict=True))
        build(clip_ids, kept, pooling, folder, meta, frame_s)
        return
    if not model.pools_first:
        with torch.inference_mode():
            whole, valid = audio.frames, audio.mask
            frames = pooling(whole, valid, whole.new_zeros(1, whole.shape[-1])).cpu()
    plain.build(clip_ids, frames[:, 0].numpy(), meta).save(folder)


def load(folder: Path) -> TextAwareIndex:
    """The index in `folder`, as memory maps. Raises DataError where there is none or it is not whole.

    Only sizes are checked here; `folder.verify` reads every byte.
    """
    facts = read_facts(folder)
    arrays = {n: _mapped(folder / n) for n in (FRAMES, STARTS, DETAILS, SKETCHES, *BASES)}
    clips, n, (of_z, of_keys) = pq.read_table(folder / CLIPS), facts["n_clips"], facts["bases"]
    expected = {
        FRAMES: (facts["n_rows"], facts["dim"]),
        STARTS: (n + 1,),
        DETAILS: (facts["n_rows"], of_z[1] + of_keys[1]),
        SKETCHES: (n, facts["centroids"] * of_z[1]),
        **dict(zip(BASES, (tuple(of_z), tuple(of_keys)), strict=True)),
        CLIPS: (n,),
    }
    found = {name: tuple(array.shape) for name, array in arrays.items()} | {CLIPS: (clips.num_rows,)}
    for name, shape in expected.items():
        if found[name] != shape:
            raise DataError(f"{folder / name}: index.json says {shape}, found {found[name]}. Build the index again.")
    _, spec = weights.load(folder / POOLING)
    pooling = POOLINGS[spec["name"]](**spec["options"])
    weights.load_into(pooling, folder / POOLING)
    kept = _plain_copy(pooling)
    return TextAwareIndex(
        frames=arrays[FRAMES],
        starts=arrays[STARTS],
        details=arrays[DETAILS],
        sketches=arrays[SKETCHES],
        basis=arrays[BASES[0]],
        key_basis=arrays[BASES[1]],
        steps=(facts["steps"][0], facts["steps"][1]),
        pooling=kept,
        pooling_64=copy.deepcopy(kept).double(),
        clips=clips,
        frame_s=facts["frame_s"],
    )


def search(
    index: TextAwareIndex,
    text_embedding: npt.ArrayLike,
    k: int = 10,
    candidates: int = CANDIDATES,
    exact: bool = False,
) -> list[TimedHit]:
    """The k clips that score highest with a text, best first: of the `candidates` likeliest, or, `exact`, of all.

    text_embedding: (dim,), as the text tower gave it. Scores are those of `scoring.score_matrix`, whichever clips are
    looked at; what a coarse score hides is a clip, never its score. Equal scores come in the order of the index. At
    least k clips are scored. Raises ConfigError for k or candidates < 1 or another dim, DataError for an embedding that
    is zero or not finite.

    Candidates are scored in float32; those that its rounding could hide among the first k again in float64, each on its
    own, so that neither its neighbours nor the number of candidates can change a clip's score.
    """
    for name, value in (("k", k), ("candidates", candidates)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ConfigError(f"search: {name} must be a whole number of at least 1, found {value!r}.")
    text = torch.from_numpy(query.checked(text_embedding, index.dim).copy())
    n = len(index)
    with torch.inference_mode():
        chosen = torch.arange(n) if exact else _candidates(index, text.float(), min(n, max(candidates, k)))
        rough = _scores(index, text.float(), chosen)
        best = chosen[rough >= rough.topk(min(k, len(chosen))).values[-1] - SLACK]
        aim = _aim(index.pooling_64, text)
        final = [_final(index, text, aim, int(clip)) for clip in best]
    scores = np.array([score for score, *_ in final])
    order = np.lexsort((best.numpy(), -scores))[:k]  # ties: the earlier clip first
    rows = index.clips.take(pa.array(best.numpy()[order])).to_pylist()
    return [_hit(rank, row, final[i]) for rank, (row, i) in enumerate(zip(rows, order, strict=True), 1)]


def strip(alone: tuple[float, ...], frame_s: float | None) -> str:
    """Frames' scores over time, a block character each, and where they peak: seconds, or the frame's number.

    Blocks show their softmax at the losses' temperature: cosines by themselves are all much alike.
    """
    weights = torch.softmax(torch.tensor(alone, dtype=torch.float64) / TEMPERATURE, dim=0).tolist()
    most = max(weights)
    row = "".join(BLOCKS[round((len(BLOCKS) - 1) * w / most)] for w in weights)
    peak = weights.index(most)
    return f"|{row}| peak at " + (f"frame {peak}" if frame_s is None else f"{peak * frame_s:.1f} s")


def coarse_scores(index: TextAwareIndex, text: Float[Tensor, " dim"]) -> Int[Tensor, " clip"]:
    """The coarse score of every clip, in units that only their order has a meaning in.

    The arithmetic is of whole numbers: it is the same in every order, on any number of threads.
    """
    sketch, width = text @ index.basis, index.basis.shape[1]
    sketch = (sketch * (127 / sketch.abs().max().clamp_min(1e-30))).round().to(torch.int8)
    # one row for each centroid's place, and one product over whole sketches: faster than one over centroids
    places = torch.eye(index.sketches.shape[1] // width, dtype=torch.int8)
    rows = (places[..., None] * sketch).flatten(1)
    return torch.cat([torch._int_mm(rows, tile.T).amax(0) for tile in torch.split(index.sketches, TILE)])


def _candidates(index: TextAwareIndex, text: Float[Tensor, " dim"], n: int) -> Int[Tensor, " best"]:
    """The n clips that are likely to score highest, ascending: of LOOKED_AT x n by their sketches, by their details."""
    looked_at = torch.arange(len(index))
    if n * LOOKED_AT < len(index):
        looked_at = looked_at[_best(coarse_scores(index, text), n * LOOKED_AT)]
    return looked_at if n >= len(looked_at) else looked_at[_best(_likely_scores(index, text, looked_at), n)]


def _best(scores: Shaped[Tensor, " clip"], n: int) -> Int[Tensor, " best"]:
    """Which are the n largest, ascending; of those that are equal, the first."""
    least = scores.topk(n).values[-1]
    above = (scores > least).nonzero()[:, 0]
    return torch.cat([above, (scores == least).nonzero()[: n - len(above), 0]]).sort().values


def _likely_scores(
    index: TextAwareIndex, text: Float[Tensor, " dim"], clips: Int[Tensor, " clip"]
) -> Float[Tensor, " clip"]:
    """Scores of clips from their frames in int8: attention by sketched keys, and cosines of sketched vectors."""
    width, (step, key_step) = index.basis.shape[1], index.steps
    unit = F.normalize(text, dim=0) @ index.basis * step
    asked = _query(index.pooling, text) @ index.key_basis * key_step
    found = []
    for block in torch.split(clips, 4 * BLOCK):
        rows, is_beyond = _rows(index.details, index.starts, block)
        vectors, keys = torch.split(rows.float(), [width, len(asked)], dim=-1)
        # two products with a vector each: one with a matrix of two columns takes eight times as long
        cosines, logits = (
            torch.mv(x.flatten(0, 1), y).view(is_beyond.shape) for x, y in ((vectors, unit), (keys, asked))
        )
        row = _attention(index.pooling, logits.masked_fill(is_beyond, -torch.inf))
        mix = torch.bmm(row[:, None], vectors)[:, 0] * step
        found.append((row * cosines).sum(1) / mix.norm(dim=1).clamp_min(1e-12))
    return torch.cat(found)


def _rows(
    table: Shaped[Tensor, "row width"], starts: Int[Tensor, " clips_and_end"], clips: Int[Tensor, " clip"]
) -> tuple[Shaped[Tensor, "clip frame width"], Bool[Tensor, "clip frame"]]:
    """What a table holds of some clips' frames. Where one has fewer than others, its last again, and a True."""
    first, last = starts[clips], starts[clips + 1] - 1
    at = first[:, None] + torch.arange(int((last - first).max()) + 1)
    rows = table.index_select(0, torch.minimum(at, last[:, None]).flatten())
    return rows.view(*at.shape, -1), at > last[:, None]


def _scores(index: TextAwareIndex, text: Float[Tensor, " dim"], clips: Int[Tensor, " clip"]) -> Float[Tensor, " clip"]:
    """Scores of clips in float32."""
    aim, unit = _aim(index.pooling, text), F.normalize(text, dim=0)
    found = []
    for block in torch.split(clips, BLOCK):
        rows, is_beyond = _rows(index.frames, index.starts, block)
        row = _attention(index.pooling, (rows @ aim).masked_fill(is_beyond, -torch.inf))
        found.append(F.normalize(_read(index.pooling, torch.bmm(row[:, None], rows)[:, 0]), dim=-1) @ unit)
    return torch.cat(found)


def _final(
    index: TextAwareIndex, text: Float[Tensor, " dim"], aim: Float[Tensor, " dim"], clip: int
) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
    """A clip's score, its attention row, and the score of each frame alone, in float64."""
    rows = index.frames[int(index.starts[clip]) : int(index.starts[clip + 1])].double()
    row = _attention(index.pooling_64, rows @ aim)
    unit = F.normalize(text, dim=0)
    score = F.normalize(_read(index.pooling_64, row @ rows), dim=0) @ unit
    alone = _alone(index.pooling_64, rows) @ unit
    return float(score), tuple(row.tolist()), tuple(alone.tolist())


def _hit(rank: int, row: dict[str, Any], found: tuple[float, tuple[float, ...], tuple[float, ...]]) -> TimedHit:
    clip_id, captions = row.pop("clip_id"), row.pop("captions", None)
    score, weights, alone = found
    return TimedHit(rank, clip_id, min(max(score, -1.0), 1.0), tuple(captions or ()), row, weights, alone)


def _tap(pooling: TextAware) -> TextAwareAttention | None:
    if isinstance(pooling, MaxSim):
        return None
    return pooling.tap if isinstance(pooling, XPool) else pooling


def _normed(pooling: TextAware, frames: Frames) -> Frames:
    """Frames as the attention reads them."""
    tap = _tap(pooling)
    return F.normalize(frames, dim=-1) if tap is None else tap.ln_audio(frames)


def _query(pooling: TextAware, text: Float[Tensor, " dim"]) -> Float[Tensor, " key"]:
    """What a key is multiplied by to give its logit."""
    tap = _tap(pooling)
    return F.normalize(text, dim=0) if tap is None else tap.queries(text[None])[0]


def _aim(pooling: TextAware, text: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
    """What a normed frame is multiplied by to give its logit, but for what all frames have in common."""
    tap, asked = _tap(pooling), _query(pooling, text)
    return asked if tap is None else asked @ tap.key.weight


def _keys(pooling: TextAware, rows: Frames) -> Float[Tensor, "frame key"]:
    """The keys of normed frames."""
    tap = _tap(pooling)
    return rows if tap is None else tap.key(rows)


def _attention(pooling: TextAware, logits: Float[Tensor, "*clip frame"]) -> Float[Tensor, "*clip frame"]:
    """How much of each frame is read."""
    if isinstance(pooling, MaxSim):
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)
    return torch.softmax(logits, dim=-1)


def _read(pooling: TextAware, mix: Float[Tensor, "*clip dim"]) -> Float[Tensor, "*clip dim"]:
    """z, of normed frames that attention has mixed: rows of attention sum to one, so values may be taken after it."""
    tap = _tap(pooling)
    if tap is None:
        return mix
    z = tap.ln_out(tap.out(tap.value(mix)))
    return pooling.ln_fc(z + pooling.fc(z)) if isinstance(pooling, XPool) else z


def _plain_copy(pooling: nn.Module) -> TextAware:
    if not isinstance(pooling, TextAwareAttention | XPool | MaxSim):
        raise ConfigError(
            f"index: {type(pooling).__name__} is not one of the text-aware poolings tap, xpool and maxsim. "
            "Give clips that have one vector each to search.index.build."
        )
    return copy.deepcopy(pooling).cpu().float().eval().requires_grad_(False)


def _spec(pooling: TextAware, dim: int) -> dict[str, Any]:
    """The name and options that make it again."""
    tap = _tap(pooling)
    if tap is None:
        return {"name": "maxsim", "options": {"dim": dim}}
    options: dict[str, Any] = {"dim": dim, "dp": tap.dp, "key_mask": tap.key_mask}
    if isinstance(pooling, XPool):
        return {"name": "xpool", "options": options}
    return {"name": "tap", "options": options | {"share_ln": tap.ln_text is None, "bias": tap.key.bias is not None}}


def _dim(pooling: TextAware) -> int | None:
    """The numbers of a frame, where the pooling fixes them."""
    tap = _tap(pooling)
    return None if tap is None else tap.key.in_features


def _write_frames(
    path: Path, ids: Sequence[str], frames: Iterable[npt.NDArray[np.floating] | Tensor], pooling: TextAware
) -> npt.NDArray[np.int64]:
    """Write every clip's normed frames, one after the other, and return where each begins and the last one ends."""
    starts, dim, left = [0], _dim(pooling), iter(frames)
    with atomic(path) as f:
        write_header(f, "<f4", (0, dim or 1))
        for clip_id in ids:
            given = next(left, None)
            if given is None:
                raise ConfigError(f"index: frames of {len(starts) - 1} clips for {len(ids)} clip ids.")
            rows = torch.as_tensor(given).detach().cpu().float()
            dim = rows.shape[-1] if dim is None else dim
            if rows.ndim != 2 or not len(rows) or rows.shape[1] != dim:
                raise ConfigError(
                    f"index: expected frames (frame, {dim}) of {clip_id}, at least one, found shape "
                    f"{tuple(rows.shape)}."
                )
            if not bool(torch.isfinite(rows).all()):
                raise DataError(f"index: frames of {clip_id} are not finite. Embed the clip again or leave it out.")
            f.write(_normed(pooling, rows).numpy().tobytes())
            starts.append(starts[-1] + len(rows))
        if next(left, None) is not None:
            raise ConfigError(f"index: frames of more clips than the {len(ids)} clip ids.")
        f.seek(0)
        write_header(f, "<f4", (starts[-1], dim or 1))  # now with the true number of rows
    return np.array(starts, np.int64)


def _alone(pooling: TextAware, rows: Frames) -> Frames:
    """For every normed frame, of length 1, what the pooling gives a text that reads it alone."""
    return F.normalize(_read(pooling, rows), dim=-1)


def _bases(
    pooling: TextAware, frames: Float[Tensor, "row dim"], starts: npt.NDArray[np.int64]
) -> tuple[tuple[Tensor, Tensor], tuple[float, float], Float[Tensor, " key"]]:
    """The leading directions of single frames' vectors and of keys, what one step of an int8 is worth in them, and the
    mean key: keys are sketched less it, which no attention row can tell.

    From SAMPLE clips at equal distances: other clips in an index change what it finds likely, never a score.
    """
    n = len(starts) - 1
    sample = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(int))
    rows = [frames[starts[c] : starts[c + 1]] for c in sample]
    vectors, keys = (torch.cat([of(pooling, r) for r in rows]) for of in (_alone, _keys))
    centre = keys.mean(0)
    bases, steps = [], []
    for found, most in ((vectors, WIDTH), (keys - centre, KEY_WIDTH)):
        bases.append(_leading(found, most))
        steps.append((float((found @ bases[-1]).abs().max()) or 1.0) / 127)
    return (bases[0], bases[1]), (steps[0], steps[1]), centre


def _leading(vectors: Float[Tensor, "vector dim"], most: int) -> Float[Tensor, "dim width"]:
    """The leading directions of vectors, `most` or as many as they have, down to a power of two.

    Turned by a Hadamard matrix, which spreads over all what lies in the first: one step of an int8 is then right for
    each of them.
    """
    width = 1 << (min(most, vectors.shape[1]).bit_length() - 1)
    top = torch.linalg.eigh((vectors.T @ vectors).double()).eigenvectors[:, -width:]
    return (top @ torch.from_numpy(hadamard(width)).double() / width**0.5).float().contiguous()


def _write_sketches(
    folder: Path,
    pooling: TextAware,
    frames: Float[Tensor, "row dim"],
    starts: npt.NDArray[np.int64],
    bases: tuple[Tensor, Tensor],
    steps: tuple[float, float],
    centre: Float[Tensor, " key"],
) -> None:
    """Write what is kept in int8: each frame's vector and key, and CENTROIDS vectors a clip."""
    shapes = {
        DETAILS: (len(frames), bases[0].shape[1] + bases[1].shape[1]),
        SKETCHES: (len(starts) - 1, CENTROIDS * bases[0].shape[1]),
    }
    with atomic(folder / DETAILS) as details, atomic(folder / SKETCHES) as sketches:
        for f, shape in ((details, shapes[DETAILS]), (sketches, shapes[SKETCHES])):
            write_header(f, "|i1", shape)
        for first, last in itertools.pairwise(starts.tolist()):
            vectors = _alone(pooling, frames[first:last]) @ bases[0]
            keys = (_keys(pooling, frames[first:last]) - centre) @ bases[1]
            details.write(torch.cat([_int8(vectors, steps[0]), _int8(keys, steps[1])], dim=1).numpy().tobytes())
            sketches.write(_int8(_centroids(vectors), steps[0]).numpy().tobytes())


def _int8(x: Float[Tensor, "row width"], step: float) -> Int[Tensor, "row width"]:
    return (x / step).round().clamp(-127, 127).to(torch.int8)


def _centroids(vectors: Float[Tensor, "frame width"]) -> Float[Tensor, "centroid width"]:
    """CENTROIDS directions of a clip's vectors, by k-means from those farthest apart; a few may come twice.

    Each is as long as its members are on average: in the middle of vectors that point apart there is a short one, which
    no text would find.
    """
    n = len(vectors)
    if n <= CENTROIDS:
        return vectors[torch.arange(CENTROIDS).clamp(max=n - 1)]
    chosen = [(vectors - vectors.mean(0)).square().sum(1).argmax()]
    far = torch.full((n,), torch.inf)
    for _ in range(CENTROIDS - 1):
        far = torch.minimum(far, (vectors - vectors[chosen[-1]]).square().sum(1))
        chosen.append(far.argmax())
    centres = vectors[torch.stack(chosen)]
    for _ in range(ROUNDS):
        own = F.one_hot(torch.cdist(vectors, centres).argmin(1), CENTROIDS).T.to(vectors)
        count = own.sum(1, keepdim=True)
        centres = torch.where(count > 0, own @ vectors / count.clamp_min(1), centres)
    length = torch.where(
        count > 0, own @ vectors.norm(dim=1, keepdim=True) / count.clamp_min(1), centres.norm(dim=1, keepdim=True)
    )
    return F.normalize(centres, dim=1) * length


def _mapped(path: Path) -> Tensor:
    """An .npy as a memory map; read only, since one that may be written to is refused where it exceeds the memory."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes
        return torch.from_numpy(array)
