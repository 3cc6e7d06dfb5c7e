"""CLIP's vision transformer, listening: FBANK in, CLIP's space out (Zhao et al. 2022; Tsubaki et al. 2024).

Every tensor is CLIP's, under CLIP's names, so an image tower's weights load as they are. Three things differ from the
image tower: patches overlap (stride 16 in time, 24 in mel for 32x32 patches), the one input channel meets the mean over
RGB of the patch kernel, and positions are interpolated from the image tower's square grid.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harken.errors import ConfigError, DataError
from harken.models.features import AudioFeatures

CLIP_HEAD_WIDTH = 64  # every released CLIP ViT; a state dict does not say how many heads share its width


def token_grid(
    n_frames: int, n_mels: int = 128, *, patch: int = 32, stride: tuple[int, int] = (16, 24)
) -> tuple[int, int]:
    """How many patches fit: (time, mel). 1000 x 128 gives (61, 5), so fbank frames 992 to 999 are never seen.

    Raises DataError where not even one patch fits.
    """
    if n_frames < patch or n_mels < patch:
        raise DataError(
            f"an FBANK of {n_frames} frames x {n_mels} mel bins is smaller than one {patch} x {patch} patch; "
            f"pad it to at least {patch} x {patch}."
        )
    return (n_frames - patch) // stride[0] + 1, (n_mels - patch) // stride[1] + 1


def interpolate_positions(
    positions: Float[Tensor, "token dim"], grid: tuple[int, int], target: tuple[int, int]
) -> Float[Tensor, "target_token dim"]:
    """Positions of a `target` grid from those of `grid`: bilinear, align_corners=False; row 0 (CLS) is kept."""
    if len(positions) != grid[0] * grid[1] + 1:
        raise DataError(
            f"a positional embedding of {len(positions)} rows is not a CLS row and a {grid[0]} x {grid[1]} grid; "
            f"that would be {grid[0] * grid[1] + 1} rows."
        )
    if grid == target:
        return positions
    square = positions[1:].reshape(1, *grid, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=target, mode="bilinear", align_corners=False)
    return torch.cat([positions[:1], square.flatten(2)[0].T.to(positions.dtype)])


def time_bins(n_steps: int, n_bins: int) -> list[tuple[int, int]]:
    """First and end of each of `n_bins` bins of time steps, those of adaptive average pooling.

    61 steps in 4 bins: 0-16, 15-31, 30-46, 45-61, ends excluded; a step that a boundary cuts is in both bins. Raises
    DataError where there are fewer steps than bins.
    """
    if n_steps < n_bins:
        raise DataError(
            f"{n_steps} time steps cannot be pooled to {n_bins} bins; give longer FBANKs, a smaller stride or fewer "
            "segments."
        )
    return [(i * n_steps // n_bins, -(-(i + 1) * n_steps // n_bins)) for i in range(n_bins)]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): OpenAI's CLIP was trained with it, and nn.GELU in its place changes every embedding."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter names of nn.MultiheadAttention.

    `fused` takes torch's kernel, which never holds the (token, token) weights; otherwise they are written out.
    """

    def __init__(self, width: int, heads: int, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "clip token dim"], keys: Bool[Tensor, "clip 1 1 token"] | None
    ) -> Float[Tensor, "clip token dim"]:
        n_clips, n_tokens, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(n_clips, n_tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys) if self.fused else _attention(q, k, v, keys)
        out = self.out_proj(out.transpose(1, 2).reshape(n_clips, n_tokens, width))
        return out


def _attention(
    q: Float[Tensor, "clip head token dim"],
    k: Float[Tensor, "clip head token dim"],
    v: Float[Tensor, "clip head token dim"],
    keys: Bool[Tensor, "clip 1 1 token"] | None,
) -> Float[Tensor, "clip head token dim"]:
    """softmax(q kᵀ / √d) v over the tokens that `keys` is True on."""
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    if keys is not None:
        logits = logits.masked_fill(~keys, -torch.inf)
    return logits.softmax(-1).to(v.dtype) @ v


class ResidualBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, fused: bool = True) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads, fused)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), keys)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, fused: bool = True) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads, fused) for _ in range(layers))


class AudioViT(nn.Module):
    """FBANK (clip, frame, mel) to AudioFeatures, all in the space of CLIP's embeddings, not L2-normalised.

    `summary` is the CLS token, `frames` the mean over mel of each time step's tokens; both pass ln_post and proj.
    `n_frames` x `n_mels` sets the stored grid of positions (`pos_grid` overrides it, e.g. (7, 7) to hold the image
    tower's own); an input with another number of frames interpolates from it. `stride` is (time, mel). With
    `checkpointing`, training recomputes each block's activations in the backward pass: less memory, a third more time.
    Without `fused_attention`, attention is written out: the same to rounding, for where torch's kernel will not do.
    """

    def __init__(
        self,
        *,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        patch: int = 32,
        stride: tuple[int, int] = (16, 24),
        embed_dim: int = 512,
        n_frames: int = 1000,
        n_mels: int = 128,
        pos_grid: tuple[int, int] | None = None,
        checkpointing: bool = False,
        fused_attention: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"AudioViT: width {width} is not a multiple of heads {heads}.")
        self.patch, self.stride, self.n_frames, self.n_mels = patch, stride, n_frames, n_mels
        self.pos_grid = pos_grid or token_grid(n_frames, n_mels, patch=patch, stride=stride)
        self.embed_dim, self.checkpointing, self.fused_attention = embed_dim, checkpointing, fused_attention
        self.conv1 = nn.Conv2d(3, width, patch, stride=stride, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(self.pos_grid[0] * self.pos_grid[1] + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, fused_attention)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))
        self._initialise(width, layers)

    def _initialise(self, width: int, layers: int) -> None:
        """CLIP's own initial scales (Radford et al. 2021), for training from nothing."""
        for p in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(p, std=width**-0.5)
        depth = (2 * layers) ** -0.5
        std = {"in_proj_weight": 1.0, "out_proj.weight": depth, "c_fc.weight": 2**-0.5, "c_proj.weight": depth}
        for name, p in self.transformer.named_parameters():
            for ending, factor in std.items():
                if name.endswith(ending):
                    nn.init.normal_(p, std=factor * width**-0.5)

    @classmethod
    def from_clip(
        cls,
        visual: Mapping[str, Tensor],
        *,
        n_frames: int = 1000,
        n_mels: int = 128,
        stride: tuple[int, int] | None = None,
        heads: int | None = None,
        checkpointing: bool = False,
        fused_attention: bool = True,
    ) -> AudioViT:
        """An audio tower that starts as CLIP's image tower: every tensor copied, positions interpolated.

        `visual` is the state dict of the image tower, with or without the prefix `visual.`; width, depth, patch and
        output dimension are read from it. `stride` defaults to the paper's proportions of the patch: half of it in
        time, three quarters in mel. `heads` defaults to width / 64, true of every released CLIP; give it for any other
        tower. Raises DataError where the state dict is not a CLIP vision transformer's.
        """
        state = {k.removeprefix("visual."): v for k, v in visual.items() if k.startswith("visual.")} or dict(visual)
        if (
            missing := {"conv1.weight", "positional_embedding", "class_embedding", "proj", "ln_pre.weight"}
            - state.keys()
        ):
            raise DataError(
                f"not the state dict of a CLIP vision transformer: no {', '.join(sorted(missing))}. "
                "Pass `model.visual.state_dict()` of a ViT, not of a ResNet."
            )
        width, _, patch, _ = state["conv1.weight"].shape
        side = round((len(state["positional_embedding"]) - 1) ** 0.5)
        if heads is None:
            if width % CLIP_HEAD_WIDTH:
                raise ConfigError(
                    f"AudioViT.from_clip: width {width} is no multiple of {CLIP_HEAD_WIDTH}; say `heads`."
                )
            heads = width // CLIP_HEAD_WIDTH
        model = cls(
            width=width,
            layers=sum(k.endswith(".attn.in_proj_weight") for k in state),
            heads=heads,
            patch=patch,
            stride=stride or (patch // 2, patch * 3 // 4),
            embed_dim=state["proj"].shape[1],
            n_frames=n_frames,
            n_mels=n_mels,
            checkpointing=checkpointing,
            fused_attention=fused_attention,
        )
        positions = interpolate_positions(state["positional_embedding"].float(), (side, side), model.pos_grid)
        model.load_state_dict({**state, "positional_embedding": positions})
        return model

    def forward(
        self, fbank: Float[Tensor, "clip frame mel"], mask: Bool[Tensor, "clip frame"] | None = None
    ) -> AudioFeatures:
        """Encode normalised FBANKs. `mask` is True on valid fbank frames.

        Without a mask every fbank frame counts as audio, padding too (VIP-ANT's way). With one, a time step that
        touches padding is neither attended to nor marked valid in the result, so the embedding does not depend on the
        padding.
        """
        x, grid, steps = self._tokens(fbank, mask)
        x = self.ln_post(x)
        frames = torch.unflatten(x[:, 1:], 1, grid).mean(2)
        return AudioFeatures(x[:, 0] @ self.proj, frames @ self.proj, steps)

    def binned(self, fbank: Float[Tensor, "clip frame mel"], n_bins: int) -> Float[Tensor, "clip bin dim"]:
        """Encode normalised FBANKs as `n_bins` vectors each, of tokens that have all attended to the whole clip.

        The last block's tokens, averaged over mel, then over the steps of each of `time_bins`; then ln_post and proj,
        which `forward` applies before its average. Nothing is read from CLS.
        """
        x, grid, _ = self._tokens(fbank, None)
        steps = torch.unflatten(x[:, 1:], 1, grid).mean(2)
        # slices, not adaptive_avg_pool1d: its backward pass on CUDA adds in no fixed order
        bins = torch.stack([steps[:, first:end].mean(1) for first, end in time_bins(grid[0], n_bins)], dim=1)
        return self.ln_post(bins) @ self.proj

    def _tokens(
        self, fbank: Float[Tensor, "clip frame mel"], mask: Bool[Tensor, "clip frame"] | None
    ) -> tuple[Float[Tensor, "clip token width"], tuple[int, int], Bool[Tensor, "clip time"]]:
        """The last block's tokens, CLS first, then the (time, mel) grid they lie on, and the valid time steps."""
        n_clips, n_frames, n_mels = fbank.shape
        if n_mels != self.n_mels:
            raise DataError(f"FBANKs have {n_mels} mel bins; this tower was built for {self.n_mels}.")
        grid = token_grid(n_frames, n_mels, patch=self.patch, stride=self.stride)
        # The kernel stays RGB, as VIP-ANT trains it: averaging it once would change its norm, so LARS's steps.
        kernel = self.conv1.weight.mean(1, keepdim=True)
        x = F.conv2d(fbank[:, None], kernel, stride=self.stride).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(n_clips, 1, -1), x], dim=1)
        x = x + interpolate_positions(self.positional_embedding, self.pos_grid, grid).to(x.dtype)
        x = self.ln_pre(x)
        steps, keys = self._valid(mask, n_clips, grid, x.device)
        for block in self.transformer.resblocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, keys, use_reentrant=False)
            else:
                x = block(x, keys)
        return x, grid, steps

    def _valid(
        self, mask: Tensor | None, n_clips: int, grid: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Which time steps lie wholly in valid fbank frames (clip, time), and the same as a mask of attention keys."""
        if mask is None:
            return torch.ones(n_clips, grid[0], dtype=torch.bool, device=device), None
        steps = mask.unfold(1, self.patch, self.stride[0]).all(-1)
        tokens = steps[:, :, None].expand(-1, -1, grid[1]).flatten(1)
        return steps, F.pad(tokens, (1, 0), value=True)[:, None, None]  # CLS is always there to attend to
