"""LARS and the learning-rate schedules. A recipe's `optimizer` and `schedule` are keys of the two dicts below."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harken.config import Config
from harken.errors import ConfigError, unknown

ETA = 1e-3
MOMENTUM = 0.9


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), in the variant of Barlow Twins and VIP-ANT.

        d = g + wd · p      q = η |p| / |d|, or 1 where either norm is 0      m ← 0.9 m + q d      p ← p - lr · m

    Tensors with fewer than two dimensions (biases, norms, a scalar scale) take plain SGD with momentum: no weight
    decay, q = 1. η is 0.001. timm's Lars is another: its ratio is η|p| / (|g| + wd|p| + eps), and it adapts by
    weight-decay group.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = MOMENTUM,
        eta: float = ETA,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Stays on the parameters' device throughout: the ratio is never read back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                d = p.grad
                if p.ndim > 1:
                    d = d.add(p, alpha=group["weight_decay"])
                    p_norm, d_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(d)
                    ratio = group["eta"] * p_norm / d_norm
                    d = d * torch.where((p_norm > 0) & (d_norm > 0), ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(d)
                p.add_(state["momentum"], alpha=-group["lr"])
        return loss


def weight_bias_groups(
    model: nn.Module, *, lr_weight: float, lr_bias: float, factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: matrices and up at `lr_weight`; biases, norms, scalars at `lr_bias`.

    `peak_lr` keeps the rate that a schedule's factor multiplies. Tsubaki et al. 2024, table I (its text swaps the two).
    `factors`: of the model's parts by name, what their rates are multiplied by; each has two groups of its own.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = [(1.0, trainable)]
    for part, factor in (factors or {}).items():
        own = {name: trainable.pop(name) for name in list(trainable) if name.startswith(part + ".")}
        parts += [(factor, own)] if own else []
    groups = []
    for factor, named in parts:
        weights, biases = [p for p in named.values() if p.ndim > 1], [p for p in named.values() if p.ndim < 2]
        for parameters, lr in ((weights, lr_weight * factor), (biases, lr_bias * factor)):
            groups.append({"params": parameters, "lr": lr, "peak_lr": lr})
    return groups


def one_group(model: nn.Module, *, lr: float) -> list[dict[str, Any]]:
    """One group of all trainable parameters, with its `peak_lr`."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr, "peak_lr": lr}]


def warmup_cosine(
    step: int, *, steps_per_epoch: int, epochs: int, warmup_epochs: int, base: float, final: float
) -> float:
    """The factor on a peak rate at `step` (from 0): linear from 0 to `base`, then a cosine to `final` * `base`.

    Barlow Twins' and VIP-ANT's: base = batch / 256, final = 0.001. Step 0 has rate 0 and changes nothing but the
    momentum.
    """
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return base * step / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    return base * cosine + final * base * (1 - cosine)


def step_lr(step: int, *, steps_per_epoch: int, epochs: int, every_epochs: int, gamma: float) -> float:
    """The factor on a peak rate at `step`: times `gamma` after every `every_epochs` epochs (Mei et al.: 0.1 every 20).

    `epochs` does not matter; every schedule takes it.
    """
    return float(gamma ** (step // (steps_per_epoch * every_epochs)))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "lars": LARS,
}
SCHEDULES: dict[str, Callable[..., float]] = {"step_lr": step_lr, "warmup_cosine": warmup_cosine}


class OptimizerConfig(Config):
    """An optimiser and its schedule. `lr_weight` is for tensors of two or more dimensions, `lr_bias` for the others.

    `base` is what peak rates are multiplied by: `batch/256` (LARS in Barlow Twins' and VIP-ANT's way) or 1. `schedule`
    holds `name` and that schedule's own options.
    """

    name: Literal["lars", "adam", "adamw"]
    lr_weight: float
    lr_bias: float
    weight_decay: float
    base: Literal["batch/256", "1"]
    schedule: dict[str, str | int | float]


def build(
    cfg: OptimizerConfig,
    model: nn.Module,
    batch: int,
    steps_per_epoch: int,
    epochs: int,
    factors: Mapping[str, float] | None = None,
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """The optimiser of a model's trainable parameters, and the factor on each group's `peak_lr` at a step.

    `factors` as in `weight_bias_groups`. Raises ConfigError for an unknown schedule or options that it does not take.
    """
    options = dict(cfg.schedule)
    name = options.pop("name", None)
    if name not in SCHEDULES:
        raise unknown("optimizer.schedule.name", name, SCHEDULES)
    scale = batch / 256 if cfg.base == "batch/256" else 1.0
    if name == "warmup_cosine":
        options["base"] = 1.0
    factor = partial(SCHEDULES[str(name)], steps_per_epoch=steps_per_epoch, epochs=epochs, **options)
    try:
        factor(0)
    except TypeError as e:
        raise ConfigError(f"optimizer.schedule: {e}") from None
    rates = {"lr_weight": cfg.lr_weight * scale, "lr_bias": cfg.lr_bias * scale}
    groups = weight_bias_groups(model, **rates, factors=factors)
    return OPTIMIZERS[cfg.name](groups, lr=cfg.lr_weight * scale, weight_decay=cfg.weight_decay), factor
