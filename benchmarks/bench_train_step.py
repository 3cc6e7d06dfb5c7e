"""A training step of paper B's audio tower, as `pretrain` makes it: clips/s, MFU, memory, time spent waiting for data.

Float16 FBANKs in shards of a temporary folder pass harken's own pieces: Loader, FbankInput with the preset's
augmentation, Encode, AudioImage with random images, the loop's step with the preset's optimiser, Meter. Weights, FBANKs
and image embeddings are random: speed does not ask what they are. Two peers in the same run, which read, augment and
check nothing, for their clips lie on the device: the same tower as plain PyTorch, and open_clip's VisionTransformer of
the same shape; both eager, in float32, with the same optimiser (on a GPU open_clip with autocast too).

A turn is one step that is not timed, then some that are. Contestants take turns; medians. On a CPU: one thread and its
CPU time, the readers' included, and the memory of each contestant in a process of its own. On a GPU: events, and the
peak of its allocator above weights and momentum. What a large matrix product reaches is measured in the same turns.

    python benchmarks/bench_train_step.py [--preset world] [--batch 16 128]
    python benchmarks/bench_train_step.py --device cuda [--preset paper] [--batch 128 512 2048]
    python benchmarks/bench_train_step.py --hours [--clips-per-second 2400]

`--hours` measures nothing: it prints what presets/paper.yaml would take at such a speed.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip.transformer
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import interleaved
from harken.config import parse, read_params
from harken.models.audio_vit import AudioViT, QuickGELU, token_grid
from harken.models.matching import RandomImage
from harken.models.panns import ENCODERS, LOGMEL_ROWS_PER_S
from harken.models.towers import LOGIT_SCALE_INIT, AudioTower, frames_of_pass
from harken.shards import ShardWriter
from harken.stages.pretrain import Multiframe, PretrainConfig
from harken.stages.train import TrainConfig
from harken.training.batches import Features, Order
from harken.training.compute import PEAKS, ComputeConfig, Encode, peak_flops, prepare, training_flops
from harken.training.loader import AHEAD
from harken.training.loop import Plan, TrainState, _step
from harken.training.meter import Meter
from harken.training.optim import build
from harken.training.tasks import AudioImage, FbankInput

ROOT = Path(__file__).parents[1]
N_IMAGES, N_MELS, PATCH, PER_SHARD, MOST_STORED = 4, 128, 32, 512, 2048
MEAN, STD = -4.9, 5.8
PLAIN = "plain PyTorch, float32"
EAGER = ComputeConfig(
    precision="float32",
    micro_batch=None,
    checkpointing=False,
    fused_attention=True,
    compile=False,
    deterministic=False,
)


class Shape(NamedTuple):
    """A tower; all else about a run is its preset's."""

    name: str
    width: int
    layers: int
    heads: int
    dim: int


SHAPES = {"world": Shape("the world's tower", 64, 2, 2, 64), "paper": Shape("ViT-B/32", 768, 12, 12, 512)}


class Bench(NamedTuple):
    """What every contestant is made from."""

    preset: str
    batch: int
    n_steps: int
    device: torch.device
    folder: Path

    @property
    def cfg(self) -> PretrainConfig:
        path = ROOT / f"presets/{self.preset}.yaml"
        return parse(f"{path.name}: pretrain", PretrainConfig, read_params(path)["pretrain"])

    @property
    def shape(self) -> Shape:
        return SHAPES[self.preset]

    @property
    def product_side(self) -> int:
        return 2048 if self.device.type == "cpu" else 8192

    @property
    def n_clips(self) -> int:
        """Of a turn: one step more than are timed."""
        return self.batch * (1 + self.n_steps)

    def optimizer(self, model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
        return build(self.cfg.optimizer, model, self.batch, 1000, self.cfg.epochs)


def vit(shape: Shape, cfg: PretrainConfig, n_segments: int = 1) -> AudioViT:
    n_frames = frames_of_pass(cfg.vit.n_frames, n_segments, "segment")
    sizes = {"width": shape.width, "layers": shape.layers, "heads": shape.heads, "embed_dim": shape.dim}
    return AudioViT(**sizes, patch=PATCH, stride=cfg.vit.stride, n_frames=n_frames, n_mels=N_MELS)


def stored(bench: Bench) -> list[str]:
    """The clips of a turn; those that are more than what is on the disk are the same again."""
    return [f"c{i % MOST_STORED}" for i in range(bench.n_clips)]


def make(bench: Bench) -> None:
    """Shards of FBANKs, as `extract` writes them."""
    base = np.random.default_rng(0).normal(MEAN, STD, (bench.cfg.vit.n_frames, N_MELS)).astype(np.float16)
    clips = list(dict.fromkeys(stored(bench)))
    for shard, first in enumerate(range(0, len(clips), PER_SHARD)):
        arrays = {"fbank": (N_MELS, "float16")}
        with ShardWriter(bench.folder, shard, fingerprint="bench", columns={}, arrays=arrays) as out:
            for i, clip in enumerate(clips[first : first + PER_SHARD], start=first):
                out.write(clip, fbank=np.roll(base, i, 0))


class Shared:
    """One tower and its optimiser, which all but open_clip train: memory is for their steps."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.tower = AudioTower(vit(bench.shape, bench.cfg)).to(bench.device)
        self.optimizer, self.factor = bench.optimizer(self.tower)

    def become(self, compute: ComputeConfig) -> None:
        self.tower.vit.checkpointing = compute.checkpointing
        for block in self.tower.vit.transformer.resblocks:
            block.attn.fused = compute.fused_attention


Step = Callable[[], object]


class Ours:
    """The steps of a run of `pretrain`, recipe random_image."""

    def __init__(self, shared: Shared, compute: ComputeConfig) -> None:
        bench, tower, cfg = shared.bench, shared.tower, shared.bench.cfg
        read = FbankInput(Features(bench.folder, "fbank"), cfg.vit.n_frames, MEAN, STD, cfg.augment, bench.device)
        images = torch.randn(bench.n_clips, N_IMAGES, bench.shape.dim)
        encode = Encode(tower, "segments", compute)
        self.task = AudioImage(tower, encode, RandomImage(), read, stored(bench), images, [], images, _never, _never)
        self.plan = Plan(cfg.epochs, 0, shared.factor, None, cfg.checkpoint_every, cfg.select)
        self.batches = self.task.batches(Order(bench.n_clips, bench.batch, 0, drop_last=True))
        self.bench, self.optimizer, self.compute = bench, shared.optimizer, compute
        self.state, self.n_turns = TrainState(), 0
        self.waited: list[float] = []
        """Percent of the time of each turn."""

    @contextmanager
    def turn(self) -> Iterator[Step]:
        """An epoch's steps; the first waits until a batch is read and compiles what is to be compiled."""
        meter = Meter("bench", self.bench.n_clips, 0)
        self.n_turns += 1
        with closing(self.batches.epoch(self.n_turns)) as coming:
            batches = meter.waiting(coming)

            def step() -> None:
                if meter.step == 1:
                    meter.rest()
                _step(self.task, self.optimizer, next(batches), 0, self.state, self.plan, self.bench.folder, "bench")
                self.state.step += 1
                meter.did(self.bench.batch)

            yield step
            told = re.search(r"waiting ([\d.]+) %", meter.speed())
            self.waited.append(float(told[1]) if told else 0.0)
        self.optimizer.zero_grad(set_to_none=True)


def _never(*_: object) -> Any:
    raise AssertionError("nothing is validated here")


class OpenClip(nn.Module):
    """open_clip's VisionTransformer, told to take one channel and overlapping patches."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        shape, stride = bench.shape, bench.cfg.vit.stride
        time_steps, mel_steps = token_grid(bench.cfg.vit.n_frames, N_MELS, patch=PATCH, stride=stride)
        sizes = ((time_steps * PATCH, mel_steps * PATCH), PATCH, shape.width, shape.layers, shape.heads, 4.0)
        self.vit = open_clip.transformer.VisionTransformer(*sizes, output_dim=shape.dim, act_layer=QuickGELU)
        self.vit.conv1 = nn.Conv2d(1, shape.width, PATCH, stride=stride, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE_INIT))
        self.to(bench.device)

    def forward(self, fbank: Tensor) -> Tensor:
        return self.vit(fbank[:, None])


class Peer:
    """The same step with nothing around it: one batch, in float32, on the device. `lowered`: with autocast."""

    compute = EAGER

    def __init__(
        self,
        bench: Bench,
        model: nn.Module,
        encode: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        lowered: bool = False,
    ) -> None:
        self.model, self.encode, self.optimizer = model, encode, optimizer
        self.lowered, self.device = lowered, bench.device
        self.fbank = torch.randn(bench.batch, bench.cfg.vit.n_frames, N_MELS, device=bench.device)
        self.images = F.normalize(torch.randn(bench.batch, bench.shape.dim, device=bench.device), dim=-1)

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.lowered):
            audio = self.encode(self.fbank).float()
        sim = self.model.logit_scale.exp() * self.images @ F.normalize(audio, dim=-1).T
        own = torch.arange(len(sim), device=sim.device)
        self.optimizer.zero_grad(set_to_none=True)
        (F.cross_entropy(sim, own) + F.cross_entropy(sim.T, own)).backward()
        self.optimizer.step()

    @contextmanager
    def turn(self) -> Iterator[Step]:
        yield self.step
        self.optimizer.zero_grad(set_to_none=True)


class Product:
    """A large matrix product."""

    compute = EAGER

    def __init__(self, shared: Shared, dtype: torch.dtype) -> None:
        bench = shared.bench
        self.a = torch.randn(bench.product_side, bench.product_side, dtype=dtype, device=bench.device)

    @contextmanager
    def turn(self) -> Iterator[Step]:
        yield lambda: self.a @ self.a


Contestant = Ours | Peer | Product
Make = Callable[[Shared], Contestant]


def contestants(batch: int, on_gpu: bool) -> dict[str, Make]:
    """Who takes part with such a batch, by what is printed of them."""
    micro = 256 if on_gpu else max(1, batch // 4)
    split = {f"micro_batch {micro}": {"micro_batch": micro}} if batch > micro else {}
    kinds: dict[str, dict[str, Any]] = {**split, "checkpointing": {"checkpointing": True}, "compile": {"compile": True}}
    if on_gpu:
        kinds |= {f"compile, {name}": {"compile": True, **how} for name, how in split.items()}
        kinds = {f"bfloat16, {name}": {"precision": "bfloat16", **how} for name, how in kinds.items()}
    else:
        kinds |= {"fused_attention false": {"fused_attention": False}}
    kinds = {"float32": {}, "bfloat16": {"precision": "bfloat16"}, **kinds}
    found: dict[str, Make] = {PLAIN: _plain, "open_clip, float32": partial(_open_clip, lowered=False)}
    if on_gpu:
        found["open_clip, bfloat16 by autocast"] = partial(_open_clip, lowered=True)
    found |= {f"harken, {k}": partial(Ours, compute=EAGER.model_copy(update=how)) for k, how in kinds.items()}
    return found | {
        product_of("float32"): partial(Product, dtype=torch.float32),
        product_of("bfloat16"): partial(Product, dtype=torch.bfloat16),
    }


def _plain(shared: Shared) -> Peer:
    tower = shared.tower
    return Peer(shared.bench, tower, lambda fbank: tower.segments(fbank)[:, 0], shared.optimizer)


def _open_clip(shared: Shared, lowered: bool) -> Peer:
    model = OpenClip(shared.bench)
    return Peer(shared.bench, model, model, shared.bench.optimizer(model)[0], lowered)


def product_of(name: str) -> str:
    """The product that a contestant of this name is held against."""
    return f"a matrix product, {'bfloat16' if 'bfloat16' in name else 'float32'}"


def seconds_of(run: Callable[[], object], on_gpu: bool) -> float:
    """CPU seconds of this process, or seconds between two events of the GPU."""
    if not on_gpu:
        began = time.process_time()
        run()
        return time.process_time() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


@dataclass
class Result:
    """Of each turn: seconds a step and, on a GPU, the peak in bytes above what lies there between steps."""

    step_s: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    waited: float | None = None


def play(bench: Bench, who: Mapping[str, Make], rounds: int, on_gpu: bool) -> dict[str, Result | None]:
    """All contestants in turn, after a turn each that warms up; None for those whom the GPU's memory does not hold."""
    shared = Shared(bench)
    found: dict[str, Result | None] = {name: Result() for name in who}
    playing: dict[str, Contestant] = {}
    for name, made in who.items():
        try:
            playing[name] = made(shared)
            one_turn(shared, playing[name], Result(), on_gpu)
        except torch.OutOfMemoryError:
            found[name] = None
        if found[name] is None:  # only here: while an error is handled it holds its frames, and they the memory
            playing.pop(name, None)
            shared.optimizer.zero_grad(set_to_none=True)
            gc.collect()
    for _ in range(rounds):
        for name, contestant in playing.items():
            one_turn(shared, contestant, found[name], on_gpu)
    for name, contestant in playing.items():
        if isinstance(contestant, Ours):
            found[name].waited = statistics.median(contestant.waited[1:])
    return found


def one_turn(shared: Shared, contestant: Contestant, result: Result, on_gpu: bool) -> None:
    """A step that is not timed, and those that are."""
    shared.become(contestant.compute)
    n_steps = shared.bench.n_steps
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with contestant.turn() as step:
        step()
        result.step_s.append(seconds_of(lambda: [step() for _ in range(n_steps)], on_gpu) / n_steps)
    if on_gpu:
        result.memory.append(torch.cuda.max_memory_allocated() - before)


def alone(name: str, bench: Bench) -> float:
    """What a process needs for two steps of a contestant above what it held before them, in bytes; Linux only."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_two_steps, name, bench).result()


def _two_steps(name: str, bench: Bench) -> float:
    torch.set_num_threads(1)
    shared = Shared(bench)
    contestant = contestants(bench.batch, on_gpu=False)[name](shared)
    shared.become(contestant.compute)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is counted from here on
    with contestant.turn() as step:
        step()
        step()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def show(bench: Bench, found: Mapping[str, Result | None], peer: float | None) -> float | None:
    """Print a table; return the plain peer's clips/s, or, where memory does not hold it, those it had before."""
    with torch.device("meta"):
        tower = AudioTower(vit(bench.shape, bench.cfg))
    flops, n_tokens = training_flops(tower, bench.cfg.vit.n_frames), len(tower.vit.positional_embedding)
    print(
        f"\n{bench.shape.name}, {n_tokens} tokens, {flops / 1e9:.2f} GFLOP a clip, {bench.cfg.optimizer.name}, "
        f"batch {bench.batch}, {bench.n_steps} steps a turn"
    )
    operations = 2 * bench.product_side**3
    products = {k: operations / statistics.median(found[k].step_s) for k in map(product_of, ("float32", "bfloat16"))}
    for name, rate in products.items():
        print(f"  {name:<40} {rate / 1e12:8.3f} TFLOP/s")
    if found[PLAIN]:
        peer = bench.batch / statistics.median(found[PLAIN].step_s)
    for name, result in found.items():
        if name in products:
            continue
        if result is None:
            print(f"  {name:<40} out of memory")
            continue
        rate = bench.batch / statistics.median(result.step_s)
        cells = [f"{name:<40} {rate:9,.2f} clips/s", f"{rate / peer:6.2f} x plain" if peer else "no peer"]
        cells.append(f"{100 * rate * flops / products[product_of(name)]:4.0f} % of a product")
        precision = "bfloat16" if "bfloat16" in name else "float32"
        if peak := peak_flops(bench.device, EAGER.model_copy(update={"precision": precision})):
            cells.append(f"MFU {100 * rate * flops / peak:4.1f} %")
        if result.memory:
            cells.append(f"{statistics.median(result.memory) / 1e9:6.2f} GB")
        if result.waited is not None and bench.n_steps > 2 * AHEAD:  # fewer are read before they are timed
            cells.append(f"waiting {result.waited:4.1f} %")
        print("  " + "  ".join(cells), flush=True)
    return peer


class Work(NamedTuple):
    """Runs of one kind, and the operations of each with its validation."""

    name: str
    n_runs: int
    flops: float


# clips of train and val: table II of Tsubaki et al. 2024; Mei et al.'s AudioCaps, which Xin et al. 2023 follow
AUDIOSET, AUDIOCAPS = (1_673_501, 16_273), (43_045, 429)
PAPER_A = {"audiocaps": (49_274, 494), "clotho": (3_839, 1_045)}
CAPTION_TOKENS = 24
FLOAT32 = 30e12  # operations a second that an H100 may sustain in float32, somewhat under half of its peak: a guess


def work_of_paper_b(params: Mapping[str, Any]) -> list[Work]:
    """The runs of `pretrain` and `finetune`: towers that hear a clip in one pass, and those that hear its segments."""
    cfg, tuned = parse("paper.yaml: pretrain", PretrainConfig, params["pretrain"]), params["finetune"]
    n_images = params["extract"]["n_images"]
    kinds = {}
    for how, n in {"whole clips": 1, f"{n_images} segments": n_images}.items():
        with torch.device("meta"):
            flops = training_flops(AudioTower(vit(SHAPES["paper"], cfg, n), n), cfg.vit.n_frames)
        kinds[how] = flops, [k for k, r in cfg.recipes.items() if isinstance(r, Multiframe) == (n > 1)]
    found = []
    for how, (flops, names) in kinds.items():
        found.append(Work(f"pretrain, {how}", len(names) * len(cfg.seeds), cfg.epochs * _passes(*AUDIOSET) * flops))
    for how, (flops, names) in kinds.items():
        n_runs = sum(r["start"] in names for r in tuned["recipes"].values()) * len(tuned["seeds"])
        found.append(Work(f"finetune, {how}", n_runs, tuned["epochs"] * _passes(*AUDIOCAPS) * flops))
    return found


def _passes(n_train: int, n_val: int) -> float:
    """How many clips' training an epoch is worth; a validation has no pass back."""
    return n_train + n_val / 3


def work_of_paper_a(params: Mapping[str, Any]) -> list[Work]:
    """The runs of `train`: PANNs and BERT alone, next to which projections and poolings are little."""
    from transformers import BertConfig, BertModel

    cfg = parse("paper.yaml: train", TrainConfig, params["train"])
    with torch.device("meta"):
        bert = BertModel(BertConfig(), add_pooling_layer=False).eval()
        text = _forward(lambda: bert(input_ids=torch.zeros(1, CAPTION_TOKENS, dtype=torch.long)))
    runs: dict[str, list[float]] = {d: [] for d in PAPER_A}
    for recipe in cfg.recipes.values():
        n_rows = round(cfg.length_s[recipe.dataset] * LOGMEL_ROWS_PER_S) + 1
        with torch.device("meta"):
            encoder = ENCODERS[recipe.encoder]().eval()
            audio = _forward(partial(encoder, torch.empty(1, n_rows, 64)))
        runs[recipe.dataset].append(cfg.epochs * _passes(*PAPER_A[recipe.dataset]) * 3 * (audio + text))
    return [Work(f"train, {d}, on average", len(cfg.seeds) * len(f), sum(f) / len(f)) for d, f in runs.items()]


def _forward(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def hours(clips_per_second: float) -> None:
    """What presets/paper.yaml takes on one H100 at such a speed in whole clips, and at half of it."""
    params = read_params(ROOT / "presets/paper.yaml")
    paper_b = work_of_paper_b(params)
    of_clip = paper_b[0].flops / (params["pretrain"]["epochs"] * _passes(*AUDIOSET))
    rate, peak = clips_per_second * of_clip, PEAKS["H100"][1]
    print(
        f"presets/paper.yaml on one H100: {clips_per_second:,.0f} whole clips/s of {of_clip / 1e9:.1f} GFLOP are "
        f"{rate / 1e12:.0f} TFLOP/s, {100 * rate / peak:.0f} % MFU in bfloat16.\nValidation is counted; other stages, "
        "checkpoints and waiting are not.\n"
    )
    table(paper_b, {f"{100 * r / peak:.0f} % MFU": r for r in (rate, rate / 2)})
    guess = f"{FLOAT32 / 1e12:.0f} TFLOP/s"
    print(f"\nPANNs and BERT ({CAPTION_TOKENS} tokens a caption) in float32, where {guess} are a guess\n")
    table(work_of_paper_a(params), {guess: FLOAT32})


def table(works: list[Work], rates: Mapping[str, float]) -> None:
    """In Markdown, for docs/training.md."""
    heads = ["", "runs", "EFLOP a run", *(f"h a run at {r}" for r in rates), *(f"h in all at {r}" for r in rates)]
    print(f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}")
    for name, n_runs, flops in works:
        each = [f"{flops / r / 3600:.2f}" for r in rates.values()]
        in_all = [f"{n_runs * flops / r / 3600:.1f}" for r in rates.values()]
        print(f"| {' | '.join([name, str(n_runs), f'{flops / 1e18:.2f}', *each, *in_all])} |")
    in_all = [f"{sum(w.n_runs * w.flops for w in works) / r / 3600:.0f}" for r in rates.values()]
    print(f"| {' | '.join(['all', str(sum(w.n_runs for w in works)), *[''] * (1 + len(rates)), *in_all])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--preset", choices=SHAPES, help="default: world on a CPU, paper on a GPU")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--clips", type=int, help="how many clips a turn is timed on, at least")
    parser.add_argument("--rounds", type=int, default=interleaved.ROUNDS)
    parser.add_argument("--hours", action="store_true")
    parser.add_argument("--clips-per-second", type=float, default=2400.0)
    given = parser.parse_args()
    if given.hours:
        hours(given.clips_per_second)
        return
    device = torch.device(given.device)
    run(device, given.preset, given.batch, given.clips, given.rounds, on_gpu=device.type == "cuda")


def run(
    device: torch.device,
    preset: str | None,
    batches: list[int] | None,
    n_clips: int | None,
    rounds: int,
    on_gpu: bool,
) -> None:
    """Measure one batch after the other; on a CPU then the memory of the last one's contestants."""
    if not on_gpu:
        torch.set_num_threads(1)
    prepare(EAGER)
    torch._dynamo.config.automatic_dynamic_shapes = (
        False  # contestants of one tower differ in size; a run's steps do not
    )
    preset = preset or ("paper" if on_gpu else "world")
    batches = batches or {"world": [16, 128], "paper": [128, 512, 2048] if on_gpu else [4]}[preset]
    n_clips = n_clips or (2048 if on_gpu else {"world": 256, "paper": 4}[preset])
    gpu = torch.cuda.get_device_name(device) + ", " if on_gpu else ""
    print(f"{gpu}{interleaved.machine().rpartition(', one thread')[0]}, medians of {rounds}")
    peer = None
    for batch in batches:
        torch._dynamo.reset()
        who = contestants(batch, on_gpu)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(preset, batch, max(8 if on_gpu else 1, n_clips // batch), device, Path(folder))
            make(bench)
            peer = show(bench, play(bench, who, rounds, on_gpu), peer)
            if not on_gpu and batch == batches[-1]:
                print("  memory of two steps, each in a process of its own")
                for name in who:
                    if not name.startswith("a matrix product"):
                        print(f"  {name:<40} {alone(name, bench) / 1e9:6.2f} GB", flush=True)


if __name__ == "__main__":
    main()
