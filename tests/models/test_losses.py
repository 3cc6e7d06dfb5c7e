"""Laws of every loss, closed forms of each."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch

from harken.errors import ConfigError
from harken.models.losses import LOSSES, LearnedTemperature, nt_xent, pmr, pmr_warnings

TAU = 0.07
BOUND = {
    "infonce": {},
    "nt_xent": {"temperature": TAU},
    "pmr": {"temperature": TAU, "prior_scale": 1 / TAU},
    "triplet_sum": {"margin": 0.2},
    "triplet_max": {"margin": 0.2},
    "triplet_weighted": {"margin": 0.2},
}
VARIANTS = [(name, {}) for name in LOSSES] + [("pmr", {"index": "literal"}), ("pmr", {"shift": "half"})]


@pytest.fixture(params=VARIANTS, ids=str)
def loss(request: pytest.FixtureRequest):
    name, options = request.param
    return partial(LOSSES[name], **BOUND[name], **options)


def sims(n: int = 6, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, n, generator=g, dtype=torch.float64) * 1.6 - 0.8


def nt_xent_of(sim, **kw):
    return LOSSES["nt_xent"](sim, **({"temperature": TAU} | kw))


def test_transposing_changes_nothing(loss) -> None:
    torch.testing.assert_close(loss(sims().T), loss(sims()))


def test_permuting_pairs_changes_nothing(loss) -> None:
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    torch.testing.assert_close(loss(sims()[order][:, order]), loss(sims()))


def test_scalar_not_negative_and_better_for_better_matrices(loss) -> None:
    good, bad = torch.eye(6).double() * 1.4 - 0.5, sims()
    assert loss(bad).shape == ()
    assert 0 <= float(loss(good)) < float(loss(bad))


def test_gradient_is_finite_and_right(loss) -> None:
    sim = sims().requires_grad_()
    assert torch.autograd.gradcheck(loss, sim, atol=1e-6)
    loss(sim).backward()
    assert bool(sim.grad.any())
    one = torch.tensor([[0.3]], requires_grad=True)
    value = loss(one)
    value.backward()
    assert float(value.detach()) == 0
    assert float(one.grad) == 0


def test_a_satisfied_batch_still_has_a_gradient(loss) -> None:
    sim = (3 * torch.eye(4) - 1.5).requires_grad_()
    loss(sim).backward()
    assert bool(torch.isfinite(sim.grad).all())


def test_half_precision_is_computed_in_single(loss) -> None:
    sim = sims().to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(sim)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(sim.float()))


CLIPS = torch.tensor([7, 3, 7, 5, 3, 7])
SAME = (CLIPS[:, None] == CLIPS[None, :]) & ~torch.eye(6, dtype=torch.bool)


def test_same_clips_are_negatives_unless_masked(loss) -> None:
    assert torch.equal(loss(sims(), CLIPS), loss(sims()))
    torch.testing.assert_close(loss(sims(), torch.arange(6), mask_same_audio=True), loss(sims()))
    likely = sims().masked_fill(SAME, 0.79)  # as two captions of one clip are
    assert float(loss(likely, CLIPS, mask_same_audio=True)) < float(loss(likely))


def test_what_is_masked_is_neither_seen_nor_moved(loss) -> None:
    masked = partial(loss, clips=CLIPS, mask_same_audio=True)
    sim = sims().requires_grad_()
    masked(sim).backward()
    assert bool(torch.isfinite(sim.grad).all())
    assert float(sim.grad[SAME].abs().max()) == 0
    assert torch.equal(masked(sims().masked_fill(SAME, 0.99)), masked(sims()))
    torch.testing.assert_close(masked(sims().T), masked(sims()))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    torch.testing.assert_close(loss(sims()[order][:, order], CLIPS[order], mask_same_audio=True), masked(sims()))


def test_a_batch_of_one_clip_has_nothing_to_tell_apart(loss) -> None:
    sim = sims().requires_grad_()
    value = loss(sim, torch.zeros(6, dtype=torch.long), mask_same_audio=True)
    value.backward()
    assert float(value.detach()) == 0
    assert float(sim.grad.abs().max()) == 0


def test_a_mask_without_clips_is_refused(loss) -> None:
    with pytest.raises(ConfigError, match=r"loss\(sim, clips\)"):
        loss(sims(), mask_same_audio=True)


@pytest.mark.parametrize(("n", "value"), [(32, 3.874e-5), (64, 7.873e-5), (128, 1.587e-4)])
def test_nt_xent_of_the_identity(n: int, value: float) -> None:
    found = float(nt_xent_of(torch.eye(n, dtype=torch.float64)))
    assert found == pytest.approx(2 * math.log(1 + (n - 1) * math.exp(-1 / TAU)), rel=1e-9)
    assert found == pytest.approx(value, rel=1e-3)


def test_nt_xent_of_a_constant_and_its_reductions() -> None:
    flat = torch.full((8, 8), 0.4)
    assert float(nt_xent_of(flat)) == pytest.approx(2 * math.log(8), rel=1e-6)
    half = nt_xent_of(sims(), reduction="mean_of_directions")
    torch.testing.assert_close(LOSSES["infonce"](sims() / TAU), 2 * half)
    with pytest.raises(ConfigError, match="'mean'"):
        nt_xent_of(sims(), reduction="mean")
    with pytest.raises(ConfigError, match="pmr: reduction"):
        pmr(sims(), temperature=TAU, prior_scale=14.0, reduction="mean")


@pytest.mark.filterwarnings("ignore:pmr")
@pytest.mark.parametrize("reduction", ["sum", "mean_of_directions"])
def test_pmr_with_no_prior_is_nt_xent(reduction) -> None:
    flat = partial(pmr, sims(), temperature=TAU, prior_scale=0.0, reduction=reduction)
    torch.testing.assert_close(flat(), nt_xent_of(sims(), temperature=TAU * 6, reduction=reduction))
    torch.testing.assert_close(flat(scale_by_batch=True), nt_xent_of(sims(), reduction=reduction))


@pytest.mark.filterwarnings("ignore:pmr")
def test_pmr_with_a_sharp_prior_keeps_only_mutual_matches() -> None:
    sim = sims() * 0.2 + torch.eye(6).double() * 0.5
    found = pmr(sim, temperature=TAU, prior_scale=1e4)
    expected = 2 * torch.log(1 + 5 * torch.exp(-sim.diagonal() / TAU)).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:pmr")
def test_detaching_the_prior_changes_the_gradient_and_not_the_value() -> None:
    values, grads = [], []
    for detach in (False, True):
        sim = sims().requires_grad_()
        value = pmr(sim, temperature=TAU, prior_scale=10.0, detach_prior=detach)
        value.backward()
        values.append(value.detach())
        grads.append(sim.grad)
    assert torch.equal(*values)
    assert not torch.allclose(*grads, rtol=0.05)
    prior_t2a, prior_a2t = torch.softmax(10 * sims(), 0), torch.softmax(10 * sims(), 1)
    sim = sims().requires_grad_()
    target = torch.arange(6)
    ce = torch.nn.functional.cross_entropy
    (ce(sim * prior_t2a / TAU, target) + ce((sim * prior_a2t / TAU).T, target)).backward()
    torch.testing.assert_close(sim.grad, grads[1])


@pytest.mark.filterwarnings("ignore:pmr")
@pytest.mark.parametrize("index", ["other", "literal"])
@pytest.mark.parametrize("detach", [False, True])
def test_the_gradient_is_that_of_finite_differences(detach: bool, index: str) -> None:
    """Detached, of the loss whose prior stays that of the matrix the step is taken at."""
    sim, step = sims().requires_grad_(), 1e-6
    options = {"temperature": TAU, "prior_scale": 10.0, "index": index}
    pmr(sim, detach_prior=detach, **options).backward()
    t2a, a2t = torch.softmax(10 * sims(), 0), torch.softmax(10 * sims(), 1)
    if index == "literal":
        t2a, a2t = t2a.diagonal()[:, None], a2t.diagonal()[None, :]
    target = torch.arange(6)

    def value(moved: torch.Tensor) -> float:
        if not detach:
            return float(pmr(moved, **options))
        ce = torch.nn.functional.cross_entropy
        return float(ce(moved * t2a / TAU, target) + ce((moved * a2t / TAU).T, target))

    for i in range(6):
        for j in range(6):
            nudge = torch.zeros(6, 6, dtype=torch.float64)
            nudge[i, j] = step
            slope = (value(sims() + nudge) - value(sims() - nudge)) / (2 * step)
            assert float(sim.grad[i, j]) == pytest.approx(slope, abs=1e-7, rel=1e-6)


def test_the_literal_prior_is_a_temperature_of_each_item() -> None:
    sim, ce = sims(), torch.nn.functional.cross_entropy
    t2a, a2t = torch.softmax(10 * sim, 0).diagonal(), torch.softmax(10 * sim, 1).diagonal()
    expected = sum(
        float(ce(sim[i : i + 1] * t2a[i] / TAU, torch.tensor([i])))
        + float(ce(sim[:, i][None] * a2t[i] / TAU, torch.tensor([i])))
        for i in range(6)
    )
    found = pmr(sim, temperature=TAU, prior_scale=10.0, index="literal")
    assert float(found) == pytest.approx(expected / 6, rel=1e-12)


@pytest.mark.filterwarnings("ignore:pmr")
def test_shifted_by_half_no_negative_cosine_is_pulled_up() -> None:
    """A prior below one raises a negative cosine towards 0; shifted, it lowers every one."""
    flat = partial(pmr, sims(), temperature=TAU, prior_scale=0.0, shift="half")
    torch.testing.assert_close(flat(), nt_xent_of(sims(), temperature=2 * TAU * 6))
    torch.testing.assert_close(flat(scale_by_batch=True), nt_xent_of(sims(), temperature=2 * TAU))
    sim = torch.tensor([[0.5, -0.8], [-0.8, 0.5]]).double()
    plain, shifted = (pmr(sim, temperature=TAU, prior_scale=14.0, shift=s) for s in ("none", "half"))
    assert float(plain) == pytest.approx(4 * math.log1p(math.exp(-0.5 / TAU)) / 2, rel=1e-3)  # -0.8 has become 0
    assert float(shifted) == pytest.approx(4 * math.log1p(math.exp(-0.75 / TAU)) / 2, rel=1e-3)


@pytest.mark.parametrize(("option", "words"), [("index", "Did you mean 'literal'"), ("shift", "half, none")])
def test_pmr_refuses_unknown_readings(option: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"pmr: {option}.*{words}"):
        pmr(sims(), temperature=TAU, prior_scale=14.0, **{option: "litteral" if option == "index" else "0.5"})


def test_a_temperature_may_be_learned() -> None:
    tau = LearnedTemperature(TAU).double()
    torch.testing.assert_close(nt_xent(sims(), temperature=tau()), nt_xent_of(sims()), rtol=1e-6, atol=0)
    nt_xent(sims(), temperature=tau()).backward()
    ahead, behind = (float(nt_xent_of(sims(), temperature=math.exp(math.log(TAU) - d))) for d in (1e-5, -1e-5))
    assert float(tau.log_scale.grad) == pytest.approx((ahead - behind) / 2e-5, rel=1e-5)
    pmr(sims(), temperature=tau(), prior_scale=14.0).backward()


def test_a_learned_temperature_stops_at_its_floor_and_comes_back() -> None:
    tau = LearnedTemperature(0.02, floor=0.01)
    with torch.no_grad():
        tau.log_scale += 5
    assert float(tau().detach()) == pytest.approx(0.01)
    nt_xent(sims().float(), temperature=tau()).backward()
    assert float(tau.log_scale.grad) != 0
    with pytest.raises(ConfigError, match=r"not in \(0, 0.005\]"):
        LearnedTemperature(0.005)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"prior_scale": 1.0, "index": "literal"}, "prior_scale 1 is outside"),
        ({"prior_scale": 14.3, "index": "literal", "scale_by_batch": True}, "scale_by_batch"),
        ({"prior_scale": 14.3, "shift": "half", "detach_prior": True}, "detach_prior"),
        ({"prior_scale": 1.0}, "prior_scale 1 is outside"),
        ({"prior_scale": 50.0}, "prior_scale 50 is outside"),
        ({"prior_scale": 14.3, "detach_prior": True}, "detach_prior"),
        ({"prior_scale": 14.3, "scale_by_batch": True}, "scale_by_batch"),
    ],
)
def test_pmr_warns_of_what_does_not_train_by_name(setting: dict, words: str) -> None:
    assert [w for w in pmr_warnings(**setting) if words in w]
    with pytest.warns(UserWarning, match=words):
        pmr(sims(), temperature=TAU, **setting)


def test_pmr_is_silent_where_it_trains() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pmr(sims(), temperature=TAU, prior_scale=1 / TAU)
        pmr(sims(), temperature=TAU, prior_scale=0.1, scale_by_batch=True, detach_prior=True)
        pmr(sims(), temperature=TAU, prior_scale=50.0, index="literal", detach_prior=True)
        pmr(sims(), temperature=TAU, prior_scale=8.0, index="literal", scale_by_batch=True)
        pmr(sims(), temperature=TAU, prior_scale=1 / TAU, shift="half")


def test_triplets_of_a_matrix_worked_by_hand() -> None:
    sim = torch.tensor([[0.5, 0.4, 0.0], [0.6, 0.3, 0.1], [0.2, 0.0, 0.9]])
    # margin 0.2. rows: [.1, 0], [.5, 0], [0, 0]; columns: [.3, 0], [.3, 0], [0, 0]
    assert float(LOSSES["triplet_sum"](sim, margin=0.2)) == pytest.approx((0.6 + 0.6) / 3)
    assert float(LOSSES["triplet_max"](sim, margin=0.2)) == pytest.approx((0.6 + 0.6) / 3)
    assert float(LOSSES["triplet_sum"](sim, margin=0.5)) > float(LOSSES["triplet_max"](sim, margin=0.5))

    def pair(p: float, n: float) -> float:
        return max(0.2 * p * p - 0.7 * p + 0.5, 0) + max(0.9 * n * n - 0.4 * n + 0.03, 0)

    expected = (pair(0.5, 0.4) + pair(0.3, 0.6) + pair(0.5, 0.6) + pair(0.3, 0.4)) / 3
    assert float(LOSSES["triplet_weighted"](sim, margin=0.2)) == pytest.approx(expected)
