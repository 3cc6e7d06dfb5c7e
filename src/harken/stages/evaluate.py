"""Stage `evaluate`: every run on its test gallery, both directions, tie-safe, with intervals over clips and a passport.

Per-query ranks are kept: another lab's gallery, a projected gallery or a paired test needs nothing else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from harken.clips import Manifest, Split
from harken.config import Config, Paths
from harken.engines import Map
from harken.evaluation import agreement, grounding, metrics, protocols, significance
from harken.evaluation.passports import Passport
from harken.evaluation.tables import TRANSDUCTIVE
from harken.models.features import AudioFeatures
from harken.models.matching import nearest_images
from harken.models.scoring import score_matrix
from harken.models.towers import AudioTower, text_similarity
from harken.progress import track
from harken.search import index, text_aware
from harken.shards import atomic, code_version, digest_of, file_sha256, fingerprint, publish, read_table, write_json
from harken.stages.pretrain import FRAME_SHIFT_S, AtPool, build_tower, fbank_input, split_ids, tower_of
from harken.stages.train import Hearing, padding_of, trained_model
from harken.training.data import CaptionEmbeddings, ImageEmbeddings, captions_of
from harken.training.loop import fold
from harken.training.runs import device, devices, load_model, runs_in
from harken.training.tasks import Captions, FbankInput, TextToAudio, embed_clips
from harken.world.truth import Truth

log = logging.getLogger("harken")
CODE = (
    "stages/evaluate.py",
    "stages/pretrain.py",
    "stages/train.py",
    "stages/weights.py",
    "evaluation",
    "training",
    "models",
    "search",
    "world/truth.py",
    "world/records.py",
    "world/captions.py",
    "world/classes.py",
    "media/frames.py",
    "media/images.py",
    "media/quality.py",
)
STAGES = ("pretrain", "finetune", "train")
TABLES = ("ranks.parquet", "planted.parquet", "grounding.parquet")
PLANTED = {
    "clip_id": pa.string(),
    "chosen": pa.int32(),
    "is_right": pa.bool_(),
    "share_right": pa.float64(),
    "is_hard": pa.bool_(),
}


class EvaluateConfig(Config):
    """`zero_shot` names the captioned datasets that pretrained towers meet before fine-tuning, where they have several
    segments by `at_pool` (see FinetuneRecipe); `ks` the k of R@k. `prior_scale`: the ω of a row of its own, marked
    transductive, for every run of `train`; null: no such rows.
    """

    ks: list[int]
    n_resamples: int
    level: float
    images: list[Literal["mid", "max", "mean", "flatten"]]
    zero_shot: list[str]
    at_pool: AtPool
    prior_scale: float | None


class Job(Config):
    paths: Paths
    evaluate: EvaluateConfig
    marks: dict[str, str]


def run(paths: Paths, cfg: EvaluateConfig, map: Map) -> None:
    """Fill `paths.evaluations`: results.json, ranks.parquet and search indices; where truth is planted also
    planted.parquet, grounding.parquet and image_times.json.
    """
    folders = dict(zip(STAGES, (paths.pretrained, paths.finetuned, paths.trained), strict=True))
    # runs on imported frames need nothing of the stages before
    runs = {f"{s}/{r['run']}": r for s in STAGES if folders[s].is_dir() or s == "train" for r in runs_in(folders[s])}
    truth = paths.lists / "truth.json"
    data = [digest_of(f) if f.is_dir() else None for f in (paths.features, paths.embeddings)]
    files = (paths.manifest / "clips.parquet", paths.embeddings / "captions.parquet", paths.stats / "stats.json", truth)
    data += [file_sha256(f) if f.is_file() else None for f in files]
    data.append(code_version(CODE))
    marks = {}
    for name, told in runs.items():
        stage, run_name = name.split("/")
        marks[name] = fingerprint(
            cfg.model_dump(), told, file_sha256(folders[stage] / run_name / "model.safetensors"), data
        )
    work = paths.work / "evaluate"
    work.mkdir(parents=True, exist_ok=True)
    todo = [n for n in runs if not (_folder(work, n, marks[n]) / "results.json").is_file()]
    job = Job(paths=paths, evaluate=cfg, marks=marks)
    for _ in track(map(evaluator, job, todo, devices=devices()), len(todo), "evaluate: runs"):
        pass
    done = [_folder(work, n, marks[n]) for n in runs]
    write_json(work / "results.json", [r for f in done for r in json.loads((f / "results.json").read_text())])
    for name in TABLES:
        (work / name).unlink(missing_ok=True)
        if tables := [pq.read_table(f / name) for f in done if (f / name).is_file()]:
            with atomic(work / name) as f:
                pq.write_table(pa.concat_tables(tables), f, compression="zstd", write_statistics=False)
    names = {n: n for n in ("results.json", *TABLES) if (work / n).is_file()}
    if truth.is_file() and (pretrained := [r for n, r in runs.items() if n.startswith("pretrain/")]):
        write_json(work / "image_times.json", _image_times(paths, truth, pretrained[0]["vit"]["n_frames"]))
        names["image_times.json"] = "image_times.json"
    names |= {f"index/{n}": f"{f.name}/index" for n, f in zip(runs, done, strict=True) if (f / "index").is_dir()}
    publish(work, paths.evaluations, names)


def _folder(work: Path, name: str, mark: str) -> Path:
    return work / f"{name.replace('/', '.')}.{mark}"


def evaluator(job: Job) -> Callable[[str], str]:
    return partial(evaluate_run, job)


class Sheet:
    """The results and per-query ranks of one run as they are measured."""

    def __init__(self, stage: str, told: dict[str, Any], cfg: EvaluateConfig) -> None:
        self.stage, self.told, self.cfg = stage, told, cfg
        self.results: list[dict[str, Any]] = []
        self.ranks: list[pa.Table] = []

    def add(self, row: str, passport: Passport, clip_ids: Sequence[str], tasks: dict[str, protocols.Retrieval]) -> None:
        """Measure one protocol's directions on one gallery."""
        seed = self.told["seed"]
        result: dict[str, Any] = {
            "stage": self.stage,
            "recipe": row,
            "seed": seed,
            "dataset": passport.dataset,
            "split": passport.split,
            "n_clips": passport.n_present,
            "passport": str(passport),
            "metrics": {},
            "intervals": {},
            "chance": {},
        }
        for direction, task in tasks.items():
            found = metrics.ranks(task.scores, task.relevant)
            values = metrics.retrieval_metrics(task.scores, task.relevant, self.cfg.ks)
            result["metrics"][direction] = values
            n_relevant = np.array([len(r) for r in task.relevant])
            result["chance"][direction] = metrics.chance(task.scores.shape[1], n_relevant, self.cfg.ks)
            result["intervals"][direction] = {}
            for k in self.cfg.ks:
                rng = np.random.default_rng(fold(row, seed, direction, k))
                hits = 100 * found.hit(k)
                i = significance.bootstrap(
                    hits, task.clip, rng=rng, n_resamples=self.cfg.n_resamples, level=self.cfg.level
                )
                result["intervals"][direction][f"R@{k}"] = [i.low, i.high]
            n = len(found)
            columns: dict[str, Any] = {
                "stage": [self.stage] * n,
                "recipe": [row] * n,
                "seed": [seed] * n,
                "passport": [str(passport)] * n,
                "direction": [direction] * n,
                "query": np.arange(n),
                "clip_id": [clip_ids[c] for c in task.clip],
                "above": found.above,
                "tied": found.tied,
                "tied_relevant": found.tied_relevant,
                "n_relevant": found.n_relevant,
                "n_items": [found.n_items] * n,
            }
            self.ranks.append(pa.table(columns))
        self.results.append(result)


def evaluate_run(job: Job, name: str) -> str:
    """Measure one run and write its folder, results.json last."""
    stage, run_name = name.split("/")
    paths, cfg = job.paths, job.evaluate
    source = {"pretrain": paths.pretrained, "finetune": paths.finetuned, "train": paths.trained}[stage]
    told = next(r for r in runs_in(source) if r["run"] == run_name)
    sheet, folder = Sheet(stage, told, cfg), _folder(paths.work / "evaluate", name, job.marks[name])
    manifest = Manifest.read(paths.manifest)
    with torch.no_grad():
        if stage == "train":
            _text_to_audio(paths, told, manifest, sheet, folder)
        else:
            vit, side = tower_of(told, f"{source / run_name}/run.json", stage)
            tower = build_tower(paths, vit, side, told["seed"], at_pool=told.get("at_pool", cfg.at_pool))
            load_model(source, run_name, tower)
            tower.to(device())
            read = fbank_input(paths, vit, None)
            if stage == "pretrain":
                _audio_image(paths, tower, read, told, manifest, sheet, folder)
                for dataset in cfg.zero_shot:
                    _audio_text(paths, tower, read, told["recipe"] + " (zero-shot)", dataset, manifest, sheet, None)
            else:
                _audio_text(paths, tower, read, told["recipe"], told["dataset"], manifest, sheet, folder)
    with atomic(folder / "ranks.parquet") as f:
        pq.write_table(pa.concat_tables(sheet.ranks), f)
    write_json(folder / "results.json", sheet.results)
    return name


def _audio_image(
    paths: Paths,
    tower: AudioTower,
    read: FbankInput,
    told: dict[str, Any],
    manifest: Manifest,
    sheet: Sheet,
    folder: Path,
) -> None:
    """A-I and I-A on the test split under every image protocol; planted truth where there is any."""
    images, dataset = ImageEmbeddings(paths.embeddings), told["dataset"]
    listed = manifest.of(dataset, Split.TEST)["clip_id"].to_pylist()
    ids = [i for i in listed if i in images and i in read.features]
    audio, pictures = embed_clips(tower.segments, read, ids).numpy(), images.of(ids).numpy()
    passport = Passport.of(dataset, "test", dict.fromkeys(ids, ()), len(listed))
    for protocol in sheet.cfg.images:
        sim = protocols.PROTOCOLS[protocol](audio if tower.n_segments > 1 else audio[:, 0], pictures)
        tasks = {"a2i": protocols.audio_to_image(sim), "i2a": protocols.image_to_audio(sim)}
        sheet.add(f"{told['recipe']} ({protocol})", passport, ids, tasks)
    if tower.n_segments == 1 and (truth := paths.lists / "truth.json").is_file():
        train = _trained_on(paths, images)
        chosen = nearest_images(embed_clips(tower.segments, read, train)[:, 0], images.of(train))
        _write_planted(paths, truth, dict(zip(train, chosen.tolist(), strict=True)), told, folder)


def _write_planted(paths: Paths, truth: Path, chosen: dict[str, int], told: dict[str, Any], folder: Path) -> None:
    """planted.parquet: for every training clip that has a right image, what its nearest one is worth.

    Multiframe Match has no row here: it chooses no image, but trains on all of a clip's.
    """
    found = agreement.outcomes(Truth.read(truth), _taken(paths), chosen)
    columns: dict[str, Any] = {
        "stage": pa.array(["pretrain"] * len(found), pa.string()),
        "recipe": pa.array([told["recipe"]] * len(found), pa.string()),
        "seed": pa.array([told["seed"]] * len(found), pa.int64()),
    }
    for name, kind in PLANTED.items():
        columns[name] = pa.array([getattr(o, name) for o in found], kind)
    with atomic(folder / "planted.parquet") as f:
        pq.write_table(pa.table(columns), f)


def _image_times(paths: Paths, truth: Path, n_frames: int) -> dict[str, Any]:
    """What the rules for when to take images are worth on the clips that are trained on."""
    taken = _taken(paths)
    ids = _trained_on(paths, ImageEmbeddings(paths.embeddings))
    n_images = max((len(taken[i]) for i in ids), default=1)
    segment_s = n_frames / n_images * FRAME_SHIFT_S
    return agreement.image_times_report(Truth.read(truth), {i: taken[i] for i in ids}, segment_s)


def _trained_on(paths: Paths, images: ImageEmbeddings) -> list[str]:
    return [i for i in split_ids(paths)[0] if i in images]


def _taken(paths: Paths) -> dict[str, list[float]]:
    """When each clip's images were taken, in seconds from its start."""
    table = read_table(paths.features, ["image_times_s"])
    return dict(zip(table["clip_id"].to_pylist(), table["image_times_s"].to_pylist(), strict=True))


def _audio_text(
    paths: Paths,
    tower: AudioTower,
    read: FbankInput,
    row: str,
    dataset: str,
    manifest: Manifest,
    sheet: Sheet,
    folder: Path | None,
) -> None:
    captions = captions_of(manifest, dataset, Split.TEST, read.features, paths.features)
    texts = CaptionEmbeddings(paths.embeddings).of(captions, dataset, Split.TEST)
    audio = embed_clips(tower.pooled, read, captions.clip_ids)
    _add_texts(sheet, row, dataset, manifest, captions, text_similarity(texts, audio).numpy())
    # an index holds unit vectors, and of these the length counts: such a tower is measured, but not searched with
    if folder is not None and tower.at_pool != "flatten_repeat":
        index.build(captions.clip_ids, audio.numpy(), _said(captions)).save(folder / "index")


def _said(captions: Captions) -> pa.Table:
    """What a search shows of each clip."""
    told = [[captions.texts[i] for i in of] for of in captions.of]
    return pa.table({"captions": pa.array(told, pa.list_(pa.string()))})


def _add_texts(
    sheet: Sheet,
    row: str,
    dataset: str,
    manifest: Manifest,
    captions: Captions,
    sim: np.ndarray,
    prior_scale: float | None = None,
) -> None:
    told = {c: [captions.texts[i] for i in of] for c, of in zip(captions.clip_ids, captions.of, strict=True)}
    passport = Passport.of(dataset, "test", told, len(manifest.of(dataset, Split.TEST)))
    rows = {row: (sim, sim)}
    if prior_scale is not None:
        rows[f"{row} {TRANSDUCTIVE}"] = protocols.dual_softmax(sim, prior_scale)
    for name, (t2a, a2t) in rows.items():
        tasks = {
            "t2a": protocols.text_to_audio(t2a, captions.clip_of),
            "a2t": protocols.audio_to_text(a2t, captions.clip_of),
        }
        sheet.add(name, passport, captions.clip_ids, tasks)


def _text_to_audio(paths: Paths, told: dict[str, Any], manifest: Manifest, sheet: Sheet, folder: Path) -> None:
    (model, tokenize, spec), dataset = trained_model(paths, told), told["dataset"]
    model.to(device())
    hearing = Hearing.of(paths, told["length_s"], spec.recipe.encoder)
    captions = hearing.captions(manifest, dataset, Split.TEST)
    task = TextToAudio(
        model,
        tokenize,
        torch.mean,
        hearing.features,
        hearing.n_rows,
        captions,
        captions,
        metrics.retrieval_metrics,
        device(),
        padding=padding_of(spec),
    )
    clips, texts = task.clips(captions.clip_ids), task.texts(captions.texts)
    sim = model.score(texts, clips).float().cpu().numpy()
    _add_texts(sheet, told["recipe"], dataset, manifest, captions, sim, sheet.cfg.prior_scale)
    text_aware.save_run(folder / "index", model, captions.clip_ids, clips, _said(captions), told["frame_s"])
    truth = paths.lists / "truth.json"
    if truth.is_file() and told["frame_s"] is not None and hasattr(model.pooling, "attention"):
        found = _grounding(Truth.read(truth), task, captions.clip_ids, clips, told)
        with atomic(folder / "grounding.parquet") as f:
            pq.write_table(found, f)


def _grounding(
    truth: Truth, task: TextToAudio, clip_ids: Sequence[str], clips: AudioFeatures, told: dict[str, Any]
) -> pa.Table:
    """grounding.parquet: for every sound of the test clips, when a text-aware pooling hears it.

    Twice: by its attention's weights, and by how well each frame would meet the text alone, which is what it ranks by.
    """
    pooling = task.model.pooling

    def attention(i: int, sentences: list[str]) -> np.ndarray:
        attend: Callable[..., torch.Tensor] = pooling.attention  # type: ignore[assignment]  # TAP's and X-Pool's
        weights = attend(clips.frames[i : i + 1], clips.mask[i : i + 1], task.texts(sentences))[0]
        return weights.double().cpu().numpy()

    def alone(i: int, sentences: list[str]) -> np.ndarray:
        kept = clips.mask[i]
        frames = clips.frames[i][kept][:, None]
        sim = score_matrix(task.texts(sentences), frames, torch.ones_like(frames[..., 0], dtype=torch.bool), pooling)
        strips = sim.new_zeros(len(sentences), len(kept))
        strips[:, kept] = torch.softmax(sim / text_aware.TEMPERATURE, dim=-1)
        return strips.double().cpu().numpy()

    heard_s = [min(truth[c].end_s - truth[c].start_s, told["length_s"]) for c in clip_ids]
    tables = []
    for recipe, strip_of in ((told["recipe"], attention), (f"{told['recipe']} (each frame alone)", alone)):
        columns = grounding.outcomes(truth, clip_ids, heard_s, told["frame_s"], strip_of)
        about = {"stage": "train", "recipe": recipe, "seed": told["seed"], "dataset": told["dataset"]}
        tables.append(grounding.table(columns, **about))
    return pa.concat_tables(tables)
