"""Weights on disk and over the wire: with `vipant`, the only file of models/ that opens files.

harken's own checkpoints are safetensors with one JSON object in their header. Checkpoints from elsewhere are read with
torch's weights-only unpickler, which runs no code, and are known by their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from harken.errors import DataError
from harken.shards import atomic, file_sha256

FORMAT = "harken"
CHUNK = 1 << 20
MOST_ROWS = 12  # of a table in a message


def save(path: Path, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Tensors and a JSON-able `meta` in one safetensors file, whole or not at all. Equal inputs give equal bytes."""
    tensors = {k: state[k].detach().cpu().contiguous() for k in sorted(state)}
    header = {FORMAT: json.dumps(meta, sort_keys=True, ensure_ascii=False)}
    with atomic(path) as f:
        f.write(safetensors.torch.save(tensors, header))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and `meta` of a file that `save` wrote. Raises DataError where there is none or it is another's."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such weights file. Run the stage that writes it, or correct the path in params.yaml."
        )
    try:
        with safetensors.safe_open(path, "pt") as f:
            header = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as e:
        raise DataError(f"{path}: not a safetensors file, or cut short ({e}). Make it again.") from None
    if FORMAT not in header:
        raise DataError(f"{path}: these safetensors carry no '{FORMAT}' header; harken did not write them.")
    return tensors, json.loads(header[FORMAT])


def load_into(model: nn.Module, path: Path) -> dict[str, Any]:
    """Load `path` into `model`, every tensor of both, and return its `meta`. Raises DataError where they differ."""
    tensors, meta = load(path)
    _load_strictly(model, tensors, path)
    return meta


def _load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        found, expected = ({k: tuple(t.shape) for k, t in s.items()} for s in (state, model.state_dict()))
        why = f"\n{shape_table(found, expected)}" if found != expected else f" {e}"
        raise DataError(
            f"{path}: does not fit {type(model).__name__}; it is of another architecture or size:{why}"
        ) from None


def shape_table(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """The keys whose shapes differ, a line each, the first of them."""
    wrong = sorted(k for k in expected.keys() | found.keys() if found.get(k) != expected.get(k))
    rows = [("key", "found", "expected"), *((k, found.get(k, "none"), expected.get(k, "none")) for k in wrong)]
    lines = [f"  {k:<44} {a!s:<20} {b!s}" for k, a, b in rows[: MOST_ROWS + 1]]
    return "\n".join(lines) + (f"\n  and {len(wrong) - MOST_ROWS} more" if len(wrong) > MOST_ROWS else "")


def load_panns(model: nn.Module, path: Path) -> None:
    """Load a released PANNs checkpoint (`Cnn14_mAP=0.431.pth`, `ResNet38_mAP=0.434.pth`) into a Cnn14 or ResNet38.

    Refuses checkpoints of another front end, which load well and hear wrongly: another number of mel bins, or an STFT
    other than 1024 samples (the 16 and 8 kHz versions). Raises DataError.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. PANNs checkpoints are at https://zenodo.org/records/3987831.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DataError(f"{path}: not a checkpoint that can be read safely ({reason}). Download it again.") from None
    state = checkpoint.get("model") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or "bn0.weight" not in state:
        raise DataError(f"{path}: not a PANNs checkpoint: it has no 'model' with a 'bn0.weight'.")
    n_mels = model.get_submodule("bn0").num_features
    if len(state["bn0.weight"]) != n_mels:
        found = len(state["bn0.weight"])
        raise DataError(
            f"{path}: trained on {found} mel bins, the features here have {n_mels}. Take the {n_mels}-bin one."
        )
    stft = state.get("spectrogram_extractor.stft.conv_real.weight")
    if stft is not None and stft.shape[-1] != 1024:
        raise DataError(
            f"{path}: trained with an STFT of {stft.shape[-1]} samples; harken's log-mel has 1024 at 32 kHz. "
            "Take the 32 kHz checkpoint (no `16k` or `8k` in its name)."
        )
    _load_strictly(model, state, path)


def download(url: str, sha256: str, path: Path, *, timeout_s: float = 60.0) -> Path:
    """Fetch `url` to `path` unless a file with that SHA-256 is there; the file appears only once its hash is right.

    Raises DataError where the server refuses, the connection breaks, or the bytes are not the promised ones.
    """
    if path.is_file() and file_sha256(path) == sha256:
        return path
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply, atomic(path) as f:
            while chunk := reply.read(CHUNK):
                digest.update(chunk)
                f.write(chunk)
            if digest.hexdigest() != sha256:
                raise DataError(f"{url}: SHA-256 is {digest.hexdigest()}, expected {sha256}; nothing was kept.")
    except (urllib.error.URLError, TimeoutError, ConnectionError) as e:
        raise DataError(f"{url}: could not be downloaded ({e}). Fetch it by hand and put it at {path}.") from None
    return path


def open_clip_pretrained(name: str, pretrained: str) -> nn.Module:
    """An open_clip model by architecture and tag or file: ('ViT-B-32-quickgelu', 'openai') is the papers'.

    Raises DataError where there is no such model, or its weights are neither cached nor to be had.
    """
    import open_clip

    try:
        model = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
    except Exception as e:  # open_clip raises whatever its downloader does
        raise DataError(
            f"CLIP {name}/{pretrained}: could not be loaded ({e}). OpenAI's weights need a '-quickgelu' architecture; "
            "offline, give the path of a downloaded file in place of the tag."
        ) from None
    return model


def bert_pretrained(name_or_folder: str, **config: float) -> tuple[nn.Module, Any]:
    """A BERT encoder without pooler, and its tokenizer, from a folder or Hugging Face name; `config` overrides its own.

    Raises DataError where it is in neither place.
    """
    from transformers import AutoTokenizer, BertModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for one file of weights only litters a stage's log
    try:
        model = BertModel.from_pretrained(name_or_folder, add_pooling_layer=False, **config)
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise DataError(
            f"BERT {name_or_folder}: could not be loaded ({reason}). Give a folder or a known name."
        ) from None
    return model, tokenizer


def save_bert(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a BERT encoder and its tokenizer so that `bert_pretrained(folder)` has them back."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
