"""LARS in closed form, and the schedules at the papers' own numbers."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harken.config import read_params
from harken.errors import ConfigError
from harken.training.batches import Order
from harken.training.optim import (
    LARS,
    OPTIMIZERS,
    SCHEDULES,
    OptimizerConfig,
    build,
    one_group,
    step_lr,
    warmup_cosine,
    weight_bias_groups,
)


def pair() -> tuple[nn.Parameter, nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(3, 4, generator=g).double()), nn.Parameter(torch.randn(4, generator=g).double())


def steps(params, grads, **kw) -> list[torch.Tensor]:
    optimizer = LARS(list(params), **kw)
    for g in grads:
        for p, d in zip(params, g, strict=True):
            p.grad = d.clone()
        optimizer.step()
    return [p.detach() for p in params]


def some_grads(n: int = 3) -> list[list[torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [[torch.randn(3, 4, generator=g).double(), torch.randn(4, generator=g).double()] for _ in range(n)]


def test_closed_form() -> None:
    w, b = (p.detach().clone() for p in pair())
    mw, mb = torch.zeros_like(w), torch.zeros_like(b)
    for gw, gb in some_grads():
        d = gw + 0.01 * w
        q = 0.001 * w.norm() / d.norm()
        mw, mb = 0.9 * mw + q * d, 0.9 * mb + gb
        w, b = w - 0.3 * mw, b - 0.3 * mb
    torch.testing.assert_close(steps(pair(), some_grads(), lr=0.3, weight_decay=0.01), [w, b], atol=1e-12, rtol=0)


def test_tensors_of_one_dimension_or_none_take_plain_sgd() -> None:
    def params() -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(5)), nn.Parameter(torch.tensor(2.66))]

    grads = [[torch.arange(5.0), torch.tensor(0.5)]] * 3
    ours, theirs = steps(params(), grads, lr=0.1, weight_decay=0.5), params()
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    for g in grads:
        for p, d in zip(theirs, g, strict=True):
            p.grad = d.clone()
        sgd.step()
    torch.testing.assert_close(ours, [p.detach() for p in theirs])


def test_a_rate_of_zero_is_no_step() -> None:
    before = [p.detach().clone() for p in pair()]
    assert all(map(torch.equal, steps(pair(), some_grads(1), lr=0.0, weight_decay=1e-6), before))


def test_weights_do_not_feel_the_scale_of_their_gradient() -> None:
    scaled = [[1e4 * g for g in gs] for gs in some_grads()]
    a, b = (steps(pair(), g, lr=0.3, weight_decay=0.0) for g in (some_grads(), scaled))
    torch.testing.assert_close(a[0], b[0])
    assert not torch.allclose(a[1], b[1])


def test_where_a_norm_is_zero_the_ratio_is_one() -> None:
    zero, grad = nn.Parameter(torch.zeros(2, 2)), torch.ones(2, 2)
    torch.testing.assert_close(steps([zero], [[grad]], lr=0.1, weight_decay=0.0)[0], -0.1 * grad)
    still = nn.Parameter(torch.ones(2, 2))
    assert torch.equal(steps([still], [[torch.zeros(2, 2)]], lr=0.1, weight_decay=0.0)[0], torch.ones(2, 2))


def test_resuming_from_its_state_is_not_resuming() -> None:
    grads = some_grads(4)
    whole = steps(pair(), grads, lr=0.3, weight_decay=0.01)
    params = pair()
    first = LARS(list(params), lr=0.3, weight_decay=0.01)
    for i, g in enumerate(grads):
        if i == 2:
            state = copy.deepcopy(first.state_dict())
            first = LARS(list(params), lr=9.9, weight_decay=0.5)
            first.load_state_dict(state)
        for p, d in zip(params, g, strict=True):
            p.grad = d.clone()
        first.step()
    assert all(map(torch.equal, whole, [p.detach() for p in params]))


def test_a_parameter_without_gradient_stays() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    LARS([p], lr=1.0).step()
    assert torch.equal(p, torch.ones(2, 2))
    assert LARS([p], lr=1.0).step(lambda: 3.0) == 3.0


def test_groups() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model.scale = nn.Parameter(torch.tensor(2.66))
    model[0].bias.requires_grad_(False)
    weights, biases = weight_bias_groups(model, lr_weight=0.2, lr_bias=4.8e-3)
    assert [p.ndim for p in weights["params"]] == [2]
    assert sorted(p.ndim for p in biases["params"]) == [0, 1, 1]
    assert (weights["peak_lr"], biases["peak_lr"]) == (0.2, 4.8e-3)
    assert len(one_group(model, lr=1e-4)[0]["params"]) == 4
    for name, make in OPTIMIZERS.items():
        optimizer = make(weight_bias_groups(model, lr_weight=0.2, lr_bias=4.8e-3), lr=0.1)
        assert [g["lr"] for g in optimizer.param_groups] == [0.2, 4.8e-3], name


def test_a_part_of_the_model_may_learn_at_a_rate_of_its_own() -> None:
    model = nn.ModuleDict({"pooling": nn.Linear(3, 4), "pooling_too": nn.Linear(4, 2), "bare": nn.Identity()})
    factors = {"pooling": 0.1, "bare": 0.5}
    groups = weight_bias_groups(model, lr_weight=0.2, lr_bias=0.01, factors=factors)
    assert [g["peak_lr"] for g in groups] == pytest.approx([0.2, 0.01, 0.02, 0.001])
    assert [g["lr"] for g in groups] == [g["peak_lr"] for g in groups]
    other, own = model["pooling_too"], model["pooling"]
    held = [[other.weight], [other.bias], [own.weight], [own.bias]]
    assert [[id(p) for p in g["params"]] for g in groups] == [[id(p) for p in of] for of in held]
    optimizer, _ = build(config(), model, 128, steps_per_epoch=10, epochs=30, factors=factors)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2, 0.1, 0.02, 0.01])


@pytest.mark.parametrize(
    ("batch", "epochs", "per_epoch", "lr", "by_epoch"),
    [
        (128, 30, 13_075, 0.2, {5: 0.05, 10: 0.1, 15: 0.08537}),
        (64, 20, 673, 1.0, {5: 0.125, 10: 0.25, 15: 0.125125}),
    ],
    ids=["audio-image", "audio-text"],
)
def test_warmup_cosine_at_the_papers_numbers(batch, epochs, per_epoch, lr, by_epoch) -> None:
    def at(step: int) -> float:
        kw = {"steps_per_epoch": per_epoch, "epochs": epochs, "warmup_epochs": 10, "base": batch / 256, "final": 0.001}
        return lr * warmup_cosine(step, **kw)

    assert at(0) == 0
    for epoch, rate in by_epoch.items():
        assert at(epoch * per_epoch) == pytest.approx(rate, rel=1e-4)
    last = lr * batch / 256 * 0.001
    assert at(epochs * per_epoch - 1) == pytest.approx(last, rel=1e-2)
    assert at(epochs * per_epoch) == pytest.approx(last, rel=1e-9)


@dataclass(frozen=True)
class Column:
    """Of the table of Tsubaki et al. 2024 (methods, 1.5): a stage, and what it comes to."""

    stage: str
    n_clips: int
    steps_per_epoch: int
    last_batch: int
    n_steps: int
    weights: dict[int, float]  # by epoch; -1 is the last step
    biases: dict[int, float]


VA = Column(
    "pretrain",
    1_673_501,
    13_075,
    29,
    392_250,
    {0: 0, 5: 0.05, 10: 0.1, 15: 0.08537, -1: 1.0e-4},
    {0: 0, 5: 0.0012, 10: 0.0024, 15: 0.0020488, -1: 2.4e-6},
)
AT = Column(
    "finetune",
    43_045,
    673,
    37,
    13_460,
    {0: 0, 5: 0.125, 10: 0.25, 15: 0.125125, -1: 2.5e-4},
    {0: 0, 5: 0.003, 10: 0.006, 15: 0.003003, -1: 6.0e-6},
)


@pytest.fixture(params=[VA, AT], ids=["audio-image", "audio-text"])
def column(request: pytest.FixtureRequest) -> Column:
    return request.param


@pytest.fixture
def stage(column: Column) -> dict[str, Any]:
    """What the preset says of the column's stage."""
    presets = Path(__file__).parents[2] / "presets"
    return read_params(presets / "paper.yaml")[column.stage]


def test_the_paper_s_steps(column: Column, stage: dict[str, Any]) -> None:
    order = Order(column.n_clips, stage["batch"], 20, stage["drop_last"])
    assert order.steps_per_epoch == column.steps_per_epoch
    assert order.steps_per_epoch * stage["epochs"] == column.n_steps
    (last,) = order.epoch(0, column.steps_per_epoch - 1)
    assert len(last) == order.part(column.steps_per_epoch - 1).of == column.last_batch


def test_the_paper_s_rates_from_the_preset(column: Column, stage: dict[str, Any]) -> None:
    cfg = OptimizerConfig.model_validate(stage["optimizer"])
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    optimizer, factor = build(cfg, model, stage["batch"], column.steps_per_epoch, stage["epochs"])
    assert type(optimizer) is LARS
    assert [(g["weight_decay"], g["momentum"], g["eta"]) for g in optimizer.param_groups] == [(1e-6, 0.9, 1e-3)] * 2
    for group, rates in zip(optimizer.param_groups, (column.weights, column.biases), strict=True):
        for epoch, rate in rates.items():
            step = column.n_steps - 1 if epoch < 0 else epoch * column.steps_per_epoch
            assert group["peak_lr"] * factor(step) == pytest.approx(rate, rel=1e-4 if epoch >= 0 else 1e-3)


def test_the_first_step_changes_nothing_but_the_momentum(stage: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    before = copy.deepcopy(model.state_dict())
    optimizer, factor = build(OptimizerConfig.model_validate(stage["optimizer"]), model, stage["batch"], 10, 30)

    def step(n: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor(n)
        optimizer.zero_grad()
        model(torch.ones(4, 2)).square().mean().backward()
        optimizer.step()

    step(0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(bool(s["momentum"].abs().sum() > 0) for s in optimizer.state.values())
    step(1)
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_rate_rises_in_a_line_and_falls_without_a_leap(column: Column, stage: dict[str, Any]) -> None:
    options = {k: v for k, v in stage["optimizer"]["schedule"].items() if k != "name"}
    kw = {"steps_per_epoch": column.steps_per_epoch, "epochs": stage["epochs"], "base": 1.0, **options}
    warm = options["warmup_epochs"] * column.steps_per_epoch
    rates = [warmup_cosine(s, **kw) for s in range(0, column.n_steps, 97)]
    rising, falling = rates[: warm // 97], rates[warm // 97 + 1 :]
    assert rising == pytest.approx([97 * i / warm for i in range(len(rising))])
    assert falling == sorted(falling, reverse=True)
    assert warmup_cosine(warm, **kw) == 1.0
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= math.pi / 2 * 97 / warm


def test_no_warm_up_starts_at_the_peak() -> None:
    kw = {"steps_per_epoch": 5, "epochs": 2, "warmup_epochs": 0, "base": 0.5, "final": 0.0}
    assert warmup_cosine(0, **kw) == 0.5


def test_step_lr() -> None:
    rates = [step_lr(e * 7 + 6, steps_per_epoch=7, epochs=50, every_epochs=20, gamma=0.1) for e in (0, 19, 20, 39, 40)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_every_schedule_is_a_factor_from_zero_to_one() -> None:
    options = {
        "warmup_cosine": {"warmup_epochs": 2, "base": 1.0, "final": 0.001},
        "step_lr": {"every_epochs": 2, "gamma": 0.1},
    }
    for name, schedule in SCHEDULES.items():
        factors = [schedule(s, steps_per_epoch=10, epochs=5, **options[name]) for s in range(50)]
        assert min(factors) >= 0, name
        assert max(factors) == pytest.approx(1.0), name


def config(**changes: object) -> OptimizerConfig:
    schedule = {"name": "warmup_cosine", "warmup_epochs": 2, "final": 0.001}
    values = {"name": "adam", "lr_weight": 0.2, "lr_bias": 0.1, "weight_decay": 0.01, "base": "1", "schedule": schedule}
    return OptimizerConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("lars", LARS)], ids=lambda v: str(v)
)
def test_a_config_names_its_optimiser(name: str, kind: type) -> None:
    optimizer, factor = build(config(name=name), nn.Linear(2, 3), batch=128, steps_per_epoch=10, epochs=30)
    assert type(optimizer) is kind
    assert [g["peak_lr"] for g in optimizer.param_groups] == [0.2, 0.1]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.01]
    assert (factor(0), factor(10), factor(20)) == (0.0, 0.5, 1.0)


def test_the_papers_way_scales_by_the_batch() -> None:
    optimizer, factor = build(config(base="batch/256"), nn.Linear(2, 3), batch=128, steps_per_epoch=10, epochs=30)
    assert [g["peak_lr"] for g in optimizer.param_groups] == [0.1, 0.05]
    assert factor(20) == 1.0  # not scaled twice


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({"name": "step_ls", "every_epochs": 1, "gamma": 0.1}, "unknown name 'step_ls'. Did you mean 'step_lr'"),
        ({"every_epochs": 1}, "optimizer.schedule.name: unknown name 'None'"),
        ({"name": "step_lr", "every": 1, "gamma": 0.1}, "optimizer.schedule: .*every"),
    ],
)
def test_a_schedule_that_is_not_known_or_does_not_fit_is_refused(schedule: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(config(schedule=schedule), nn.Linear(2, 3), batch=4, steps_per_epoch=10, epochs=30)
