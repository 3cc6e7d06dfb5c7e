"""The audio ViT: its grid, its size, that it is CLIP's image tower in disguise, and that padding cannot be heard."""

from __future__ import annotations

import pytest
import torch

from harken.errors import ConfigError, DataError
from harken.models import clip
from harken.models.audio_vit import AudioViT, interpolate_positions, token_grid


def small(**kw) -> AudioViT:
    torch.manual_seed(0)
    return AudioViT(**({"width": 32, "layers": 2, "heads": 2, "embed_dim": 16, "n_frames": 200} | kw)).eval()


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


@pytest.mark.parametrize(("n_frames", "n"), [(1000, 88_045_824), (250, 87_865_344)])
def test_parameter_counts(n_frames: int, n: int) -> None:
    with torch.device("meta"):
        model = AudioViT(n_frames=n_frames)
    assert sum(p.numel() for p in model.parameters()) == n
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


def test_on_a_gray_image_it_is_the_image_tower(tiny_clip: clip.Towers) -> None:
    audio = AudioViT.from_clip(
        tiny_clip.visual_state, n_frames=64, n_mels=64, stride=(16, 16), heads=tiny_clip.heads
    ).eval()
    x = torch.randn(3, 64, 64)
    as_image = (x / 3)[:, None].expand(
        -1, 3, -1, -1
    )  # the mean over RGB of the kernel is its sum over three equal channels
    with torch.no_grad():
        torch.testing.assert_close(audio(x).summary, tiny_clip.model.visual(as_image), atol=1e-5, rtol=1e-5)


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


def test_checkpointing_changes_memory_and_not_gradients() -> None:
    x = torch.randn(2, 200, 128)
    grads = []
    for checkpointing in (False, True):
        model = small(checkpointing=checkpointing).train()
        model(x).summary.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_every_parameter_gets_a_finite_gradient() -> None:
    model = small()
    model(torch.randn(2, 200, 128)).summary.sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool(torch.isfinite(p.grad).all()), name
