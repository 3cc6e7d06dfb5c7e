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
from harken.config import Config, Paths, parse
from harken.engines import Map
from harken.evaluation import metrics, protocols, significance
from harken.evaluation.passports import Passport
from harken.models.towers import AudioTower
from harken.progress import track
from harken.search import index
from harken.shards import atomic, code_version, digest_of, file_sha256, fingerprint, publish, read_table, write_json
from harken.stages.pretrain import VitConfig, build_tower, fbank_input
from harken.stages.train import ModelConfig, build_model
from harken.training.batches import Features
from harken.training.data import CaptionEmbeddings, ImageEmbeddings, captions_of
from harken.training.loop import fold
from harken.training.runs import device, devices, load_model, runs_in
from harken.training.tasks import Captions, FbankInput, TextToAudio, cosine_matrix, embed_clips
from harken.world.truth import Truth

log = logging.getLogger("harken")
CODE = ("stages/evaluate.py", "evaluation", "training", "models", "search")
STAGES = ("pretrain", "finetune", "train")


class EvaluateConfig(Config):
    """`zero_shot` names the captioned datasets that pretrained towers meet before fine-tuning; `ks` the k of R@k."""

    ks: list[int]
    n_resamples: int
    level: float
    images: list[Literal["mid", "max", "mean", "flatten"]]
    zero_shot: list[str]


class Job(Config):
    paths: Paths
    evaluate: EvaluateConfig
    marks: dict[str, str]


def run(paths: Paths, cfg: EvaluateConfig, map: Map) -> None:
    """Fill `paths.evaluations`: results.json, ranks.parquet, planted.json (if truth is planted) and search indices."""
    folders = dict(zip(STAGES, (paths.pretrained, paths.finetuned, paths.trained), strict=True))
    runs = {f"{s}/{r['run']}": r for s in STAGES for r in runs_in(folders[s])}
    data = [digest_of(paths.features), digest_of(paths.embeddings), file_sha256(paths.manifest / "clips.parquet")]
    data += [
        file_sha256(paths.embeddings / "captions.parquet"),
        file_sha256(paths.stats / "stats.json"),
        code_version(CODE),
    ]
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
    planted = {
        n: json.loads(p.read_text()) for n, f in zip(runs, done, strict=True) if (p := f / "planted.json").is_file()
    }
    write_json(work / "planted.json", planted)
    tables = [pq.read_table(f / "ranks.parquet") for f in done]
    if tables:
        with atomic(work / "ranks.parquet") as f:
            pq.write_table(pa.concat_tables(tables), f, compression="zstd", write_statistics=False)
    names = {n: n for n in ("results.json", "planted.json", "ranks.parquet") if (work / n).is_file()}
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
            _text_to_audio(paths, run_name, told, manifest, sheet)
        else:
            vit = parse(f"{name}: vit", VitConfig, told["vit"])
            tower = build_tower(paths, vit, told["n_segments"], told["seed"])
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
    audio, pictures = embed_clips(tower, read, ids, pooled=False).numpy(), images.of(ids).numpy()
    passport = Passport.of(dataset, "test", dict.fromkeys(ids, ()), len(listed))
    for protocol in sheet.cfg.images:
        sim = protocols.PROTOCOLS[protocol](audio if tower.n_segments > 1 else audio[:, 0], pictures)
        tasks = {"a2i": protocols.audio_to_image(sim), "i2a": protocols.image_to_audio(sim)}
        sheet.add(f"{told['recipe']} ({protocol})", passport, ids, tasks)
    if tower.n_segments == 1 and (paths.lists / "truth.json").is_file():
        train = [
            i for i in manifest.of(dataset, Split.TRAIN)["clip_id"].to_pylist() if i in images and i in read.features
        ]
        write_json(
            folder / "planted.json", planted(paths, train, embed_clips(tower, read, train, pooled=False)[:, 0], images)
        )


def planted(paths: Paths, ids: Sequence[str], audio: torch.Tensor, images: ImageEmbeddings) -> dict[str, float]:
    """How often the nearest image is a planted one, whose object sounds in the clip: over all clips that have one, and
    over the hard ones, where some image shows another object or none.
    """
    truth = Truth.read(paths.lists / "truth.json")
    times = dict(_image_times(paths))
    pictures = images.of(ids)
    cosine = torch.einsum(
        "cd,cld->cl", torch.nn.functional.normalize(audio, dim=-1), torch.nn.functional.normalize(pictures, dim=-1)
    )
    flags = [[bool(truth.image_is_right(i, t)) for t in times[i]] for i in ids]
    seen = [
        (f[best], sum(f) / len(f), all(f)) for f, best in zip(flags, cosine.argmax(1).tolist(), strict=True) if any(f)
    ]
    hard = [s for s in seen if not s[2]]

    def percent(part: list[tuple[bool, float, bool]], k: int) -> float:
        return 100 * sum(s[k] for s in part) / max(len(part), 1)

    return {
        "n_clips": len(seen),
        "chosen_right": percent(seen, 0),
        "random_right": percent(seen, 1),
        "n_hard": len(hard),
        "chosen_right_hard": percent(hard, 0),
        "random_right_hard": percent(hard, 1),
    }


def _image_times(paths: Paths) -> list[tuple[str, list[float]]]:
    table = read_table(paths.features, ["image_times_s"])
    return list(zip(table["clip_id"].to_pylist(), table["image_times_s"].to_pylist(), strict=True))


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
    audio = embed_clips(tower, read, captions.clip_ids, pooled=True)
    _add_texts(sheet, row, dataset, manifest, captions, cosine_matrix(texts, audio).numpy())
    if folder is not None:
        told = pa.array([[captions.texts[i] for i in of] for of in captions.of], pa.list_(pa.string()))
        index.build(captions.clip_ids, audio.numpy(), pa.table({"captions": told})).save(folder / "index")


def _add_texts(sheet: Sheet, row: str, dataset: str, manifest: Manifest, captions: Captions, sim: np.ndarray) -> None:
    told = {c: [captions.texts[i] for i in of] for c, of in zip(captions.clip_ids, captions.of, strict=True)}
    passport = Passport.of(dataset, "test", told, len(manifest.of(dataset, Split.TEST)))
    tasks = {
        "t2a": protocols.text_to_audio(sim, captions.clip_of),
        "a2t": protocols.audio_to_text(sim, captions.clip_of),
    }
    sheet.add(row, passport, captions.clip_ids, tasks)


def _text_to_audio(paths: Paths, run_name: str, told: dict[str, Any], manifest: Manifest, sheet: Sheet) -> None:
    model, bert = build_model(paths.weights, parse(f"{run_name}: model", ModelConfig, told["model"]))
    load_model(paths.trained, run_name, model)
    model.to(device())
    features, dataset = Features(paths.features, "logmel"), told["dataset"]
    captions = captions_of(manifest, dataset, Split.TEST, features, paths.features)
    task = TextToAudio(
        model,
        bert.tokenize,
        torch.mean,
        features,
        told["n_rows"],
        captions,
        captions,
        metrics.retrieval_metrics,
        device(),
    )
    _add_texts(sheet, told["recipe"], dataset, manifest, captions, task.similarity(captions))
