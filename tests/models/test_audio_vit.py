"""The audio ViT: its grid, its size, that it is CLIP's image tower in disguise, and that padding cannot be heard."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harken.errors import ConfigError, DataError
from harken.models import clip
from harken.models.audio_vit import AudioViT, QuickGELU, interpolate_positions, time_bins, token_grid


def small(**kw) -> AudioViT:
    torch.manual_seed(0)
    return AudioViT(**({"width": 32, "layers": 2, "heads": 2, "embed_dim": 16, "n_frames": 200} | kw)).eval()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny_clip() -> clip.Towers:
    torch.manual_seed(0)
    config = clip.small_config(vocab_size=10, image_size=64, patch=16, width=64, layers=2, embed_dim=24)
    return clip._towers(clip.build(config), clip.Vocabulary(24, (5, 6, 7, 8, 9, 10)), config)


@pytest.mark.parametrize(
    ("n_frames", "grid"),
    [
        (1000, (61, 5)),
        (998, (61, 5)),
        (1024, (63, 5)),
        (500, (30, 5)),
        (334, (19, 5)),
        (333, (19, 5)),
        (250, (14, 5)),
        (200, (11, 5)),
    ],
)
def test_token_grid(n_frames: int, grid: tuple[int, int]) -> None:
    assert token_grid(n_frames) == grid


def test_a_clip_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(DataError, match="31 frames"):
        token_grid(31)


@pytest.mark.parametrize(
    ("n_frames", "n", "n_of_one_channel"), [(1000, 88_045_824, 86_472_960), (250, 87_865_344, 86_292_480)]
)
def test_parameter_counts(n_frames: int, n: int, n_of_one_channel: int) -> None:
    """Of the tower as VIP-ANT trains it; a kernel averaged once, which this tower never has, is two colours smaller."""
    with torch.device("meta"):
        model = AudioViT(n_frames=n_frames)
    assert sum(p.numel() for p in model.parameters()) == n
    assert n - 2 * model.conv1.weight[:, 0].numel() == n_of_one_channel
    assert sum(p.ndim > 1 for p in model.parameters()) == 51
    assert sum(p.ndim < 2 for p in model.parameters()) == 101


def test_the_image_tower_has_the_size_and_names_of_clip_s() -> None:
    import open_clip

    with torch.device("meta"):
        ours = AudioViT(stride=(32, 32), n_frames=224, n_mels=224)
    assert sum(p.numel() for p in ours.parameters()) == 87_849_216
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    with torch.device("meta"):
        theirs = clip.build(config).get_submodule("visual")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    norm = {"weight": (768,), "bias": (768,)}
    block = {f"{ln}.{k}": v for ln in ("ln_1", "ln_2") for k, v in norm.items()}
    block |= {"attn.in_proj_weight": (2304, 768), "attn.in_proj_bias": (2304,)}
    block |= {"attn.out_proj.weight": (768, 768), "attn.out_proj.bias": (768,)}
    block |= {"mlp.c_fc.weight": (3072, 768), "mlp.c_fc.bias": (3072,)}
    block |= {"mlp.c_proj.weight": (768, 3072), "mlp.c_proj.bias": (768,)}
    named = {"class_embedding": (768,), "positional_embedding": (50, 768), "proj": (768, 512)}
    named |= {"conv1.weight": (768, 3, 32, 32)}
    named |= {f"{ln}.{k}": v for ln in ("ln_pre", "ln_post") for k, v in norm.items()}
    named |= {f"transformer.resblocks.{i}.{k}": v for i in range(12) for k, v in block.items()}
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == named
    assert len(named) == 152


def gray(x: torch.Tensor) -> torch.Tensor:
    """The picture whose patches are the FBANK's: the kernel's mean over RGB is its sum over three channels of x / 3."""
    return (x / 3)[:, None].expand(-1, 3, -1, -1)


def as_image_tower(towers: clip.Towers) -> AudioViT:
    """An audio tower with the image tower's own geometry: the patches it has, side by side."""
    side, patch = towers.image_size, towers.visual_state["conv1.weight"].shape[-1]
    state, heads = towers.visual_state, towers.heads
    return AudioViT.from_clip(state, n_frames=side, n_mels=side, stride=(patch, patch), heads=heads).eval()


def test_on_a_gray_image_it_is_the_image_tower(tiny_clip: clip.Towers) -> None:
    audio, x = as_image_tower(tiny_clip), torch.randn(3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(audio(x).summary, tiny_clip.model.visual(gray(x)), atol=1e-5, rtol=1e-5)


def test_on_a_gray_image_of_clip_s_size_it_is_the_image_tower() -> None:
    """224 x 224, stride 32, 3 channels: the 7 x 7 grid of ViT-B/32, in a narrow tower."""
    torch.manual_seed(0)
    config = clip.small_config(vocab_size=10, image_size=224, patch=32, width=64, layers=3, embed_dim=24)
    towers = clip._towers(clip.build(config), clip.Vocabulary(24, (5, 6, 7, 8, 9, 10)), config)
    audio, x = as_image_tower(towers), torch.randn(2, 224, 224)
    assert audio.pos_grid == (7, 7)
    with torch.no_grad():
        torch.testing.assert_close(audio(x).summary, towers.model.visual(gray(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_vit_b_32_on_a_gray_image_is_the_image_tower() -> None:
    import open_clip

    torch.manual_seed(0)
    towers = clip._towers(
        clip.build(open_clip.get_model_config("ViT-B-32-quickgelu")), clip.Vocabulary(77), {"text_cfg": {}}
    )
    audio, x = as_image_tower(towers), torch.randn(2, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(audio(x).summary, towers.model.visual(gray(x)), atol=1e-5, rtol=1e-4)


def test_its_patches_are_clip_s_of_a_gray_picture() -> None:
    """Not three times as loud, as the sum over RGB would be: VIP-ANT takes the mean."""
    model, x = small(n_frames=1000, layers=1), torch.randn(2, 1000, 128)
    seen: list[torch.Tensor] = []
    model.ln_pre.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        patches = seen[0][:, 1:] - model.positional_embedding[1:]
        expected = model.conv1(gray(x)).flatten(2).transpose(1, 2)
    assert expected.shape == (2, 305, 32)
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=1e-5)


def test_gelu_in_the_place_of_quickgelu_changes_every_embedding(tiny_clip: clip.Towers) -> None:
    x = torch.linspace(-4, 4, 801)
    assert torch.equal(QuickGELU()(x), x * torch.sigmoid(1.702 * x))
    assert float((QuickGELU()(x) - F.gelu(x)).abs().max()) == pytest.approx(0.0203, abs=1e-4)
    assert tiny_clip.config is not None
    with_gelu = clip.build({**tiny_clip.config, "quick_gelu": False}).get_submodule("visual").eval()
    with_gelu.load_state_dict(tiny_clip.visual_state)
    audio, x = as_image_tower(tiny_clip), torch.randn(3, 64, 64)
    with torch.no_grad():
        ours, theirs = audio(x).summary, with_gelu(gray(x))
    assert bool(((ours - theirs).norm(dim=-1) > 1e-3 * ours.norm(dim=-1)).all())


def test_from_clip_copies_everything_but_the_positions(tiny_clip: clip.Towers) -> None:
    state = tiny_clip.visual_state
    audio = AudioViT.from_clip({f"visual.{k}": v for k, v in state.items()}, n_frames=100, n_mels=64, heads=2)
    assert (audio.patch, audio.stride, audio.pos_grid, audio.embed_dim) == (16, (8, 12), (11, 5), 24)
    for name, value in audio.state_dict().items():
        if name != "positional_embedding":
            assert torch.equal(value, state[name]), name
    assert torch.equal(audio.positional_embedding[0], state["positional_embedding"][0])


def test_from_clip_refuses_what_is_no_vision_transformer(tiny_clip: clip.Towers) -> None:
    with pytest.raises(DataError, match="no class_embedding, conv1"):
        AudioViT.from_clip({"layer1.weight": torch.zeros(1)})
    narrow = AudioViT(width=48, layers=1, heads=2, embed_dim=8, n_frames=64, n_mels=64, stride=(32, 32)).state_dict()
    with pytest.raises(ConfigError, match="heads"):
        AudioViT.from_clip(narrow)


def test_interpolation_of_positions() -> None:
    p = torch.randn(50, 8)
    assert interpolate_positions(p, (7, 7), (7, 7)) is p
    wide = interpolate_positions(p, (7, 7), (61, 5))
    assert wide.shape == (306, 8)
    assert torch.equal(wide[0], p[0])
    flat = torch.cat([p[:1], p[1:2].expand(49, -1)])
    torch.testing.assert_close(interpolate_positions(flat, (7, 7), (14, 5))[1:], p[1:2].expand(70, -1))
    with pytest.raises(DataError, match="50 rows"):
        interpolate_positions(p, (7, 8), (7, 7))


def test_interpolation_is_bilinear_without_aligned_corners() -> None:
    line = torch.tensor([[9.0], [0.0], [1.0]])  # CLS, then a 2 x 1 grid
    stretched = interpolate_positions(line, (2, 1), (4, 1))
    torch.testing.assert_close(stretched[:, 0], torch.tensor([9.0, 0.0, 0.25, 0.75, 1.0]))


def test_the_grid_runs_through_mel_first(tiny_clip: clip.Towers) -> None:
    """CLIP's rows are time, its columns mel, in the positions as in the tokens."""
    state = dict(tiny_clip.visual_state)
    positions = torch.zeros(4, 4, 64)
    positions[:, :, 0] = torch.arange(4.0)[:, None]
    positions[:, :, 1] = torch.arange(4.0)
    state["positional_embedding"] = torch.cat([torch.zeros(1, 64), positions.flatten(0, 1)])
    audio = AudioViT.from_clip(state, n_frames=64, n_mels=48, stride=(16, 16), heads=2)
    assert audio.pos_grid == (4, 3)
    rows = audio.positional_embedding[1:].unflatten(0, (4, 3))
    torch.testing.assert_close(rows[:, :, 0], torch.arange(4.0)[:, None].expand(-1, 3))
    torch.testing.assert_close(rows[:, :, 1], torch.tensor([1 / 6, 1.5, 17 / 6]).expand(4, -1))


def test_shapes_and_another_length_at_forward() -> None:
    model = small()
    out = model(torch.randn(2, 200, 128))
    assert out.summary is not None
    assert (out.summary.shape, out.frames.shape, out.mask.shape) == ((2, 16), (2, 11, 16), (2, 11))
    assert bool(out.mask.all())
    longer = model(torch.randn(2, 333, 128))
    assert longer.frames.shape == (2, 19, 16)
    with pytest.raises(DataError, match="64 mel bins"):
        model(torch.randn(2, 200, 64))


def test_frames_beyond_the_last_patch_are_never_seen() -> None:
    model, x = small(n_frames=1000, layers=1), torch.randn(1, 1000, 128)
    y = x.clone()
    y[:, 992:] = 100
    with torch.no_grad():
        assert torch.equal(model(x).summary, model(y).summary)
        segment = torch.randn(1, 250, 128)
        other = segment.clone()
        other[:, 240:] = 100
        assert torch.equal(model(segment).summary, model(other).summary)
        changed = x.clone()
        changed[:, 991] = 100
        assert not torch.equal(model(x).summary, model(changed).summary)
        changed = segment.clone()
        changed[:, 239] = 100
        assert not torch.equal(model(segment).summary, model(changed).summary)


def test_a_clip_of_998_fbank_frames_is_that_of_1000_however_they_are_padded() -> None:
    """10 s make 998 of them at most sample rates (Kaldi, snip_edges)."""
    model, x = small(n_frames=1000, layers=1), torch.randn(1, 998, 128)
    with torch.no_grad():
        short = model(x)
        for value in (0.0, 0.858, -50.0):
            padded = model(F.pad(x, (0, 0, 0, 2), value=value))
            assert torch.equal(padded.summary, short.summary)
            assert torch.equal(padded.frames, short.frames)


def test_a_mask_makes_the_embedding_blind_to_padding() -> None:
    model, x = small(), torch.randn(2, 200, 128)
    mask = torch.arange(200).expand(2, -1) < torch.tensor([[200], [120]])
    loud = x.clone()
    loud[1, 120:] = 50
    with torch.no_grad():
        a, b, unmasked = model(x, mask), model(loud, mask), model(x)
    torch.testing.assert_close(a.summary, b.summary)
    torch.testing.assert_close(a.frames[a.mask], b.frames[b.mask])
    assert a.mask.sum(1).tolist() == [11, 6]
    torch.testing.assert_close(a.summary[0], unmasked.summary[0])
    assert not torch.allclose(a.summary[1], unmasked.summary[1])


def test_an_embedding_does_not_depend_on_its_companions() -> None:
    model, x = small(), torch.randn(5, 200, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(x).summary[2:3], model(x[2:3]).summary, atol=1e-5, rtol=1e-5)
        others = torch.cat([50 * x[:2], x[2:3], torch.zeros_like(x[3:])])
        assert torch.equal(model(x).summary[2], model(others).summary[2])


@pytest.mark.parametrize("masked", [False, True])
def test_checkpointing_changes_memory_and_neither_loss_nor_gradients(masked: bool) -> None:
    x = torch.randn(2, 200, 128)
    mask = torch.arange(200).expand(2, -1) < torch.tensor([[200], [120]]) if masked else None
    losses, grads, passes = [], [], []
    for checkpointing in (False, True):
        model, n = small(checkpointing=checkpointing).train(), [0]
        model.transformer.resblocks[0].ln_1.register_forward_hook(lambda *_, n=n: n.__setitem__(0, n[0] + 1))
        loss = model(x, mask).summary.square().sum()
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        passes.append(n[0])
    assert passes == [1, 2]  # once more, in the backward pass
    assert torch.equal(*losses)
    assert len(grads[0]) == len(list(model.parameters()))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_is_the_fused_one(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 200, 128)
    mask = torch.arange(200).expand(2, -1) < torch.tensor([[200], [120]]) if masked else None
    kernel, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **kw: calls.append(1) or kernel(*a, **kw))
    outs, grads = [], []
    for fused in (True, False):
        model = small(fused_attention=fused)
        out = model(x, mask)
        out.summary.square().sum().backward()
        outs.append((out.summary.detach(), out.frames.detach()))
        grads.append([p.grad for p in model.parameters()])
    assert len(calls) == 2  # the two blocks of the first tower alone
    for a, b in zip((*outs[0], *grads[0]), (*outs[1], *grads[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_from_clip_hands_on_how_to_compute(tiny_clip: clip.Towers) -> None:
    shape = {"n_frames": 64, "n_mels": 64, "heads": 2}
    plain = AudioViT.from_clip(tiny_clip.visual_state, **shape)
    other = AudioViT.from_clip(tiny_clip.visual_state, **shape, checkpointing=True, fused_attention=False)
    assert [(m.checkpointing, m.fused_attention) for m in (plain, other)] == [(False, True), (True, False)]
    assert [b.attn.fused for b in other.transformer.resblocks] == [False, False]


def test_half_precision_by_autocast_is_near_with_either_attention() -> None:
    x = torch.randn(2, 200, 128)
    for fused in (True, False):
        model = small(fused_attention=fused)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            half = model(x).summary.float()
        with torch.no_grad():
            torch.testing.assert_close(half, model(x).summary, atol=0.05, rtol=0.05)


def test_time_bins_are_those_of_adaptive_average_pooling() -> None:
    assert time_bins(61, 4) == [(0, 16), (15, 31), (30, 46), (45, 61)]
    assert time_bins(8, 2) == [(0, 4), (4, 8)]
    for n_steps in range(1, 70):
        for n_bins in range(1, min(n_steps, 9) + 1):
            x = torch.randn(1, n_steps, dtype=torch.float64)
            means = torch.stack([x[0, a:b].mean() for a, b in time_bins(n_steps, n_bins)])
            torch.testing.assert_close(means, F.adaptive_avg_pool1d(x, n_bins)[0])
    with pytest.raises(DataError, match="3 time steps"):
        time_bins(3, 4)


def test_binned_tokens_differ_from_frames_only_in_when_the_norm_comes() -> None:
    """As many bins as steps: ln_post after the mean over mel, not before it."""
    model, x = small(), torch.randn(2, 200, 128)
    with torch.no_grad():
        out, bins = model(x), model.binned(x, 11)
        assert bins.shape == out.frames.shape
        assert not torch.allclose(bins, out.frames, atol=1e-3)
        model.ln_post = torch.nn.Identity()
        torch.testing.assert_close(model.binned(x, 11), model(x).frames, atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_finite_gradient() -> None:
    model = small()
    model(torch.randn(2, 200, 128)).summary.sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool(torch.isfinite(p.grad).all()), name
