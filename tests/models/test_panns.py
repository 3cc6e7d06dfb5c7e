"""PANNs: sizes, names, time resolution, and that a padded clip is the clip."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harken.errors import ConfigError, DataError
from harken.models.panns import Cnn14, ResidualBlock, ResNet38, spec_augment

BUILD = {
    "cnn14": lambda: Cnn14(n_classes=5, width=4),
    "cnn14_31": lambda: Cnn14(n_classes=5, width=4, block6_pool=1),
    "resnet38": lambda: ResNet38(n_classes=5, width=4),
}


@pytest.fixture(params=BUILD)
def model(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    net = BUILD[request.param]()
    for m in net.modules():  # a fresh network's norms are the identity and its residual branches are zero
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            torch.nn.init.uniform_(m.bias, -0.5, 0.5)
            torch.nn.init.uniform_(m.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(m.running_var, 0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize(("cls", "n", "n_tensors"), [(Cnn14, 80_753_615, 84), (ResNet38, 73_783_247, 246)])
def test_parameter_counts(cls, n: int, n_tensors: int) -> None:
    with torch.device("meta"):
        net = cls()
    assert sum(p.numel() for p in net.parameters()) == n
    assert len(net.state_dict()) == n_tensors - 3  # upstream's front end is three more
    backbone = n - sum(p.numel() for k, p in net.named_parameters() if k.startswith("fc"))
    assert backbone == {Cnn14: 75_477_440, ResNet38: 68_507_072}[cls]


def test_names_are_upstream_s() -> None:
    cnn, res = set(Cnn14(width=1).state_dict()), set(ResNet38(width=1).state_dict())
    assert {
        "bn0.running_var",
        "conv_block6.conv2.weight",
        "conv_block1.bn1.bias",
        "fc1.weight",
        "fc_audioset.bias",
    } <= cnn
    assert {"resnet.layer1.2.bn2.weight", "resnet.layer3.5.conv1.weight", "conv_block_after1.conv1.weight"} <= res
    down = {k for k in res if "downsample" in k and k.endswith("weight")}
    assert down == {f"resnet.layer{i}.0.downsample.{j}.weight" for i in (2, 3, 4) for j in (1, 2)}


@pytest.mark.parametrize(("n_frames", "t"), [(1001, 31), (1501, 46), (3001, 93)])
def test_time_resolution(n_frames: int, t: int) -> None:
    x = torch.zeros(1, n_frames, 64)
    assert ResNet38(width=1).eval()(x).frames.shape == (1, t, 32)
    assert Cnn14(width=1, block6_pool=1).eval()(x).frames.shape == (1, t, 32)
    assert Cnn14(width=1).eval()(x).frames.shape[1] == t // 2


def test_a_clip_too_short_names_the_samples_it_needs() -> None:
    for net, samples in ((ResNet38(width=1), 9920), (Cnn14(width=1), 20160), (Cnn14(width=1, block6_pool=1), 9920)):
        n = samples // 320 + 1
        net.eval()(torch.zeros(1, n, 64))
        with pytest.raises(DataError, match=f"{samples} samples"):
            net(torch.zeros(1, n - 1, 64))
        with pytest.raises(DataError, match=f"{samples} samples"):
            net(torch.zeros(2, 200, 64), torch.arange(200).expand(2, -1) < torch.tensor([[200], [n - 1]]))


def test_wrong_input_and_wrong_option() -> None:
    with pytest.raises(DataError, match="32 mel bins"):
        ResNet38(width=1)(torch.zeros(1, 100, 32))
    with pytest.raises(ConfigError, match="block6_pool"):
        Cnn14(width=1, block6_pool=3)


@pytest.mark.parametrize("n_valid", [130, 157, 250])
def test_a_padded_clip_is_the_clip(model, n_valid: int) -> None:
    x = torch.randn(1, n_valid, 64)
    batch = torch.full((2, 300, 64), 7.0)
    batch[0, :n_valid] = x
    mask = torch.arange(300).expand(2, -1) < torch.tensor([[n_valid], [300]])
    with torch.no_grad():
        alone, padded = model(x), model(batch, mask)
    assert int(padded.mask[0].sum()) == alone.frames.shape[1]
    torch.testing.assert_close(padded.frames[0][padded.mask[0]], alone.frames[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.tags(padded)[:1], model.tags(alone), atol=1e-5, rtol=1e-5)


def test_a_full_mask_is_no_mask(model) -> None:
    x = torch.randn(2, 200, 64)
    with torch.no_grad():
        assert torch.equal(model(x).frames, model(x, torch.ones(2, 200, dtype=torch.bool)).frames)


def test_training_draws_from_torch_s_generator_alone(model) -> None:
    model.train()
    x = torch.randn(2, 200, 64)
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(model(x).frames)
    assert torch.equal(*outs)
    outs[0].sum().backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_spec_augment_drops_two_stripes_each_way() -> None:
    torch.manual_seed(0)
    x = spec_augment(torch.ones(400, 1, 1001, 64))
    rows, cols = (x == 0).all(3)[:, 0], (x == 0).all(2)[:, 0]
    assert rows.sum(1).max() <= 126
    assert cols.sum(1).max() <= 14
    assert 0.04 < rows.float().mean() < 0.08  # 2 * 31.5 / 1001, a little less for overlaps
    assert 0.08 < cols.float().mean() < 0.13
    assert bool(((x == 0)[:, 0] == (rows[:, :, None] | cols[:, None])).all())
    assert len({tuple(r.nonzero()[:, 0].tolist()) for r in rows}) > 300  # each clip has its own


def test_the_residual_block_pools_before_it_convolves() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(2, 3, halves=True, dropout=0.1).eval()
    torch.nn.init.ones_(block.bn2.weight)
    x = torch.randn(1, 2, 8, 8)
    norm = (1 + 1e-5) ** -0.5
    pooled = F.avg_pool2d(x, 2)
    inner = F.relu(F.conv2d(pooled, block.conv1.weight, padding=1) * norm)
    expected = F.relu(
        F.conv2d(inner, block.conv2.weight, padding=1) * norm + F.conv2d(pooled, block.downsample[1].weight) * norm
    )
    torch.testing.assert_close(block(x, None)[0], expected)
