"""params.yaml is strict, and every params file that is shipped loads whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from harken.config import Config, Paths, load, parse, read_params
from harken.errors import ConfigError
from harken.stages import STAGES, config_class, stage

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([ROOT / "params.yaml", *ROOT.glob("presets/*.yaml")])


class Inner(Config):
    rate: float
    names: list[str]


class Outer(Config):
    loss: Literal["pmr", "nt_xent"]
    count: int
    pair: tuple[int, int]
    inner: Inner
    by_name: dict[str, Inner]
    either: Inner | None


GOOD: dict[str, object] = {
    "loss": "pmr",
    "count": 3,
    "pair": [1, 2],
    "inner": {"rate": 1, "names": []},
    "by_name": {},
    "either": None,
}


def test_a_section_becomes_a_frozen_typed_object() -> None:
    cfg = parse("here", Outer, GOOD)
    assert cfg.pair == (1, 2)
    with pytest.raises(ValueError, match="frozen"):
        cfg.count = 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"counts": 3},
            "here.counts: unknown key. Did you mean 'count'? Known: by_name, count, either, inner, loss, pair.",
        ),
        ({"inner": {"rate": 1.0, "nmes": [], "names": []}}, "here.inner.nmes: unknown key. Did you mean 'names'?"),
        (
            {"by_name": {"a": {"rat": 1.0, "rate": 1.0, "names": []}}},
            "here.by_name.a.rat: unknown key. Did you mean 'rate'?",
        ),
        ({"either": {"rate": 1.0, "names": [], "name": 1}}, "here.either.name: unknown key. Did you mean 'names'?"),
        ({"count": "3"}, "here.count: Input should be a valid integer (found '3')."),
        ({"count": 3.5}, "here.count:"),
        ({"count": True}, "here.count:"),
        ({"pair": [1]}, "here.pair.1: missing key"),
        ({"inner": {"rate": "1e-4", "names": []}}, "here.inner.rate: Input should be a valid number (found '1e-4')."),
        ({"inner": {"rate": float("nan"), "names": []}}, "here.inner.rate:"),
        ({"inner": []}, "here.inner:"),
        ({"loss": "pmrr"}, "here.loss: unknown name 'pmrr'. Did you mean 'pmr'? Known: 'pmr' or 'nt_xent'."),
    ],
)
def test_what_is_wrong_is_named_with_its_place(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse("here", Outer, GOOD | change)
    assert says in str(e.value)


def test_every_wrong_key_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as e:
        parse("here", Outer, {k: v for k, v in GOOD.items() if k not in ("loss", "count")} | {"pari": []})
    lines = str(e.value).splitlines()
    assert "here.loss: missing key. Add it; presets/ holds complete examples." in lines
    assert len(lines) == 3


def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    monkeypatch.setenv("HARKEN_PARAMS", str(path))
    return path


def test_numbers_are_read_as_yaml_1_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params(tmp_path, monkeypatch, "inner:\n  rate: 1e-4\n  names: [no, on, yes, 'null']\n")
    cfg = load("inner", Inner)
    assert cfg.rate == 1e-4  # YAML 1.1 reads a string here
    assert cfg.names == ["no", "on", "yes", "null"]  # and truths there


def test_overrides_replace_single_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params(tmp_path, monkeypatch, "inner: {rate: 1.0, names: [a]}\n")
    assert load("inner", Inner, rate=2.0) == Inner(rate=2.0, names=["a"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("iner: {}\n", "section 'inner' is missing. Did you mean 'iner'? Sections here: iner."),
        ("- a\n", "expected a mapping of sections, found list."),
        ("", "expected a mapping of sections, found NoneType."),
        ("a: [\n", "not valid YAML"),
        ("inner: {rate: 1, rate: 2, names: []}\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_params_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str) -> None:
    path = params(tmp_path, monkeypatch, text)
    with pytest.raises(ConfigError) as e:
        load("inner", Inner)
    assert str(e.value).startswith(str(path))
    assert says in str(e.value)


def test_a_missing_file_says_where_it_was_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARKEN_PARAMS", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=r"none.yaml: no such params file. Run from the project's root"):
        read_params()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_params_are_complete(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARKEN_PARAMS", str(path))
    assert set(read_params()) == {"paths", *STAGES}
    load("paths", Paths)
    for name in STAGES:
        load(name, config_class(name))
    cfg = load("train", stage("train").TrainConfig)
    for name, recipe in cfg.recipes.items():
        stage("train").check(name, recipe, cfg)


def test_presets_keep_their_data_apart() -> None:
    folders: dict[str, Path] = {}
    for path in SHIPPED[:-1] if SHIPPED[-1].name == "params.yaml" else SHIPPED:
        if path.name == "params.yaml":
            continue  # it is one of the presets
        for name, folder in read_params(path)["paths"].items():
            taken = folders.setdefault(f"{name}: {folder}", path)
            assert taken == path, f"{taken.name} and {path.name} share {folder}"


def test_an_unknown_stage_is_met_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'pretrain'"):
        stage("pretain")


class Dog(Config):
    kind: Literal["dog"]
    barks: int


class Cat(Config):
    kind: Literal["cat"]
    sleeps: int


class Zoo(Config):
    pets: dict[str, Annotated[Dog | Cat, Field(discriminator="kind")]]


@pytest.mark.parametrize(
    ("pet", "says"),
    [
        ({"kind": "dgo", "barks": 1}, "zoo.pets.rex.kind: unknown name 'dgo'. Did you mean 'dog'? Known: cat, dog."),
        ({"barks": 1}, "zoo.pets.rex.kind: missing key. Add it; presets/ holds complete examples."),
        ({"kind": "dog"}, "zoo.pets.rex.barks: missing key. Add it; presets/ holds complete examples."),
        ({"kind": "dog", "barks": "1"}, "zoo.pets.rex.barks: Input should be a valid integer (found '1')."),
        (
            {"kind": "cat", "sleeps": 1, "sleps": 1},
            "zoo.pets.rex.sleps: unknown key. Did you mean 'sleeps'? Known: kind, sleeps.",
        ),
    ],
)
def test_of_several_classes_only_the_one_that_was_meant_is_spoken_of(pet: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse("zoo", Zoo, {"pets": {"rex": pet}})
    assert str(e.value) == says
