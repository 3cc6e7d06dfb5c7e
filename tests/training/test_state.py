"""A checkpoint holds everything that a resume needs, and nothing that runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import safetensors
import torch
from torch import nn

from harken.errors import DataError
from harken.training.optim import OPTIMIZERS
from harken.training.state import TrainState, load, save


def trained(optimizer: str, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optim = OPTIMIZERS[optimizer](
        [{"params": [p], "lr": 0.1, "peak_lr": 0.1 * i} for i, p in enumerate(model.parameters())], lr=0.1
    )
    for _ in range(steps):
        optim.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optim.step()
    return model, optim


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_everything_comes_back_to_the_bit(optimizer: str, tmp_path: Path) -> None:
    model, optim = trained(optimizer)
    best = copy.deepcopy(model)
    nn.init.zeros_(best[0].weight)
    state = TrainState(7, 0.1 + 0.2, 2, [{"epoch": 0, "loss": 1 / 3}, {"loss": 0.7}], 3)
    save(tmp_path / "state.safetensors", state, model, best, optim)
    other, other_optim = trained(optimizer, steps=1)
    other_best = copy.deepcopy(other)
    back = load(tmp_path / "state.safetensors", other, other_best, other_optim)
    assert back == state
    for a, b in ((model, other), (best, other_best)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    for a, b in ((model, other),):  # the same next step
        for m, o in ((a, optim), (b, other_optim)):
            o.zero_grad()
            m(torch.ones(5, 3)).sum().backward()
            o.step()
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert [g["peak_lr"] for g in other_optim.param_groups] == [g["peak_lr"] for g in optim.param_groups]


def test_equal_states_are_equal_bytes(tmp_path: Path) -> None:
    for i in range(8):  # a header in a random order would be the same now and then
        model, optim = trained("adam")
        save(tmp_path / str(i), TrainState(1), model, model, optim)
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1


def test_a_new_state_has_no_best(tmp_path: Path) -> None:
    model, optim = trained("adam")
    save(tmp_path / "s", TrainState(), model, model, optim)
    assert load(tmp_path / "s", model, copy.deepcopy(model), optim) == TrainState(0, float("-inf"), -1, [])


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    model, optim = trained("lars")
    save(tmp_path / "s", TrainState(), model, model, optim)
    with safetensors.safe_open(tmp_path / "s", "pt") as f:
        assert set(f.metadata()) == {"harken"}
        assert set(json.loads(f.metadata()["harken"])) == {"tree", "state"}


@pytest.mark.parametrize("damage", ["cut", "other_model", "not_ours"])
def test_a_checkpoint_that_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    model, optim = trained("adam")
    path = tmp_path / "s"
    save(path, TrainState(), model, model, optim)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "other_model":
        model = nn.Linear(2, 2)
        optim = torch.optim.Adam(model.parameters())
    else:
        safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(DataError, match=r"(?s)does not fit the run .* Delete it to start the run anew"):
        load(path, model, copy.deepcopy(model), optim)
