"""Several processes learn what one does: the same draws, loss and gradients, the same run, and one error for all.

Run as a script, this file is one of the processes; they are started once, and go through every check together.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harken.errors import ClipError, ConfigError, HarkenError
from harken.evaluation.metrics import retrieval_metrics
from harken.evaluation.protocols import PROTOCOLS
from harken.models.audio_vit import AudioViT
from harken.models.features import Part
from harken.models.matching import MATCHES
from harken.models.towers import AudioTower
from harken.shards import ShardWriter
from harken.training.batches import Clips, Features, Order
from harken.training.compute import ComputeConfig, Encode
from harken.training.distributed import Group, group, joined, parallel
from harken.training.loop import Plan, fit
from harken.training.optim import OptimizerConfig, build
from harken.training.runs import device
from harken.training.tasks import AudioImage, AudioText, AugmentConfig, Captions, FbankInput

pytestmark = pytest.mark.xdist_group("processes")  # they are started once, not once a worker
CPU = torch.device("cpu")
N, BATCH, IMAGES, DIM, FRAMES, MELS = 11, 6, 3, 16, 96, 64  # batches of 6 and 5: shared as 3 + 2 and 2 + 2 + 1
IDS = [f"c{i}" for i in range(N)]
BAD = "c5"
LIMIT_S = 150

# what is trained: (match, its options, division, epoch, micro-batch)
CASES: dict[str, tuple[str, dict[str, Any], str, int, int | None]] = {
    "random": ("random_image", {}, "segment", 0, None),
    "nearest, warming up": ("nearest_image", {"n_warmup": 1}, "segment", 0, None),
    "nearest": ("nearest_image", {"n_warmup": 1}, "segment", 1, None),
    "all pairs, warming up": ("nearest_image", {"n_warmup": 1, "scope": "all_pairs"}, "segment", 0, None),
    "all pairs": ("nearest_image", {"n_warmup": 1, "scope": "all_pairs"}, "segment", 1, 1),
    "multiframe": ("multiframe", {"row_norm": False}, "segment", 0, None),
    "multiframe, rows normed": ("multiframe", {"row_norm": True}, "segment", 0, 2),
    "multiframe, tokens": ("multiframe", {"row_norm": False}, "token_pool", 0, None),
    "captions": ("captions", {}, "segment", 0, 2),
}


class Killed(BaseException):
    """What a SIGKILL would do, as far as a function can tell."""


def compute(micro_batch: int | None) -> ComputeConfig:
    return ComputeConfig(
        precision="float32",
        micro_batch=micro_batch,
        checkpointing=False,
        fused_attention=True,
        compile=False,
        deterministic=False,
    )


def write_features(folder: Path, bad: float = 0.0) -> None:
    """Clips of different lengths in four shards; with `bad`, one clip has such a number."""
    rng = np.random.default_rng(0)
    for shard in range(4):
        with ShardWriter(folder, shard, fingerprint="f", columns={}, arrays={"fbank": (MELS, "float16")}) as out:
            for i in range(shard, N, 4):
                fbank = rng.normal(size=(int(rng.integers(FRAMES - 30, FRAMES + 10)), MELS))
                if bad and IDS[i] == BAD:
                    fbank[3, 5] = bad
                out.write(IDS[i], fbank=fbank)


class Exact(FbankInput):
    """In float64: what differs is then a mistake, not rounding."""

    def __call__(self, clips: Clips, generator: torch.Generator | None, part: Part | None = None) -> Tensor:
        return super().__call__(clips, generator, part).double()


@dataclass
class Lab:
    """What the processes work on: the parent's folder, and what the tasks are made of."""

    out: Path

    def read(self, features: str = "features") -> FbankInput:
        augment = AugmentConfig(freq_mask=8, time_mask=20, roll=True, gain_db=3.0)
        return Exact(Features(self.out / features, "fbank"), FRAMES, 0.1, 2.0, augment, CPU)

    def tower(self, n_segments: int, division: str) -> AudioTower:
        torch.manual_seed(2)
        length = FRAMES if division == "token_pool" else FRAMES // n_segments
        vit = AudioViT(
            width=32, layers=2, heads=2, embed_dim=DIM, patch=16, stride=(16, 16), n_frames=length, n_mels=MELS
        )
        return AudioTower(vit, n_segments, division=division).double()

    def task(self, case: str, features: str = "features") -> AudioImage | AudioText:
        name, options, division, _, micro_batch = CASES[case]
        tower = self.tower(IMAGES if name == "multiframe" else 1, division)
        how = "pooled" if name == "captions" else "segments"
        encode = parallel(Encode(tower, how, compute(micro_batch)))  # type: ignore[arg-type]
        g = torch.Generator().manual_seed(1)
        if name == "captions":
            captions = Captions.build([(c, [f"{c} {k}" for k in range(1 + i % 3)]) for i, c in enumerate(IDS)])
            texts = torch.randn(len(captions.texts), DIM, generator=g)
            return AudioText(tower, encode, self.read(features), captions, texts, captions, texts, retrieval_metrics)
        images = torch.randn(N, IMAGES, DIM, generator=g)
        val = slice(0, 5)
        return AudioImage(
            tower,
            encode,
            MATCHES[name](**options),
            self.read(features),
            IDS,
            images,
            IDS[val],
            images[val],
            PROTOCOLS["max" if name != "multiframe" else "flatten"],
            partial(retrieval_metrics, ks=(1,)),
        )


def order() -> Order:
    return Order(N, BATCH, 5, rank=group().rank, world=group().size)


# ------------------------------------------------------------------------------------- what the processes do


def steps_of(lab: Lab, case: str) -> list[dict[str, Any]]:
    """The batches of an epoch: loss, gradients, and what was drawn for them."""
    task, found = lab.task(case), []
    fed: list[Tensor] = []
    encode = getattr(task.encode, "module", task.encode)
    encode.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].clone()))
    for step, batch in enumerate(task.batches(order()).epoch(CASES[case][3])):
        loss, _ = task.loss(batch, CASES[case][3], torch.Generator().manual_seed(step))
        task.model.zero_grad()
        (loss * group().size).backward()
        found.append(
            {
                "loss": group().total(loss),
                "grads": {k: p.grad.clone() for k, p in task.model.named_parameters()},
                "fed": fed[-1],
                "chosen": getattr(getattr(task, "match", None), "chosen", None),
                "validated": None,
            }
        )
    with torch.no_grad():
        found[-1]["validated"] = dict(task.validate())
    return found


def losses(lab: Lab) -> dict[str, Any]:
    return {case: steps_of(lab, case) for case in CASES}


class Cut:
    """A task that is killed at a step, or that spoils a gradient in one process."""

    def __init__(self, task: AudioImage | AudioText, kill_at: int = -1, spoil: bool = False) -> None:
        self.task, self.kill_at, self.spoil, self.n = task, kill_at, spoil, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def loss(self, *args: Any) -> tuple[Tensor, Mapping[str, float]]:
        if self.n == self.kill_at:
            raise Killed
        self.n += 1
        loss, extra = self.task.loss(*args)
        weight = next(self.task.model.parameters())
        return loss + (0 * weight).sum().float().sqrt() if self.spoil else loss, extra


def train(lab: Lab, task: Any, folder: Path, epochs: int = 2) -> dict[str, Any]:
    """Two epochs of two steps in the papers' way; the result, and what `watch` was told."""
    schedule = {"name": "warmup_cosine", "warmup_epochs": 1, "final": 0.001}
    cfg = OptimizerConfig(
        name="lars", lr_weight=20.0, lr_bias=0.05, weight_decay=1e-6, base="1", schedule=dict(schedule)
    )
    which = order()
    optimizer, factor = build(cfg, task.model, BATCH, which.steps_per_epoch, epochs)
    plan = Plan(epochs, 5, factor, None, 1, "last")
    told: list[int] = []
    start = copy.deepcopy(task.model.state_dict())
    state = fit(task, optimizer, which, plan, folder, "toy", watch=lambda rows: told.append(len(rows)))
    weights = {k: v.clone() for k, v in task.model.state_dict().items()}
    return {"state": vars(state), "weights": weights, "start": start, "told": told}


def whole_run(lab: Lab) -> dict[str, Any]:
    own = f"run-of-{group().size}" if group().is_first else f"nothing-{group().rank}"
    return train(lab, lab.task("random"), lab.out / own)


def cut_run(lab: Lab) -> None:
    train(lab, Cut(lab.task("random"), kill_at=3), lab.out / "cut")


def resumed_run(lab: Lab) -> dict[str, Any]:
    return train(lab, lab.task("random"), lab.out / f"cut-for-{group().size}")


def disagreeing_run(lab: Lab) -> None:
    train(lab, lab.task("random"), lab.out / ("cut" if group().is_first else "elsewhere"))


def other_steps(lab: Lab) -> None:
    train(lab, lab.task("random"), lab.out / "steps", epochs=2 + group().rank)


def diverging_run(lab: Lab) -> None:
    train(lab, lab.task("random", "bad"), lab.out / "diverged")


def spoilt_gradient(lab: Lab) -> None:
    train(lab, Cut(lab.task("random"), spoil=not group().is_first), lab.out / "spoilt")


def one_cannot_read(lab: Lab) -> None:
    task = lab.task("random", "features" if group().is_first else "truncated")
    if not group().is_first:
        for path in (lab.out / "truncated").glob("*.npy"):
            os.truncate(path, 400)
    train(lab, task, lab.out / "unread")


def one_is_gone(lab: Lab) -> None:
    if not group().is_first:
        os._exit(0)
    group().total(torch.ones(()))


class OddError(Exception):
    """An exception that cannot be sent."""

    def __init__(self, told: str, more: object) -> None:
        super().__init__(told)
        self.more = more


def raises(make: Callable[[], object]) -> tuple[str, str, Any]:
    try:
        make()
    except Exception as e:
        return type(e).__name__, str(e), getattr(e, "facts", None)
    return "nothing", "", None


def basics(lab: Lab) -> dict[str, Any]:
    g, n_made = group(), 0

    def made() -> dict[str, int]:
        nonlocal n_made
        n_made += 1
        return {"rank": g.rank}

    def refuse(error: Exception) -> object:
        raise error

    def squares(items: Any) -> Tensor:
        assert len(items), "nobody is asked for nothing"
        return torch.tensor([[float(i * i)] for i in items])

    def gathered(n: int) -> tuple[Tensor, Tensor | None]:
        """`n` rows of this process's number among all; row i of all weighs i and i + 0.5 plus that number."""
        own = torch.full((n, 2), float(g.rank), requires_grad=True)
        rows = g.rows(own)
        weights = torch.arange(len(rows))[:, None] + torch.tensor([0.0, 0.5]) + g.rank
        (rows * weights).sum().backward()
        return rows.detach(), own.grad

    return {
        "group": (g.rank, g.size, g.is_first),
        "told": g.told(made),
        "n_made": n_made,
        "refused": raises(lambda: g.told(partial(refuse, ConfigError("no such recipe")))),
        "clip": raises(lambda: g.told(partial(refuse, ClipError("qc.silent", "a", http_status=3)))),
        "odd": raises(lambda: g.told(partial(refuse, OddError("odd", lambda: 0)))),
        "after": g.told(lambda: "still together"),
        "total": g.total(torch.tensor(g.rank + 0.5, requires_grad=True)),
        "rows": gathered(g.rank + 1),
        "no rows": gathered(g.rank),
        "flat": g.rows(torch.full((1,), g.rank)),
        "spread": {n: g.spread(list(range(n)), squares) for n in (1, 2, 3, 7)},
        "all_told": g.all_told(f"from {g.rank}"),
        "agree": raises(lambda: g.agree("the weather", "rain")),
        "disagree": raises(lambda: g.agree("the weather", "sun" if g.rank == g.size - 1 else "rain")),
    }


# In order; how many processes meet for each. The last one loses a process.
Phases = list[tuple[str, int, Callable[[Lab], Any]]]
PHASES: Phases = [
    ("basics", 2, basics),
    ("losses", 2, losses),
    ("losses", 1, losses),
    ("whole", 1, whole_run),
    ("whole", 2, whole_run),
    ("cut", 2, cut_run),
    ("resumed", 2, resumed_run),
    ("resumed", 1, resumed_run),
    ("disagreeing", 2, disagreeing_run),
    ("other steps", 2, other_steps),
    ("diverging", 2, diverging_run),
    ("spoilt", 2, spoilt_gradient),
    ("unread", 2, one_cannot_read),
    ("gone", 2, one_is_gone),
]
OF_THREE: Phases = [("basics", 3, basics), ("losses", 3, losses), ("losses", 1, losses)]


def work(out: Path, rank: int, phases: Phases, ports: list[int]) -> None:
    """One process: every phase that it is part of, what came of it, and what was raised."""
    lab, found = Lab(out), {}
    gc.freeze()  # what was imported need not be looked through at every run's beginning
    for (name, world, what), port in zip(phases, ports, strict=True):
        if rank >= world:
            continue
        os.environ |= {"WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
        if name == "gone":
            torch.save(found, out / f"found-{rank}.pt")  # who is gone has left what came before
        if name == "resumed" and rank == 0:
            shutil.copytree(out / "cut", out / f"cut-for-{world}")
        try:
            with joined(CPU):
                found[name, world] = ("ok", what(lab))
        except BaseException as e:
            found[name, world] = (type(e).__name__, str(e) + ("" if isinstance(e, HarkenError) else _trace()))
        if torch.distributed.is_initialized():  # who fails ends its process; this one goes on, without what it held
            gc.collect()
            torch.distributed.destroy_process_group()
    torch.save(found, out / f"found-{rank}.pt")


def _trace() -> str:
    return "\n" + traceback.format_exc()


# ------------------------------------------------------------------------------------------------- the tests

Found = dict[tuple[str, int], list[Any]]


def free_ports(n: int) -> list[int]:
    held = [socket.socket() for _ in range(n)]
    for s in held:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def start(out: Path, phases: str, n: int) -> Found:
    """What came of each phase, a value for every process of it; or the kind of its error and what it says."""
    write_features(out / "features")
    write_features(out / "truncated")
    write_features(out / "bad", np.inf)
    ports = ",".join(map(str, free_ports(len(globals()[phases]))))
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"  # no name has to be found in any network
    started = [
        subprocess.Popen([sys.executable, __file__, str(out), str(r), phases, ports], env=env | {"RANK": str(r)})
        for r in range(n)
    ]
    end = time.monotonic() + LIMIT_S
    try:
        while any(p.poll() is None for p in started) and not any(p.poll() for p in started):
            assert time.monotonic() < end, "a process waits for one that never comes"
            time.sleep(0.02)
        assert [p.poll() for p in started] == [0] * n, "a process died; what it said is on stderr"
    finally:
        for p in started:
            p.kill()
            p.wait()
    ranks = [torch.load(out / f"found-{r}.pt", weights_only=False) for r in range(n)]
    return {key: [found[key] for found in ranks if key in found] for key in ranks[0]}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(out: Path) -> Found:
    return start(out, "PHASES", 2)


class Shared(NamedTuple):
    """What the processes of a group found, and how many they were."""

    found: Found
    world: int

    def each(self, what: str) -> list[Any]:
        return [r[what] for r in results(self.found, "basics", self.world)]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    if request.param == 2:
        return Shared(request.getfixturevalue("found"), 2)
    return Shared(start(tmp_path_factory.mktemp("three"), "OF_THREE", 3), 3)


def results(found: Found, name: str, world: int) -> list[Any]:
    """What the processes of a phase that went well return."""
    assert [kind for kind, _ in found[name, world]] == ["ok"] * world, found[name, world]
    return [value for _, value in found[name, world]]


def largest(tensors: Mapping[str, Tensor]) -> float:
    return max(float(t.abs().max()) for t in tensors.values())


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference, as a share of the largest number."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a) / largest(b)


@pytest.mark.parametrize("case", CASES)
def test_draws_loss_and_gradients_are_those_of_one_process(shared: Shared, case: str) -> None:
    (alone,), together = results(shared.found, "losses", 1), results(shared.found, "losses", shared.world)
    parts = [r[case] for r in together]
    for step, theirs in enumerate(alone[case]):
        fed = torch.cat([p[step]["fed"] for p in parts])
        assert torch.equal(fed, theirs["fed"]), "augmented otherwise"
        if theirs["chosen"] is not None:
            assert torch.equal(torch.cat([p[step]["chosen"] for p in parts]), theirs["chosen"])
        assert largest(theirs["grads"]) > 1e-3
        for ours in (p[step] for p in parts):  # every process has them all
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
            assert distance(ours["grads"], theirs["grads"]) < 1e-6
    for ours in parts:
        assert len(ours) == len(alone[case]) == 2
        assert ours[-1]["validated"] == pytest.approx(alone[case][-1]["validated"], rel=1e-12)


def test_the_last_batch_was_shared_unevenly(shared: Shared) -> None:
    parts = [r["random"] for r in results(shared.found, "losses", shared.world)]
    sizes = {2: [[3, 3], [3, 2]], 3: [[2, 2, 2], [2, 2, 1]]}
    assert [[len(p[step]["fed"]) for p in parts] for step in (0, 1)] == sizes[shared.world]
    assert len(torch.unique(torch.cat([s["chosen"] for p in parts for s in p]))) == IMAGES


def test_a_run_of_two_processes_ends_where_one_would(found: Found) -> None:
    (alone,), together = results(found, "whole", 1), results(found, "whole", 2)
    assert distance(alone["weights"], alone["start"]) > 1e-3  # something was learnt
    for run in together:
        assert distance(run["weights"], alone["weights"]) < 1e-6
        assert run["state"]["step"] == 4
        for ours, theirs in zip(run["state"]["history"], alone["state"]["history"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
    assert all(torch.equal(together[1]["weights"][k], w) for k, w in together[0]["weights"].items())


def test_only_the_first_process_writes(found: Found, out: Path) -> None:
    first, second = results(found, "whole", 2)
    assert [p.name for p in (out / "run-of-2").iterdir()] == ["state.safetensors"]
    assert not (out / "nothing-1").exists()
    assert (first["told"], second["told"]) == ([0, 1, 2], [])


def test_a_run_stopped_within_an_epoch_is_resumed_by_two_or_by_one(found: Found, out: Path) -> None:
    assert [kind for kind, _ in found["cut", 2]] == ["Killed", "Killed"]
    (alone,) = results(found, "whole", 1)
    again = results(found, "resumed", 2)
    assert again[0]["told"] == [1, 2]  # the history there was, and each epoch after it
    state = (out / "cut-for-2" / "state.safetensors").read_bytes()
    assert state == (out / "run-of-2" / "state.safetensors").read_bytes()
    for run in (*again, *results(found, "resumed", 1)):
        assert run["state"]["step"] == 4
        assert distance(run["weights"], alone["weights"]) < 1e-6


def errors(found: Found, name: str, kind: str = "DataError") -> list[str]:
    assert [k for k, _ in found[name, 2]] == [kind, kind], found[name, 2]
    return [said for _, said in found[name, 2]]


def test_processes_that_do_not_see_the_same_checkpoint_stop(found: Found) -> None:
    for said in errors(found, "disagreeing"):
        assert "the 2 processes of this run differ in the step they resume at (process 0: 3, process 1: 0)" in said
        assert "They must share the folders" in said


def test_processes_that_have_other_numbers_of_steps_stop(found: Found) -> None:
    for said in errors(found, "other steps"):
        assert "differ in the number of steps of the run (process 0: 4, process 1: 6)" in said


def test_a_divergence_ends_all_and_names_the_clips_of_all(found: Found, out: Path) -> None:
    second = list(Order(N, BATCH, 5).epoch(0))[1].tolist()
    assert IDS.index(BAD) in second[3:], "the bad clip is the second process's"
    clips = [IDS[i] + " (its features are not finite)" * (IDS[i] == BAD) for i in second]
    told = json.loads((out / "diverged" / "diverged.json").read_text())
    assert told == {"what": "loss is nan", "epoch": 0, "step": 1, "clips": clips}
    for said in errors(found, "diverging"):
        assert f"toy: the loss is nan at epoch 0, step 1. The batch was {', '.join(clips[:4])} and 1 more" in said
        assert "The last good state is" in said
    assert sorted(p.name for p in (out / "diverged").iterdir()) == ["diverged.json", "state.safetensors"]


def test_a_gradient_that_one_process_spoils_ends_all(found: Found, out: Path) -> None:
    for said in errors(found, "spoilt"):
        assert "the gradient's norm is nan at epoch 0, step 0" in said
    told = json.loads((out / "spoilt" / "diverged.json").read_text())
    assert told["clips"] == [IDS[i] for i in next(Order(N, BATCH, 5).epoch(0))]


def test_where_one_cannot_go_on_the_others_do_not_wait(found: Found) -> None:
    """The one that cannot says why, the others that they were left."""
    (left, said), (kind, reason) = found["unread", 2]
    assert (kind, left) == ("DataError", "HarkenError"), (reason, said)
    assert "truncated" in reason
    assert "ends before row" in reason
    assert said.startswith("another process of this run has ended, so this one cannot go on.")


def test_where_one_is_gone_without_a_word_the_others_do_not_wait(found: Found) -> None:
    ((kind, said),) = found["gone", 2]
    assert kind == "HarkenError", said
    assert said.startswith("another process of this run has ended")


def test_a_group_is_its_processes(shared: Shared) -> None:
    w = shared.world
    assert shared.each("group") == [(r, w, r == 0) for r in range(w)]
    assert shared.each("all_told") == [[f"from {r}" for r in range(w)]] * w
    assert shared.each("total") == [sum(r + 0.5 for r in range(w))] * w


def test_what_the_first_makes_all_are_told(shared: Shared) -> None:
    assert shared.each("told") == [{"rank": 0}] * shared.world
    assert shared.each("n_made") == [1] + [0] * (shared.world - 1)


def test_what_the_first_raises_all_raise(shared: Shared) -> None:
    assert shared.each("refused") == [("ConfigError", "no such recipe", None)] * shared.world
    assert shared.each("clip") == [("ClipError", "qc.silent: a", {"http_status": 3})] * shared.world
    first, *others = shared.each("odd")
    assert first == ("OddError", "odd", None)
    assert others == [("HarkenError", "process 0: OddError: odd", None)] * len(
        others
    )  # it cannot be sent; its words can
    assert shared.each("after") == ["still together"] * shared.world


@pytest.mark.parametrize(("name", "fewest"), [("rows", 1), ("no rows", 0)])
def test_rows_are_those_of_all_and_gradients_find_their_way_back(shared: Shared, name: str, fewest: int) -> None:
    w = shared.world
    whose = [r for r in range(w) for _ in range(r + fewest)]
    for rank, (rows, grad) in enumerate(shared.each(name)):
        assert rows.tolist() == [[r, r] for r in whose]
        own = [i for i, r in enumerate(whose) if r == rank]
        expected = [[w * i + sum(range(w)), w * (i + 0.5) + sum(range(w))] for i in own]
        assert (grad.tolist() if grad is not None else []) == expected
    assert [f.tolist() for f in shared.each("flat")] == [list(range(w))] * w


def test_work_is_spread_and_comes_back_in_order(shared: Shared) -> None:
    """Of one item, too, which one process makes while the others wait."""
    for spread in shared.each("spread"):
        for n, made in spread.items():
            assert made.tolist() == [[i * i] for i in range(n)]


def test_who_differs_is_told_apart(shared: Shared) -> None:
    assert shared.each("agree") == [("nothing", "", None)] * shared.world
    told = [f"process {r}: {'sun' if r == shared.world - 1 else 'rain'}" for r in range(shared.world)]
    for kind, said, _ in shared.each("disagree"):
        assert kind == "DataError"
        assert f"the {shared.world} processes of this run differ in the weather ({', '.join(told)})" in said


# ------------------------------------------------------------------------------------------- one process alone


def test_alone_nobody_is_waited_for() -> None:
    alone = Group()
    assert (alone.is_first, alone.told(lambda: 3), alone.all_told("a")) == (True, 3, ["a"])
    x = torch.ones(2, 3)
    assert alone.rows(x) is x
    assert alone.total(torch.tensor(2.5, requires_grad=True)) == 2.5
    assert alone.spread([1, 2], lambda items: torch.tensor(list(items))).tolist() == [1, 2]
    alone.agree("anything", object())
    with pytest.raises(OddError):
        alone.told(lambda: (_ for _ in ()).throw(OddError("as it is", 1)))
    assert group() == alone
    module = nn.Linear(2, 2)
    assert parallel(module) is module


@pytest.mark.parametrize("world", [None, "1"])
def test_a_process_that_was_started_alone_meets_nobody(world: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    with joined(CPU) as met:
        assert met == Group()
        assert not torch.distributed.is_initialized()


def test_a_gpu_for_all_of_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("HARKEN_DEVICE", "cuda")
    with pytest.raises(ConfigError, match="HARKEN_DEVICE=cuda: 4 processes were started together"), joined(device()):
        pass


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), globals()[sys.argv[3]], [int(p) for p in sys.argv[4].split(",")])
