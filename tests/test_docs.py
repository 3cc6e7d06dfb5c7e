"""What the docs name exists (paths, commands, params, variables, reasons), what they show parses, presets are whole."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer.main

from harken import attempts
from harken.clips import SCHEMA, Clip, Manifest, Source, Split
from harken.config import Paths, parse, read_params
from harken.datasets import DATASETS
from harken.media.importing import INDEX, LAYOUTS
from harken.media.reasons import POLICIES, REASONS, group
from harken.stages import STAGES, config_class

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "src/README.md", ROOT / "data/README.md"])
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
# what a reader provides or a tool makes: named in the docs, absent from a fresh clone
PROVIDED = ("local/", "data/clotho/source", "data/checkpoints", ".work", ".venv", "params.before-preset.yaml")
EXTENSIONS = (
    ".py",
    ".md",
    ".yaml",
    ".toml",
    ".txt",
    ".csv",
    ".json",
    ".parquet",
    ".npy",
    ".png",
    ".html",
    ".safetensors",
)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
ENV = re.compile(r"\bHARKEN_[A-Z_]+\b")


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def spans(path: Path) -> list[str]:
    return SPAN.findall(BLOCK.sub("", text(path)))


def blocks(path: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(text(path)) if found == language]


def commands(path: Path) -> Iterator[str]:
    """Every command line that a page shows: lines of bash blocks, and code spans."""
    for body in blocks(path, "bash"):
        yield from body.splitlines()
    yield from spans(path)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", DOCS, ids=name_of)
presets = pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)


@pytest.fixture(scope="module")
def params() -> dict[str, dict[str, Any]]:
    return {p.stem: read_params(p) for p in PRESETS}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(text(page)):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)}: {target}"


@pages
def test_paths_exist_or_are_some_presets_outs(page: Path, params: dict[str, dict[str, Any]]) -> None:
    outs = tuple(folder for p in params.values() for folder in p["paths"].values())
    bases = (ROOT, page.parent, ROOT / "src")
    for span in spans(page):
        looks_like = re.fullmatch(r"(?:\.\./|\.)?[\w-]+(?:/[\w.-]+)+/?|[\w-]+\.(?:py|md|yaml|toml|txt)", span)
        if not looks_like or span.startswith(PROVIDED):
            continue
        known = any((base / span).exists() for base in bases)
        known |= span.rstrip("/").startswith(outs) or span.split("/")[0] in ("features", "media", "index", "host")
        known |= span in ("report.md", "batch/256") or span.startswith(
            ("ViT-B-32-quickgelu/", ".dvc/")
        )  # a name in a folder, or no path
        assert known, f"{name_of(page)}: `{span}`"


@pages
def test_commands_and_targets_exist(page: Path) -> None:
    from harken.cli import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([a-z]+):", text(ROOT / "Makefile"), re.M))
    for line in commands(page):
        if found := re.match(r"(?:\.venv/bin/)?harken ([\w-]+)", line):
            assert found[1] in known, f"{name_of(page)}: {line}"
            options = {o for p in known[found[1]].params for o in p.opts} | {"--help"}
            assert set(re.findall(r"(?<= )--?[a-z][\w-]*", line)) <= options, f"{name_of(page)}: {line}"
        if found := re.match(r"make (\w+)", line):
            assert found[1] in targets, f"{name_of(page)}: {line}"
        if found := re.match(r"(?:dvc repro|dvc repro --single-item|python -m pipelines\.repro) ([a-z]+)", line):
            assert found[1] in STAGES, f"{name_of(page)}: {line}"


def test_every_command_is_in_the_readme() -> None:
    from harken.cli import app

    for command in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"`harken {command}" in text(ROOT / "README.md"), command


@pages
def test_params_keys_exist(page: Path, params: dict[str, dict[str, Any]]) -> None:
    for span in spans(page):
        key = span.partition(":")[0].strip()
        if key.split(".")[0] not in ("paths", *STAGES) or "." not in key or key.endswith(EXTENSIONS):
            continue
        assert re.fullmatch(r"[\w.]+", key), f"{name_of(page)}: `{span}`"
        assert any(_has(p, key.split(".")) for p in params.values()), f"{name_of(page)}: `{span}`"


def _has(node: Any, keys: list[str]) -> bool:
    if not keys:
        return True
    return isinstance(node, dict) and keys[0] in node and _has(node[keys[0]], keys[1:])


def sources() -> str:
    return "".join(text(p) for folder in ("src", "pipelines") for p in (ROOT / folder).rglob("*.py"))


@pages
def test_environment_variables_exist(page: Path) -> None:
    known = sources()
    for name in set(ENV.findall(text(page))):
        assert name in known, f"{name_of(page)}: {name}"


def test_every_environment_variable_is_in_the_readme() -> None:
    internal = {"HARKEN_TOLD", "HARKEN_LAUNCHER", "HARKEN_RAY_OWN"}  # from harken to the processes that it starts
    assert set(ENV.findall(sources())) - internal <= set(ENV.findall(text(ROOT / "README.md")))


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pages
def test_bash_blocks_parse(page: Path) -> None:
    for body in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=body, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{name_of(page)}: {done.stderr}\n{body}"


@pages
def test_example_lists_are_what_the_readers_take(page: Path, tmp_path: Path) -> None:
    for body in blocks(page, "csv"):
        header = next(line for line in body.splitlines() if not line.startswith("# S"))
        dataset = {"audiocap_id": "audiocaps", "file_name": "clotho"}.get(header.split(",")[0], "audioset")
        path = tmp_path / "list.csv"
        path.write_text(body)
        n_rows = len([line for line in body.splitlines() if not line.startswith(("#", "audiocap_id", "file_name"))])
        assert len(list(DATASETS[dataset].clips(path, split="train"))) == n_rows


def test_the_audit_page_names_real_reasons_in_their_groups() -> None:
    rows = [
        line.split("|")[1:4] for line in text(ROOT / "docs/audit.md").splitlines() if re.match(r"\| [a-z]+ \|", line)
    ]
    found = {cells[0].strip(): SPAN.findall(cells[2]) for cells in rows if SPAN.findall(cells[2])}
    assert set(found) == {group(code) for code in REASONS}
    for name, codes in found.items():
        for code in codes:
            assert code in REASONS, code
            assert group(code) == name, code


def _span(seconds: float) -> str:
    found = next((f"{seconds / n:g} {u}" for u, n in (("d", 86_400), ("h", 3600), ("min", 60)) if seconds >= n), None)
    return found or f"{seconds:g} s"


def _policy_cells(policy: attempts.Policy) -> tuple[str, ...]:
    verdict = "passes" if policy.is_counted else "says nothing of the clip"
    if policy.confirmations:
        verdict = "at once"
    if policy.confirmations > 1:
        verdict = f"seen {policy.confirmations} times, {_span(policy.gap_s)} apart"
    is_limited = policy.is_counted and not policy.confirmations
    at_most = str(policy.max_attempts) if is_limited else "-"
    due = "-" if policy.recheck_s is None else _span(policy.recheck_s)
    return policy.group, verdict, ", ".join(map(_span, policy.delays_s)) or "-", at_most, due


def policy_table() -> str:
    """The table of docs/acquisition.md: the reasons of one policy on a line, in the order of POLICIES."""
    codes: dict[tuple[str, ...], list[str]] = {}
    for code, policy in POLICIES.items():
        codes.setdefault(_policy_cells(policy), []).append(f"`{code}`")
    rows = [("reasons", "group", "verdict", "waits", "at most", "due"), ("---",) * 6]
    rows += [(", ".join(named), *cells) for cells, named in codes.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_table_of_policies_is_what_the_code_does() -> None:
    found = re.search(r"<!-- policies -->\n(.*?)<!-- /policies -->", text(ROOT / "docs/acquisition.md"), re.S)
    assert found is not None
    assert found[1] == policy_table()


def test_the_guide_names_every_state_and_layout() -> None:
    assert set(attempts.STATES) <= set(spans(ROOT / "docs/acquisition.md"))
    assert set(LAYOUTS) <= set(spans(ROOT / "docs/own-media.md"))


def _report_keys() -> set[str]:
    """Every key of a report that has something to say of everything."""
    from harken.audit.observations import Observation
    from harken.audit.rates import audit
    from harken.evaluation.passports import passport_of

    ids = [f"{i:011d}" for i in range(40)]
    clips = [
        Clip(f"yt:{k}:0-10000", "audioset", Split.TEST, Source("youtube", k), 0.0, 10.0, ("a dog", "a cat"), ("/m/1",))
        for k in ids
    ]
    failed = [i % 2 for i in range(40)]
    ledger = pd.DataFrame(
        {
            "clip_id": [c.id for c in clips],
            "status": ["failed" if f else "ok" for f in failed],
            "reason": ["gone.private" if f else "" for f in failed],
            "message": "",
        }
    )
    observed = [Observation.of("A", "2020", "", "audioset", "test", ids[:30])]
    report = audit(
        Manifest.build(clips, 1).table, ledger, group, observations=observed, previous=ledger, passport=passport_of
    )
    split = report["splits"][0]
    assert None not in (split["words"], split["since_when"], report["drift"])
    parts = (report, split, report["drift"], report["observations"][0], split["words"], split["since_when"])
    parts += (split["rates"]["usable"], split["rates"], split["labels"][0], split["passport"], split["sensitivity"])
    parts += (report["unmapped"], report["observations"][0]["agreement"], split["since_when"]["curve"][0])
    return {key for part in parts for key in part}


def test_the_data_dictionary_has_every_column() -> None:
    from harken.audit.observations import SCHEMA as OBSERVED
    from harken.media.importing import _INDEX_SCHEMA
    from harken.media.lanes import Acceptance
    from harken.stages import download, extract
    from harken.takedown import Tombstone

    visits = attempts.fold(attempts.SCHEMA.empty_table().select(attempts.FOLD_COLUMNS), POLICIES, 0)
    words = set(SPAN.findall(text(ROOT / "data/README.md")))
    for name in (
        *SCHEMA.names,
        *download.COLUMNS,
        download.VISITS,
        *visits.columns,
        *attempts.SCHEMA.names,
        *attempts.STATES,
        *attempts.STEPS,
        "reason_then",
        *Tombstone.__dataclass_fields__,
        *Acceptance.__dataclass_fields__,
        *OBSERVED.names,
        INDEX,
        *_INDEX_SCHEMA.names,
        *_report_keys(),
        *extract.COLUMNS,
        "fbank_start",
        "logmel_rows",
        "status",
        "reason",
        "message",
    ):
        assert name in words, name
    for folder in parse("params.yaml: paths", Paths, read_params(ROOT / "params.yaml")["paths"]):
        assert any(w.rstrip("/").startswith(str(folder[1])) for w in words), folder


def test_the_readme_has_a_place_for_the_table() -> None:
    assert re.search(r"<!-- results -->.*<!-- /results -->", text(ROOT / "README.md"), re.S)


def test_params_yaml_is_the_preset_world() -> None:
    assert (ROOT / "presets/world.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_the_readme_names_every_preset() -> None:
    for preset in PRESETS:
        assert f"| `{preset.stem}` |" in text(ROOT / "README.md"), preset.stem


@presets
def test_a_preset_is_whole_and_its_recipes_load(preset: Path) -> None:
    import torch

    from harken.models.matching import MATCHES
    from harken.stages import train
    from harken.training.optim import build

    found = read_params(preset)
    assert list(found) == ["paths", *STAGES]
    parse(f"{preset.name}: paths", Paths, found["paths"])
    cfg: dict[str, Any] = {s: parse(f"{preset.name}: {s}", config_class(s), found[s]) for s in STAGES}
    for name, recipe in cfg["train"].recipes.items():
        train.check(name, recipe, cfg["train"])
        assert recipe.dataset in cfg["catalog"].lists, name
    for recipe in cfg["pretrain"].recipes.values():
        if recipe.match != "imported":
            MATCHES[recipe.match](**recipe.model_dump(exclude={"match", "division"}))
    for name, recipe in cfg["finetune"].recipes.items():
        assert recipe.start in cfg["pretrain"].recipes, name
    assert set(cfg["finetune"].seeds) <= set(cfg["pretrain"].seeds)
    for stage in ("pretrain", "finetune", "train"):
        build(cfg[stage].optimizer, torch.nn.Linear(2, 2), 64, 10, cfg[stage].epochs)
    lists = {name for splits in cfg["catalog"].lists.values() for name in splits.values()}
    if cfg["lists"].world is None:
        assert lists <= set(cfg["lists"].files)
    assert cfg["stats"].dataset in cfg["catalog"].lists
    assert {"youtube", "zenodo"} >= set(cfg["download"].fetch)
    assert {*cfg["stats"].exclude, *cfg["evaluate"].zero_shot, *cfg["download"].needs_images} <= set(
        cfg["catalog"].lists
    )


@presets
def test_official_hashes_are_the_cards(preset: Path) -> None:
    official = {f.url: f for d in DATASETS.values() for f in d.card.files}
    for name, file in read_params(preset)["lists"]["files"].items():
        if "://" not in file["source"]:
            continue
        assert file["source"] in official, f"{name}: {file['source']} is on no card"
        card, (kind, digest) = official[file["source"]], file["checksum"].split(":")
        assert digest == getattr(card, kind) or not getattr(card, kind), name


def test_presets_share_no_folder(params: dict[str, dict[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for name, found in params.items():
        for folder in found["paths"].values():
            assert seen.setdefault(folder, name) == name, folder
            assert f"/{name}" in folder


def test_constraints_are_names_and_versions_only() -> None:
    for line in text(ROOT / "constraints.txt").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+", line), line


def test_the_changelog_names_every_stage() -> None:
    words = re.findall(r"[a-z]+", text(ROOT / "CHANGELOG.md"))
    assert [s for s in STAGES if s not in words] == []
    assert len(STAGES) == 13, "the changelog says thirteen"
