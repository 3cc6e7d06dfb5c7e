"""`harken` for people: facts as tables and as JSON, messages instead of traces, exit status 0 only on success."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from harken import __version__
from harken.cli import app, main
from harken.clips import Clip, Manifest, Source, Split, youtube_id
from harken.config import FOLDERS, Paths, load
from harken.shards import ShardWriter, file_sha256
from harken.stages import STAGES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "params.yaml").read_text()
AUDIT = TEXT[TEXT.index("\naudit:") : TEXT.index("\nextract:")]
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def keys(n: int) -> list[str]:
    return [f"video{i:06d}" for i in range(n)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's root in which `download` has run and `extract` has begun."""
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARKEN_PARAMS", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    paths = load("paths", Paths)
    clips = [
        Clip(youtube_id(k, 0, 10), "audioset", Split.TEST if i % 2 else Split.TRAIN, Source("youtube", k), 0.0, 10.0)
        for i, k in enumerate(keys(6))
    ]
    paths.manifest.mkdir(parents=True)
    pq.write_table(Manifest.build(clips, 1).table, paths.manifest / "clips.parquet")
    with ShardWriter(paths.media, 0, fingerprint="f", columns={"media": pa.binary()}) as out:
        for i, clip in enumerate(clips):
            if i < 3:
                out.write(clip.id, media=b"x")
            else:
                out.skip(clip.id, "gone.private" if i < 5 else "qc.silent", "as the host said")
    (paths.lists / "audioset").mkdir(parents=True)
    (paths.lists / "audioset/class_labels_indices.csv").write_text('index,mid,display_name\n0,/m/1,"Bark, woof"\n')
    (paths.work / "extract").mkdir(parents=True)
    (paths.work / "extract" / "00000.parquet").touch()
    return tmp_path


def say(*args: str) -> str:
    """What a command prints that must succeed."""
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    """The message of a command that must fail, through the entry point that people call."""
    monkeypatch.setattr("sys.argv", ["harken", *args])
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("harken: ")
    assert "Traceback" not in shown.err
    return shown.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    text = say(command, "--help")
    assert "Example: harken" in text
    assert "--json" in text


def test_the_version_is_told() -> None:
    assert say("--version") == f"harken {__version__}\n"


def test_every_stage_has_its_folder() -> None:
    assert sorted(FOLDERS.values()) == sorted(set(Paths.model_fields) - {"work", "ledger", "visits"})


def test_status_tells_what_is_done_and_why_clips_failed(project: Path) -> None:
    rows = {r["stage"]: r for r in json.loads(say("status", "--json"))}
    assert tuple(rows) == STAGES
    assert {n: r["state"] for n, r in rows.items() if r["state"] != "not run"} == {
        "lists": "done",
        "catalog": "done",
        "download": "done",
        "extract": "begun",
    }
    assert (rows["download"]["ok"], rows["download"]["failed"]) == (3, 3)
    assert rows["download"]["reasons"] == {"gone.private": 2, "qc.silent": 1}
    assert rows["extract"]["ok"] is None
    table = say("status")
    assert "gone.private 2, qc.silent 1" in table
    assert "begun" in table


def test_audit_tells_the_rates(project: Path) -> None:
    found = json.loads(say("audit", "--json"))
    splits = {(s["dataset"], s["split"]): s for s in found["splits"]}
    assert splits["audioset", "train"]["groups"]["ok"] == 2
    assert splits["audioset", "test"]["n_total"] == 3
    assert "gone.private" in say("audit")


def test_presets_are_listed(project: Path) -> None:
    found = json.loads(say("preset", "--json"))
    assert found["presets"] == sorted(p.stem for p in (ROOT / "presets").glob("*.yaml"))
    assert all(n in say("preset") for n in found["presets"])


def test_a_dry_run_changes_nothing(project: Path) -> None:
    before = Path("params.yaml").read_bytes()
    said = json.loads(say("preset", "clotho", "--dry-run", "--json"))
    assert said["switched"] is False
    assert any(line.startswith("+") for line in said["difference"])
    assert "+++ presets/clotho.yaml" in say("preset", "clotho", "--dry-run")
    assert Path("params.yaml").read_bytes() == before


def test_a_switch_keeps_what_the_user_wrote(project: Path) -> None:
    edited = Path("params.yaml").read_text() + "# mine\n"
    Path("params.yaml").write_text(edited)
    assert "Switched to clotho" in say("preset", "clotho")
    assert Path("params.yaml").read_bytes() == Path("presets/clotho.yaml").read_bytes()
    assert Path("params.before-preset.yaml").read_text() == edited
    assert json.loads(say("preset", "--json"))["active"] == ["clotho"]
    assert "already" in say("preset", "clotho")
    Path("params.before-preset.yaml").unlink()
    say("preset", "world")  # nothing of the user's is lost now
    assert not Path("params.before-preset.yaml").exists()


def test_doctor_finds_params_complete(project: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    checks = {c["what"]: c for c in json.loads(result.stdout)}
    assert checks["params.yaml"] == {"state": "ok", "what": "params.yaml", "found": "every section is complete"}
    assert {"Python", "torch", "av", "free disk", "cores"} <= checks.keys()
    assert result.exit_code == any(c["state"] == "bad" for c in checks.values())


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("n_images: 4", "n_image: 4", "extract.n_image: unknown key. Did you mean 'n_images'?"),
        ("\nreport:", "\nreports:", "unknown name 'reports'. Did you mean 'report'?"),
        (AUDIT, "", "section 'audit' is missing"),
    ],
)
def test_doctor_finds_what_is_wrong_in_params(project: Path, old: str, new: str, says: str) -> None:
    text = Path("params.yaml").read_text()
    assert old in text
    Path("params.yaml").write_text(text.replace(old, new, 1))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    checks = {c["what"]: c for c in json.loads(result.stdout)}
    assert result.exit_code == 1
    assert checks["params.yaml"]["state"] == "bad"
    assert says in checks["params.yaml"]["found"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("preset", "cloto"), "preset: unknown name 'cloto'. Did you mean 'clotho'? Known:"),
        (("search", "  "), "the sentence is empty"),
        (("search", "a dog barks"), "no index. Run `dvc repro evaluate`"),
    ],
)
def test_refusals_say_what_to_do(
    project: Path,
    args: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert says in refusal(capsys, monkeypatch, *args)


def test_a_wrong_preset_is_not_switched_to(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path("params.yaml").read_bytes()
    text = Path("presets/clotho.yaml").read_text()
    Path("presets/clotho.yaml").write_text(text.replace("n_shards:", "n_shard:", 1))
    assert "catalog.n_shard: unknown key" in refusal(capsys, monkeypatch, "preset", "clotho")
    assert Path("params.yaml").read_bytes() == before


@pytest.mark.parametrize("command", ["status", "audit", "preset", "search", "vipant"])
def test_outside_of_a_project_it_says_where_to_go(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARKEN_PARAMS", raising=False)
    args = {"search": ("search", "a dog"), "vipant": ("vipant", "bimodal.pth")}.get(command, (command,))
    assert "Run from the project's root" in refusal(capsys, monkeypatch, *args)


def test_an_audit_before_the_download_says_what_to_run(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(load("paths", Paths).media)
    assert "has no shards. Run `dvc repro`" in refusal(capsys, monkeypatch, "audit")


def vipant_checkpoint(path: Path, stride: tuple[int, int], *cfg: object) -> Path:
    """A checkpoint as VIP-ANT writes it, of a small tower for FBANKs of 1000 frames."""
    from harken.models.audio_vit import AudioViT

    where = ROOT / "tests/models/test_vipant.py"
    spec = importlib.util.spec_from_file_location("vipant_layout", where)
    assert spec is not None
    assert spec.loader is not None
    layout = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layout)
    tower = AudioViT(width=64, layers=1, heads=1, embed_dim=8, n_frames=1000, stride=stride)
    written: Path = layout.write(path, layout.checkpoint(layout.as_vipant(tower), None, *cfg))
    return written


def test_vipant_tells_what_a_checkpoint_holds(project: Path) -> None:
    path = vipant_checkpoint(project / "bimodal.pth", (32, 32), Path("never made"))
    found = json.loads(say("vipant", str(path), "--json"))
    shape = {"width": 64, "layers": 1, "heads": 1, "patch": 32, "embed_dim": 8, "positions": 125}
    assert found.items() >= shape.items()
    assert found["sha256"] == file_sha256(path)
    assert found["logit_scale"] == 3.25
    assert any(name.startswith("pathlib.") for name in found["not_imported"])
    told = dict(line.split(maxsplit=1) for line in say("vipant", str(path)).splitlines())
    assert told["sha256"] == found["sha256"]
    assert (told["layers"], told["logit_scale"], told["file"]) == ("1", "3.25", "bimodal.pth")


def test_vipant_says_what_does_not_fit(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = vipant_checkpoint(project / "bimodal.pth", (16, 24))  # VIP-ANT's own; this preset has (32, 32)
    said = refusal(capsys, monkeypatch, "vipant", str(path))
    assert "306 positions" in said
    assert "a grid of 31 x 4, 125 rows" in said
    assert "(16, 24), a grid of 61 x 5" in said
    assert "lost.pth: no such file" in refusal(capsys, monkeypatch, "vipant", "lost.pth")
