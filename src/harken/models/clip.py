"""CLIP's two towers, frozen: stills and captions into one space. Also how a small CLIP is built and trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from harken.errors import ConfigError, DataError
from harken.models import weights

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
WEIGHTS_FILE = "clip.safetensors"
PREPROCESSING = (
    "RGB, short side to the image size (bicubic, antialiased, 8 bit), centre crop, "
    f"/ 255, - ({', '.join(map(str, MEAN))}), / ({', '.join(map(str, STD))})"
)


@cache
def _byte_pairs() -> Any:
    """open_clip's tokenizer; its merges ship with the package, so no network is needed."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@dataclass(frozen=True)
class Vocabulary:
    """CLIP's byte pairs, or a subset of them renumbered so that a small model needs no 49,408 embeddings.

    A small model's `ids` are CLIP's ids of its pieces, ascending; other pieces share one number. The end token keeps
    the highest number, because the text tower reads its output at argmax(token).
    """

    context_length: int
    ids: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        return _byte_pairs().vocab_size if self.ids is None else len(self.ids) + 4  # pad, unknown, start, pieces, end

    def __call__(self, captions: Sequence[str]) -> Int[Tensor, "caption token"]:
        """Token numbers, cut to `context_length` with the end token kept, as CLIP does."""
        pairs = _byte_pairs()
        tokens = pairs(list(captions), context_length=self.context_length)
        if self.ids is None:
            return tokens
        number = {0: 0, pairs.sot_token_id: 2, pairs.eot_token_id: self.size - 1}
        number |= {piece: i + 3 for i, piece in enumerate(self.ids)}
        return torch.tensor([[number.get(t, 1) for t in row] for row in tokens.tolist()])

    @staticmethod
    def of(captions: Iterable[str], context_length: int) -> Vocabulary:
        """The vocabulary of these captions."""
        return Vocabulary(context_length, tuple(sorted({t for c in captions for t in _byte_pairs().encode(c)})))


@runtime_checkable
class Encoder(Protocol):
    """What computes the embeddings of a frozen CLIP: `Towers` themselves, or a runtime made of them (`runtimes`).

    Both methods give float32 on the encoder's device, for pixels (`crop`) and token numbers on it; one call is one
    pass. On the CPU the result of a pass depends on its input alone, bit for bit.
    """

    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def image_size(self) -> int: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def encode_images(self, pixels: UInt8[Tensor, "image 3 size size"]) -> Float[Tensor, "image dim"]: ...
    def encode_texts(self, tokens: Int[Tensor, "caption token"]) -> Float[Tensor, "caption dim"]: ...


@dataclass(frozen=True)
class Towers:
    """A frozen CLIP: `model` is open_clip's (`.visual` is the image tower), in evaluation mode, without gradients."""

    model: Any
    vocabulary: Vocabulary
    image_size: int
    heads: int
    embed_dim: int
    config: Mapping[str, Any] | None = None

    @property
    def visual_state(self) -> dict[str, Tensor]:
        """The image tower's tensors: with `heads`, what AudioViT.from_clip starts from."""
        return self.model.get_submodule("visual").state_dict()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Towers:
        """The same model moved, and its weights cast: never autocast, which casts them again on every call."""
        self.model.to(device, dtype)
        return self

    @torch.no_grad()
    def encode_images(self, pixels: UInt8[Tensor, "image 3 size size"]) -> Float[Tensor, "image dim"]:
        return self.model.encode_image(normalise(pixels).to(self.dtype)).float()

    @torch.no_grad()
    def encode_texts(self, tokens: Int[Tensor, "caption token"]) -> Float[Tensor, "caption dim"]:
        return _encode_text(self.model, tokens).float()


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode, float32, no gradients."""
    return model.eval().float().requires_grad_(False)


def _towers(model: nn.Module, vocabulary: Vocabulary, config: Mapping[str, Any] | None) -> Towers:
    visual: Any = model.get_submodule("visual")
    size = visual.image_size[0] if isinstance(visual.image_size, (tuple, list)) else visual.image_size
    try:
        heads = visual.transformer.resblocks[0].attn.num_heads
    except AttributeError:
        raise ConfigError(
            "CLIP: the image tower is not a vision transformer; take a ViT such as ViT-B-32-quickgelu."
        ) from None
    if type(visual.transformer.resblocks[0].mlp.gelu).__name__ != "QuickGELU":
        raise ConfigError(
            "CLIP: this architecture has GELU, and the audio tower that starts from its weights has QuickGELU, as "
            "OpenAI's CLIP was trained with; every embedding would differ. Take a '-quickgelu' architecture, such as "
            "ViT-B-32-quickgelu/openai."
        )
    text: Any = model
    causal = isinstance(getattr(text, "attn_mask", None), Tensor) and isinstance(text.text_projection, Tensor)
    if not causal or text.text_pool_type != "argmax":
        raise ConfigError(
            "CLIP: the text tower is not CLIP's own (causal, read at the end token), so its captions can neither be "
            "numbered with CLIP's byte pairs nor cut behind their end; take a model such as ViT-B-32-quickgelu."
        )
    return Towers(freeze(model), vocabulary, int(size), int(heads), int(visual.output_dim), config)


def load(folder_or_name: str | Path) -> Towers:
    """CLIP from a folder that `save` wrote, or from open_clip by `architecture/tag`: 'ViT-B-32-quickgelu/openai'.

    In place of the tag may stand the path of a downloaded checkpoint. Raises DataError where it cannot be had.
    """
    folder = Path(folder_or_name)
    if (folder / WEIGHTS_FILE).is_file():
        state, meta = weights.load(folder / WEIGHTS_FILE)
        model: Any = build(meta["config"])
        try:
            model.load_state_dict(state)
        except RuntimeError as e:
            raise DataError(f"{folder / WEIGHTS_FILE}: weights and config do not belong together: {e}") from None
        ids = None if meta["ids"] is None else tuple(meta["ids"])
        return _towers(model, Vocabulary(meta["config"]["text_cfg"]["context_length"], ids), meta["config"])
    name, slash, tag = str(folder_or_name).partition("/")
    if not slash or folder.is_dir():
        raise DataError(
            f"{folder_or_name}: neither a folder with {WEIGHTS_FILE} nor architecture/tag, "
            "such as ViT-B-32-quickgelu/openai."
        )
    model = weights.open_clip_pretrained(name, tag)
    return _towers(model, Vocabulary(int(model.context_length)), None)


def save(folder: Path, towers: Towers) -> None:
    """Write a CLIP that `build` made: weights, config and vocabulary in one file."""
    if towers.config is None:
        raise ConfigError(
            "only a CLIP built from a config can be saved; one of open_clip's is named by architecture/tag."
        )
    ids = None if towers.vocabulary.ids is None else list(towers.vocabulary.ids)
    weights.save(folder / WEIGHTS_FILE, towers.model.state_dict(), {"config": towers.config, "ids": ids})


def small_config(
    *,
    vocab_size: int,
    image_size: int = 64,
    patch: int = 16,
    width: int = 128,
    layers: int = 2,
    head_width: int = 32,
    embed_dim: int = 128,
    text_width: int = 128,
    text_layers: int = 2,
    context_length: int = 24,
) -> dict[str, Any]:
    """A small CLIP in open_clip's own config format: the same architecture as ViT-B/32, QuickGELU included."""
    vision = {"image_size": image_size, "patch_size": patch, "width": width, "layers": layers, "head_width": head_width}
    text = {
        "context_length": context_length,
        "vocab_size": vocab_size,
        "width": text_width,
        "heads": text_width // head_width,
        "layers": text_layers,
    }
    return {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}


def build(config: Mapping[str, Any]) -> nn.Module:
    """An untrained open_clip CLIP from a config such as `small_config` gives. Draws from torch's generator."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    rest = {k: v for k, v in config.items() if k not in ("vision_cfg", "text_cfg")}
    return CLIP(vision_cfg=CLIPVisionCfg(**config["vision_cfg"]), text_cfg=CLIPTextCfg(**config["text_cfg"]), **rest)


def crop(images: Sequence[np.ndarray], size: int) -> UInt8[Tensor, "image 3 size size"]:
    """CLIP's own: short side to `size` (bicubic, antialiased), then the centre of `size` by `size` pixels.

    torch's resize of bytes, in a quarter of the time of Pillow's, which open_clip uses: the same to one grey level, but
    for a few values in a million that differ by two. `images` are uint8 (height, width, 3), RGB. Raises DataError for
    anything else.
    """
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for i, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"image {i} is {image.dtype} {image.shape}; it must be uint8 (height, width, 3), RGB.")
        height, width, _ = image.shape
        short = min(height, width)
        target = (size * height // short, size * width // short)
        x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]  # a copy: decoders hand out read-only views
        if target != (height, width):
            x = F.interpolate(x, size=target, mode="bicubic", antialias=True, align_corners=False)
        top, left = round((target[0] - size) / 2), round((target[1] - size) / 2)
        out[i] = x[0, :, top : top + size, left : left + size]
    return out


def normalise(pixels: UInt8[Tensor, "image 3 size size"]) -> Float[Tensor, "image 3 size size"]:
    """To [0, 1], then CLIP's mean and deviation; where the pixels are."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def preprocess(images: Sequence[np.ndarray], size: int) -> Float[Tensor, "image 3 size size"]:
    """uint8 (height, width, 3) RGB pictures as CLIP takes them: `PREPROCESSING`."""
    out = torch.empty(len(images), 3, size, size)
    for i, image in enumerate(images):  # one by one: a small CLIP is trained on thousands, held once
        out[i] = normalise(crop([image], size))[0]
    return out


def image_embeddings(encoder: Encoder, images: Sequence[np.ndarray]) -> Float[Tensor, "image dim"]:
    """Projected image embeddings, float32, on the CPU, not L2-normalised: matching decides whether norms count.

    One pass: what a clip's images embed to must not depend on their neighbours, so give one clip's, and only those.
    """
    if not images:
        return torch.empty(0, encoder.embed_dim)
    return encoder.encode_images(crop(images, encoder.image_size).to(encoder.device)).cpu()


def text_embeddings(encoder: Encoder, captions: Sequence[str], *, batch: int = 256) -> Float[Tensor, "caption dim"]:
    """Projected caption embeddings, float32, on the CPU, not L2-normalised. Captions beyond the context are cut.

    On the CPU each caption is a pass of its own, so that its bytes depend on nothing else; on a GPU `batch` of them.
    """
    if not captions:
        return torch.empty(0, encoder.embed_dim)
    tokens = encoder.vocabulary(captions)
    ends = (tokens.argmax(dim=1) + 1).tolist()  # the end token has the highest number; nothing after it counts
    step = 1 if encoder.device.type == "cpu" else batch
    parts = []
    for i in range(0, len(captions), step):
        part = tokens[i : i + step, : max(ends[i : i + step])]
        parts.append(encoder.encode_texts(part.to(encoder.device)).cpu())
    return torch.cat(parts)


@dataclass(frozen=True)
class SmallClip:
    """How to train a small CLIP: its shape (`small_config`'s arguments) and its steps."""

    shape: Mapping[str, int]
    steps: int
    batch: int
    lr: float
    seed: int


def train_small(pairs: Iterable[tuple[np.ndarray, str]], cfg: SmallClip) -> Towers:
    """A small CLIP trained on (picture uint8 (height, width, 3), caption) pairs, all held in memory as they are shown.

    Symmetric cross-entropy in which every item with the same caption counts as a positive: with a few object classes
    most batches hold a class twice. AdamW, short warm-up, cosine to zero. Deterministic given `cfg.seed` and the number
    of threads; leaves torch's own generator as it was.
    """
    pictures, captions = [], []
    context = cfg.shape.get("context_length", 24)
    for picture, caption in pairs:
        pictures.append(picture)
        captions.append(caption)
    if len(pictures) < cfg.batch:
        raise DataError(f"a small CLIP needs at least one batch of {cfg.batch} pairs; there are {len(pictures)}.")
    vocabulary = Vocabulary.of(captions, context)
    config = small_config(vocab_size=vocabulary.size, **cfg.shape)
    number = {c: i for i, c in enumerate(sorted(set(captions)))}
    label = torch.tensor([number[c] for c in captions])
    tokens = vocabulary(sorted(number))
    pixels = preprocess(pictures, config["vision_cfg"]["image_size"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model: Any = build(config).train()
    generator = torch.Generator().manual_seed(cfg.seed)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), fused=True)
    warmup = max(1, cfg.steps // 10)
    for step in range(cfg.steps):
        factor = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * factor
        items = torch.randint(len(label), (cfg.batch,), generator=generator)
        image = F.normalize(model.encode_image(pixels[items]), dim=-1)
        shown = tokens[label[items]]
        longest = int(shown.ne(0).sum(1).max())  # past its end token nothing reaches a caption's embedding
        text = F.normalize(_encode_text(model, shown[:, :longest]), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        same = (label[items][:, None] == label[items][None]).float()
        target = same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _towers(model, vocabulary, config)


def _encode_text(model: Any, tokens: Int[Tensor, "caption token"]) -> Float[Tensor, "caption dim"]:
    """open_clip's `encode_text` on captions cut to fewer tokens than its context holds: the same, for less."""
    n = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:n]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:n, :n]))
    return x[torch.arange(x.shape[0]), tokens.argmax(dim=-1)] @ model.text_projection
