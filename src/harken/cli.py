"""`harken`: for people. Stages are run by DVC; this tells what happened, what is wrong and what to do."""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from harken import __version__, acquire, observe
from harken.config import FOLDERS, Config, Paths, load, params_path, read_params
from harken.engines import n_cores
from harken.errors import ConfigError, DataError, HarkenError, unknown
from harken.stages import STAGES, config_class

app = typer.Typer(
    help="Find the sound a sentence describes, and the sentence that describes a sound.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(acquire.app)
out = Console()
PRESETS = Path("presets")
LEDGERS = ("download", "extract", "embed")
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]


def main() -> None:
    """The entry point: a HarkenError is a message on stderr and exit status 1, never a trace."""
    try:
        app()
    except HarkenError as e:
        print(f"harken: {e}", file=sys.stderr)
        sys.exit(1)


def _version(value: bool) -> bool:
    if value:
        print(f"harken {__version__}")
        raise typer.Exit
    return value


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Run from the project's root."""


@app.command(epilog="Example: harken status --watch")
def status(
    timings: Annotated[bool, typer.Option("--timings", help="What the last runs took instead.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="What goes on now, every second, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Every stage of the current preset: done or not; how many clips are ok or failed, and why; how many are doubtful.

    Doubtful clips are ok and have a flag (silent, clipped, short, black, frozen, mismatch), by the bounds that
    `extract` ran with; `leave_out` of `stats`, `finetune` and `train` keeps them from training.
    """
    if timings and watch:
        raise ConfigError("status: --timings and --watch are two views. Ask for one of them.")
    paths = load("paths", Paths)
    if timings:
        observe.show_timings(paths, as_json)
        return
    if watch:
        observe.watch(paths, as_json)
        return
    rows = [_stage_status(s, paths) for s in STAGES]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("stage", "state", "ok", "failed", "why", "flags", box=None, header_style="bold")
    for r in rows:
        why, flags = (", ".join(f"{k} {n:,}" for k, n in r[c].items()) for c in ("reasons", "flags"))
        numbers = [f"{r[k]:,}" if r[k] is not None else "" for k in ("ok", "failed")]
        table.add_row(r["stage"], r["state"], *numbers, why, flags)
    out.print(table)


def _stage_status(stage: str, paths: Paths) -> dict[str, Any]:
    from harken.media import quality
    from harken.shards import OK, ledger

    folder: Path = getattr(paths, FOLDERS[stage])
    row: dict[str, Any] = {"stage": stage, "folder": str(folder), "ok": None, "failed": None, "reasons": {}}
    row["flags"] = {}
    row["state"] = observe.state(stage, paths)
    if stage == "download" and row["state"] != "done":
        asked = acquire.state_of(paths)
        failed = asked[asked["reason"] != ""]
        if len(asked):
            row["state"] = "running" if row["state"] == "running" else "begun"
            row["ok"], row["failed"] = int((asked["state"] == OK).sum()), len(failed)
            row["reasons"] = {str(k): int(n) for k, n in failed["reason"].value_counts().items()}
    if stage in LEDGERS and row["state"] == "done":
        table = ledger(folder)
        reasons = Counter(r for r in table["reason"].to_pylist() if r)
        row["ok"] = sum(s == OK for s in table["status"].to_pylist())
        row["failed"] = len(table) - row["ok"]
        row["reasons"] = dict(reasons.most_common())
    if stage == "extract" and row["state"] == "done":
        row["flags"] = {flag: n for flag, n in quality.counts(folder).items() if n}
    return row


@app.command(epilog="Example: harken preset local --dry-run")
def preset(
    name: Annotated[str | None, typer.Argument(help="The preset to switch to; none lists them.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the difference only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how a preset differs from params.yaml, and switch to it. Presets keep their data apart."""
    known = {p.stem: p for p in sorted(PRESETS.glob("*.yaml"))}
    if not known:
        raise DataError(f"{PRESETS}: no presets here. Run from the project's root.")
    current = params_path()
    text = current.read_text() if current.is_file() else ""
    active = [n for n, p in known.items() if p.read_text() == text]
    if name is None:
        if as_json:
            print(json.dumps({"presets": list(known), "active": active}))
            return
        for n in known:
            out.print(f"{'*' if n in active else ' '} {n}")
        return
    if name not in known:
        raise unknown("preset", name, known)
    _check_preset(known[name])
    wanted = known[name].read_text()
    lines = list(
        difflib.unified_diff(text.splitlines(), wanted.splitlines(), "params.yaml", str(known[name]), lineterm="")
    )
    if as_json:
        print(json.dumps({"preset": name, "switched": not dry_run, "difference": lines}))
    else:
        for line in lines:
            out.print(
                line, style="green" if line.startswith("+") else "red" if line.startswith("-") else None, markup=False
            )
    if dry_run:
        return
    if text and not active:
        kept = current.with_name("params.before-preset.yaml")
        shutil.copyfile(current, kept)  # edits that no preset holds are the user's work
        print(f"Your edited {current} is kept as {kept}.", file=sys.stderr)
    current.write_text(wanted)
    if not as_json:
        out.print(f"Switched to {name}. Next: make repro" if lines else f"{name} is what params.yaml says already.")


def _check_preset(path: Path) -> None:
    from harken.config import parse

    params = read_params(path)
    sections: dict[str, type[Config]] = {"paths": Paths, **{s: config_class(s) for s in STAGES}}
    for section, cls in sections.items():
        if section not in params:
            raise ConfigError(f"{path}: section {section!r} is missing.")
        parse(f"{path}: {section}", cls, params[section])


@app.command(epilog="Example: harken doctor")
def doctor(as_json: AsJson = False) -> None:
    """Check this machine and params.yaml before a long run. Exit status 1 if something must be mended first."""
    checks = [*_check_machine(), *_check_params()]
    if as_json:
        print(json.dumps(checks, indent=1))
    else:
        for c in checks:
            mark = {"ok": "[green]ok[/]  ", "note": "[yellow]note[/]", "bad": "[red]bad[/] "}[c["state"]]
            out.print(f"{mark} {c['what']}: {c['found']}")
    if any(c["state"] == "bad" for c in checks):
        raise typer.Exit(1)


def _finding(state: str, what: str, found: str) -> dict[str, str]:
    return {"state": state, "what": what, "found": found}


def _check_machine() -> list[dict[str, str]]:
    version = ".".join(map(str, sys.version_info[:3]))
    checks = [_finding("ok" if (3, 11) <= sys.version_info < (3, 14) else "bad", "Python", version)]
    for package in ("torch", "av", "open_clip_torch", "yt-dlp", "dvc", "pyarrow"):
        try:
            checks.append(_finding("ok", package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(_finding("bad", package, "not installed; run make repro, or pip install harken"))
    beside = Path(sys.executable).with_name("deno")
    js = shutil.which("deno") or (str(beside) if beside.is_file() else None)
    checks.append(_finding("ok" if js else "note", "JavaScript runtime", js or "none; YouTube needs `yt-dlp[deno]`"))
    dvc = shutil.which("dvc")
    checks.append(
        _finding("ok" if dvc else "note", "dvc on PATH", dvc or "no; activate the environment or use make repro")
    )
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    checks.append(_finding("ok" if gpus else "note", "GPU", ", ".join(gpus) or "none; training runs on the CPU"))
    checks.append(_finding("ok", "cores", str(n_cores())))
    free = shutil.disk_usage(".").free / 2**30
    checks.append(_finding("ok" if free > 5 else "bad", "free disk", f"{free:.0f} GiB"))
    return checks


def _check_params() -> list[dict[str, str]]:
    checks = []
    try:
        params = read_params()
        known = {"paths", *STAGES}
        for extra in params.keys() - known:
            raise unknown(f"{params_path()}: section", extra, known)
        load("paths", Paths)
        for stage in STAGES:
            load(stage, config_class(stage))
        checks.append(_finding("ok", str(params_path()), "every section is complete"))
    except HarkenError as e:
        checks.append(_finding("bad", str(params_path()), str(e)))
    return checks


@app.command(epilog='Example: harken search "a dog barks, then a bell rings"')
def search(
    sentence: Annotated[str, typer.Argument(help="What the sound is like.")],
    run: Annotated[str | None, typer.Option(help="A run of finetune or train; the first one if not given.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many clips.")] = 5,
    as_json: AsJson = False,
) -> None:
    """The clips of the test gallery that sound most like a sentence, by a run of finetune or train.

    Where the run reads a clip by the text, each hit has a strip over time: how well each frame alone fits the sentence.
    """
    from harken.search import index, query, text_aware
    from harken.search.folder import is_text_aware

    if not sentence.strip():
        raise ConfigError('the sentence is empty. Say what to look for, e.g. "a dog barks".')
    paths = load("paths", Paths)
    root = paths.evaluations / "index"
    folders = [f for stage in ("finetune", "train") for f in sorted((root / stage).glob("*"))]
    times = Counter(f.name for f in folders)
    known = {f.name if times[f.name] == 1 else f"{f.parent.name}/{f.name}": f for f in folders}
    if not known:
        raise DataError(f"{root}: no index. Run `dvc repro evaluate` with at least one finetune or train recipe first.")
    if run is not None and run not in known:
        raise unknown(f"{root}: runs", run, known)
    folder = known[run or next(iter(known))]
    text = _clip_text(paths, sentence) if folder.parent.name == "finetune" else _run_text(paths, folder.name, sentence)
    frame_s: float | None = None
    hits: Sequence[query.Hit]
    if is_text_aware(folder):
        found = text_aware.load(folder)
        hits, frame_s = text_aware.search(found, text, k), found.frame_s
    else:
        hits = query.search(index.load(folder), text, k)
    if as_json:
        print(json.dumps([_told(h, frame_s) for h in hits], indent=1))
        return
    for h in hits:
        out.print(f"{h.score:6.3f}  {h.clip_id}  {h.captions[0] if h.captions else ''}", markup=False, soft_wrap=True)
        if isinstance(h, text_aware.TimedHit):
            out.print(" " * 8 + text_aware.strip(h.alone, frame_s), markup=False, highlight=False, soft_wrap=True)


def _clip_text(paths: Paths, sentence: str) -> Any:
    """The sentence by CLIP's text tower, as runs of finetune were trained with."""
    from harken.models import clip
    from harken.stages.embed import EmbedConfig
    from harken.stages.weights import load_clip

    prompt = load("embed", EmbedConfig).prompt
    return clip.text_embeddings(load_clip(paths.weights), [prompt + sentence]).numpy()[0]


def _run_text(paths: Paths, run: str, sentence: str) -> Any:
    """The sentence by the text tower of a run of train."""
    import torch

    from harken.stages.train import trained_model
    from harken.training.runs import runs_in

    told = {r["run"]: r for r in runs_in(paths.trained)}
    if run not in told:
        raise unknown(f"{paths.trained}: runs", run, told)
    model, tokenize, _ = trained_model(paths, told[run])
    with torch.inference_mode():
        return model.encode_text(tokenize([sentence])).numpy()[0]


def _told(hit: Any, frame_s: float | None) -> dict[str, Any]:
    told = {"clip_id": hit.clip_id, "score": hit.score, "captions": list(hit.captions)}
    if hasattr(hit, "weights"):
        told |= {"weights": list(hit.weights), "alone": list(hit.alone), "frame_s": frame_s}
    return told


@app.command(epilog="Example: harken vipant bimodal_16x24_00071478.pth")
def vipant(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that VIP-ANT's code wrote (.pth).")],
    as_json: AsJson = False,
) -> None:
    """What a VIP-ANT checkpoint holds, and whether it fits `pretrain.vit`; nothing that it names is run.

    To fine-tune and evaluate it, name it in `pretrain.recipes`: `official: {match: imported, checkpoint: PATH}`.
    """
    from harken.models.vipant import convert, read_vipant
    from harken.stages.pretrain import PretrainConfig

    vit, found = load("pretrain", PretrainConfig).vit, read_vipant(checkpoint)
    convert(found, vit.n_frames, vit.stride)
    facts = {**found.facts, "logit_scale": found.logit_scale}
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for key, value in facts.items():
        print(f"{key:<16}  {', '.join(value) if isinstance(value, list) else value}")  # a hash stays on its line


@app.command(
    "import-frames", epilog="Example: harken import-frames laion.parquet --into data/frames/laion --frame-s 0.32"
)
def import_frames(
    source: Annotated[Path, typer.Argument(help="A Parquet file or a folder of them, a folder of .npy, or an .npz.")],
    into: Annotated[Path, typer.Option(help="The folder to fill; an earlier import in it is replaced.")],
    texts: Annotated[Path | None, typer.Option(help="A Parquet file of the captions' embeddings.")] = None,
    frame_s: Annotated[float | None, typer.Option(help="Seconds from one frame to the next.")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or float32: how frames are kept.")] = "float16",
    as_json: AsJson = False,
) -> None:
    """Take in the frames that another encoder made of the clips, and train on them: prints the recipe to do so."""
    from harken.clips import Manifest
    from harken.media import frames

    paths = load("paths", Paths)
    manifest = Manifest.read(paths.manifest) if (paths.manifest / "clips.parquet").is_file() else None
    known = None if manifest is None else set(manifest.table["clip_id"].to_pylist())
    found = frames.import_frames(source, into, dtype=dtype, frame_s=frame_s, texts=texts, known=known)
    splits = [] if manifest is None else frames.coverage(into, manifest)
    recipe = frames.recipe(found, splits)
    if as_json:
        print(json.dumps({**found.to_dict(), "splits": splits, "recipe": recipe}, indent=1))
        return
    for line in frames.describe(found, splits):
        out.print(line, markup=False, soft_wrap=True)
    print(f"Next, in params.yaml, a line of train.recipes; then `dvc repro`:\n{recipe}")  # on one line, to be copied


if __name__ == "__main__":
    main()
