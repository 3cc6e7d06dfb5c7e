"""VIP-ANT's checkpoints (Zhao et al. 2022) as harken's audio tower, read without running anything that they name.

Such a file is torch.save's of {"cfg": an OmegaConf config, "model": (audio, loss) or (image, audio, text, loss)}, the
latter state dicts. Its pickle names classes of other packages, so torch's weights-only reader refuses it, and pickle's
own would import and call whatever is named. Here a name is imported by nobody: a tensor's becomes a declaration, every
other one an `_Inert`. Bytes are read only for tensors whose shapes are the tower's and lie within the file.

What the tensors do not say and the caller must: the FBANK's length and the stride of the patches (1000 frames, 16 in
time and 24 in mel in VIP-ANT's scripts); the grid that these make must have as many cells as there are positions. Nor
do they say the activation, CLIP's QuickGELU in every VIP-ANT tower as in AudioViT, or the heads, one per 64 of width.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harken.errors import DataError
from harken.models import weights
from harken.models.audio_vit import CLIP_HEAD_WIDTH, AudioViT, token_grid
from harken.models.towers import LOGIT_SCALE_INIT, AudioTower
from harken.shards import atomic, file_sha256, write_json

KEYS = {
    "pre_encoder.conv1.weight": "conv1.weight",  # 3 channels: kept, both average them at every forward; 1: thrice
    "pre_encoder.ln.": "ln_pre.",
    "misc.class_embedding": "class_embedding",
    "misc.positional_embedding": "positional_embedding",  # CLS, then the grid, time by time; 61 x 5 + 1 rows
    "encoder.resblocks.": "transformer.resblocks.",  # in a block both have CLIP's names
    "post_encoder.ln.": "ln_post.",
    "post_encoder.proj": "proj",
}
"""VIP-ANT's audio head -> AudioViT. A key that ends in a dot stands for all that begin with it; there are no others."""

LOGIT_SCALES = ("logit_scale", "loss_head_va.logit_scale", "loss_head_al.logit_scale")
"""Where a loss head keeps its scale: alone, or as one of several (va: vision-audio, al: audio-language); first wins."""

STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
TORCH_LEGACY = 0x1950A86A20F9469CFC6C  # the first pickle of a file by torch < 1.6
STRIDES = (8, 10, 12, 16, 20, 24, 32)  # tried to say which stride a grid of positions may be of
MOST_LAYERS = 64


@dataclass(frozen=True)
class VipAnt:
    """A checkpoint's audio tower: `tensors` float32 under AudioViT's names (see KEYS), and its logit scale.

    `facts` can be written as JSON: the file and its SHA-256, the tower's shape, where the logit scale comes from, and
    every name of the pickle that was not followed (`not_imported`).
    """

    tensors: Mapping[str, Tensor]
    logit_scale: float
    facts: Mapping[str, Any]


def read_vipant(path: Path) -> VipAnt:
    """The audio tower of a VIP-ANT checkpoint, of either of torch's formats. Runs and imports nothing it names.

    A checkpoint without a logit scale gets the one VIP-ANT starts from, ln(1/0.07), and `facts` say so. Raises
    DataError, with a table of keys and shapes where the tower is another.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give the path of a VIP-ANT checkpoint, such as `bimodal_*.pth`.")
    try:
        with _opened(path) as (content, names, fetch):
            audio, loss = _heads(path, content)
            scale = next((k for k in LOGIT_SCALES if k in loss), None)
            _check_sizes(path, audio | ({} if scale is None else {scale: loss[scale]}))
            like, shape = _check_shapes(path, {k: tuple(t.size) for k, t in audio.items()})
            tensors = {k: _tensor(audio[_theirs(k)], fetch) for k in like}
            logit_scale = LOGIT_SCALE_INIT if scale is None else _tensor(loss[scale], fetch).item()
    except DataError:
        raise
    except Exception as e:  # bytes made to deceive make a reader raise anything
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DataError(f"{path}: not a checkpoint that can be read safely ({reason}). Download it again.") from None
    if bad := [k for k, t in {**tensors, "logit_scale": torch.tensor(logit_scale)}.items() if not t.isfinite().all()]:
        raise DataError(f"{path}: {', '.join(bad)}: not all numbers are finite. Take a checkpoint from before.")
    tensors["conv1.weight"] = tensors["conv1.weight"].expand(-1, 3, -1, -1).contiguous()
    facts = {"file": path.name, "sha256": file_sha256(path), **shape, "not_imported": sorted(names)}
    return VipAnt(tensors, logit_scale, facts | {"logit_scale_from": scale or "absent: ln(1/0.07)"})


def convert(vipant: VipAnt, n_frames: int = 1000, stride: tuple[int, int] = (16, 24)) -> dict[str, Tensor]:
    """The state dict of an AudioTower of one segment, for FBANKs of `n_frames` and patches `stride` (time, mel) apart.

    Nothing is computed: positions are taken as they are, so these must be of the same grid. Raises DataError where not.
    """
    rows, patch = len(vipant.tensors["positional_embedding"]), vipant.facts["patch"]
    time, mel = token_grid(n_frames, patch=patch, stride=stride)
    if rows != time * mel + 1:
        fits = [
            f"({t}, {m}), a grid of {g[0]} x {g[1]}"
            for t, m in itertools.product(STRIDES, STRIDES)
            if math.prod(g := token_grid(n_frames, patch=patch, stride=(t, m))) == rows - 1
        ]
        side = math.isqrt(rows - 1)
        square = f" {side} x {side} is what an image tower has." if side * side == rows - 1 else ""
        raise DataError(
            f"{vipant.facts['file']}: {rows} positions, a CLS row and {rows - 1}; {n_frames} frames and a stride of "
            f"{stride} make a grid of {time} x {mel}, {time * mel + 1} rows.{square} "
            + (f"A stride that fits: {'; '.join(fits)}." if fits else "No usual stride fits; is n_frames right?")
        )
    tower = {f"vit.{k}": t for k, t in vipant.tensors.items()}
    return tower | {"logit_scale": torch.tensor(vipant.logit_scale)}


def write_run(vipant: VipAnt, folder: Path, like: AudioTower, told: Mapping[str, Any]) -> None:
    """Write the folder of a finished pretraining run (see training.runs.finish), for fine-tuning and evaluation.

    `told` is what run.json is to say, its `vit` among it; `like` is the tower that the preset would train. What nobody
    knows of the run, such as its steps, is null, and its curve is empty; `imported` holds the checkpoint's facts.
    Raises DataError where the tower is of another size than `like`.
    """
    vit = told["vit"]
    state, where = convert(vipant, vit["n_frames"], tuple(vit["stride"])), vipant.facts["file"]
    found, expected = ({k: tuple(t.shape) for k, t in s.items()} for s in (state, like.state_dict()))
    if found != expected:
        raise DataError(
            f"{where}: its tower is not of the size of this preset's CLIP:\n{weights.shape_table(found, expected)}"
        )
    if (heads := like.vit.get_submodule("transformer.resblocks.0.attn").heads) != vipant.facts["heads"]:
        raise DataError(f"{where}: its tower has {vipant.facts['heads']} heads, this preset's CLIP has {heads}.")
    facts = dict(told) | dict.fromkeys(("n_train", "n_val", "n_held_out", "n_left_out"))
    facts["imported"] = dict(vipant.facts)
    weights.save(folder / "model.safetensors", state, facts)
    with atomic(folder / "history.csv") as f:
        f.write(b"epoch\n")
    write_json(folder / "run.json", facts | dict.fromkeys(("steps", "best_epoch", "best_score")))


def _theirs(name: str) -> str:
    """VIP-ANT's key for one of AudioViT's names."""
    for theirs, ours in KEYS.items():
        if name == ours or (ours.endswith(".") and name.startswith(ours)):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def _heads(path: Path, content: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The audio head and the loss head, without the prefix that a parallel wrapper leaves."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, tuple | list) or len(model) not in (2, 4):
        raise DataError(
            f"{path}: not a VIP-ANT checkpoint: its 'model' is no tuple of 2 (audio, loss) or 4 (image, audio, text, "
            "loss) state dicts."
        )
    audio, loss = (model[-3], model[-1]) if len(model) == 4 else model
    if not (isinstance(audio, dict) and isinstance(loss, dict) and all(isinstance(k, str) for k in (*audio, *loss))):
        raise DataError(f"{path}: not a VIP-ANT checkpoint: its audio or loss head is no state dict.")
    stripped = [{k.removeprefix("module."): v for k, v in head.items()} for head in (audio, loss)]
    return stripped[0], stripped[1]


def _check_sizes(path: Path, tensors: Mapping[str, Any]) -> None:
    """Every value is a floating-point tensor that lies within its storage, and all of them fit into the file."""
    total = 0
    for key, t in tensors.items():
        if not isinstance(t, _Tensor) or not isinstance(t.storage, _Storage) or len(t.size) != len(t.stride):
            raise DataError(f"{path}: {key} is no tensor.")
        if not t.storage.dtype.is_floating_point:
            raise DataError(f"{path}: {key} is {t.storage.dtype}; it must be of floating point.")
        whole = all(type(n) is int for n in (t.offset, *t.size, *t.stride))
        if not whole or min(t.offset, *t.stride, 0) < 0 or min((1, *t.size)) < 1:
            raise DataError(f"{path}: {key} has no possible shape: size {t.size}, stride {t.stride}.")
        last = t.offset + sum((n - 1) * s for n, s in zip(t.size, t.stride, strict=True))
        if max(last + 1, math.prod(t.size)) > t.storage.numel:
            raise DataError(
                f"{path}: {key} is declared as {t.size} from {t.offset}, beyond the {t.storage.numel} numbers it has."
            )
        total += math.prod(t.size) * t.storage.dtype.itemsize
    if total > path.stat().st_size:
        raise DataError(f"{path}: declares tensors of {total:,} bytes, more than the file has. Download it again.")


def _check_shapes(path: Path, found: Mapping[str, tuple[int, ...]]) -> tuple[list[str], dict[str, int]]:
    """AudioViT's names for the keys, and the tower's width, layers and so on; DataError where a shape does not fit.

    The tower is as large as its own tensors tell; as ViT-B/32, where the one that would tell is missing.
    """
    conv = s if len(s := found.get("pre_encoder.conv1.weight", ())) == 4 else (768, 3, 32, 32)
    proj = s if len(s := found.get("post_encoder.proj", ())) == 2 else (768, 512)
    rows, *_ = found.get("misc.positional_embedding") or (306,)
    blocks = {k.split(".")[2] for k in found if k.startswith("encoder.resblocks.")}
    width, layers, patch, dim = conv[0], min(len(blocks), MOST_LAYERS) or 12, conv[3], proj[1]
    with torch.device("meta"):
        grid = (rows - 1, 1)  # which one it really is, `convert` asks
        like = AudioViT(width=width, layers=layers, heads=1, patch=patch, embed_dim=dim, pos_grid=grid).state_dict()
    expected = {_theirs(k): tuple(t.shape) for k, t in like.items()}
    expected["pre_encoder.conv1.weight"] = (width, 1 if conv[1] == 1 else 3, patch, patch)
    if found != expected:
        raise DataError(
            f"{path}: its audio head is not the vision transformer that harken has, here of width {width} with "
            f"{layers} layers:\n{weights.shape_table(found, expected)}"
        )
    if width % CLIP_HEAD_WIDTH:
        raise DataError(f"{path}: width {width} is no multiple of {CLIP_HEAD_WIDTH}, the width of a head in VIP-ANT.")
    shape = {"width": width, "layers": layers, "heads": width // CLIP_HEAD_WIDTH, "patch": patch, "embed_dim": dim}
    return list(like), shape | {"in_channels": conv[1], "positions": rows}


class _Inert:
    """What stands for every class and function that is not followed: takes anything, keeps nothing, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    @staticmethod
    def _ignore(*args: Any) -> None:
        pass

    # static, so that a pickle can alter neither an instance nor the class, which it can name as well
    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Dict(dict[Any, Any]):
    """An OrderedDict without attributes: torch hangs `_metadata` on a state dict, which could be anything."""

    __setstate__ = _Inert._ignore


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class _Tensor(NamedTuple):
    """What torch's `_rebuild_tensor_v2` would be called with."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    requires_grad: Any
    hooks: Any
    metadata: Any = None

    @staticmethod
    def __setstate__(*args: Any) -> None:
        pass


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
}
KNOWN |= {("torch", name): dtype for name, dtype in STORAGES.items()}


class _Unpickler(pickle.Unpickler):
    """Follows no name; `names` are those that it met. `storages` are the tensors' memory by key."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.names: set[str] = set()
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        self.names.add(f"{module}.{name}".encode("unicode_escape").decode())  # it may be printed and written
        return _Inert

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or type(key) is not str or type(numel) is not int or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"a persistent object that is no storage: {kind!r:.80}")
        if any(v is not None for v in view):
            raise pickle.UnpicklingError("a storage that is a view of another, as before torch 0.4")
        return self.storages.setdefault(key, _Storage(dtype, key, numel))


def _unpickle(f: Any) -> tuple[Any, _Unpickler]:
    """The next pickle of a file. All of it is read as opcodes first, so that no length in it exceeds the file."""
    start = f.tell()
    for n, (opcode, argument, _) in enumerate(pickletools.genops(f)):
        if opcode.name.endswith("PUT") and (argument or 0) > n:  # CPython's memo is as long as its highest number
            raise pickle.UnpicklingError(f"memo number {argument} at opcode {n}")
        if opcode.name.startswith("EXT"):  # these are looked up past find_class where they were met before
            raise pickle.UnpicklingError("a name by extension code")
    end = f.tell()
    f.seek(start)
    reader = _Unpickler(f.read(end - start))
    return reader.load(), reader


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, set[str], Callable[[_Storage], bytes]]]:
    """What a checkpoint holds, the names in it, and how to get the bytes of a storage."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield _from_zip(archive)
    else:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
            yield _from_sequence(view)


def _from_zip(archive: zipfile.ZipFile) -> tuple[Any, set[str], Callable[[_Storage], bytes]]:
    """torch's format since 1.6: one folder with data.pkl and a file per storage, nothing compressed."""
    roots = [n.removesuffix("data.pkl") for n in archive.namelist() if n.endswith("/data.pkl")]
    if len(roots) != 1:
        raise pickle.UnpicklingError(f"a zip with {len(roots)} data.pkl; torch's has one")
    root = roots[0]
    if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()):
        raise pickle.UnpicklingError("it is compressed, which torch never does")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise pickle.UnpicklingError("it was written on a big-endian machine")
    content, reader = _unpickle(io.BytesIO(archive.read(f"{root}data.pkl")))

    def fetch(storage: _Storage) -> bytes:
        return archive.read(f"{root}data/{storage.key}")

    return content, reader.names, fetch


def _from_sequence(view: mmap.mmap) -> tuple[Any, set[str], Callable[[_Storage], bytes]]:
    """torch's format before 1.6: five pickles, then each storage behind the number of its elements (8 bytes)."""
    magic, _ = _unpickle(view)
    if magic != TORCH_LEGACY:
        raise pickle.UnpicklingError("neither of torch's formats")
    _unpickle(view)  # the protocol's version, 1001 in all of them
    system, _ = _unpickle(view)
    if system.get("little_endian") is not True:
        raise pickle.UnpicklingError("it was written on a big-endian machine")
    content, reader = _unpickle(view)
    keys, _ = _unpickle(view)
    position, starts = view.tell(), {}
    for key in keys:
        storage = reader.storages[key]
        starts[key] = position + 8
        position = starts[key] + storage.numel * storage.dtype.itemsize

    def fetch(storage: _Storage) -> bytes:
        start = starts[storage.key]
        if int.from_bytes(view[start - 8 : start], "little") != storage.numel:
            raise pickle.UnpicklingError(f"storage {storage.key} is not as long as declared")
        return view[start : start + storage.numel * storage.dtype.itemsize]

    return content, reader.names, fetch


def _tensor(t: _Tensor, fetch: Callable[[_Storage], bytes]) -> Tensor:
    """The numbers of a tensor that `_check_sizes` let pass, float32, contiguous."""
    data, dtype = fetch(t.storage), t.storage.dtype
    if len(data) != t.storage.numel * dtype.itemsize:
        raise pickle.UnpicklingError(f"storage {t.storage.key} is {len(data)} bytes, not {t.storage.numel} numbers")
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return torch.empty(t.size, dtype=torch.float32).copy_(flat.as_strided(t.size, t.stride, t.offset))
