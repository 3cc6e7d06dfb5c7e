"""params.yaml -> typed, frozen config objects. No defaults in code: a value has one home, and it is params.yaml."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from harken.errors import ConfigError, nearest, unknown

PARAMS = "params.yaml"


class Config(BaseModel):
    """Base of every config class: unknown keys, missing keys and wrong types are errors; instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


T = TypeVar("T", bound=Config)


def params_path() -> Path:
    """params.yaml of the working folder, or the file that HARKEN_PARAMS names."""
    return Path(os.environ.get("HARKEN_PARAMS", PARAMS))


def read_params(path: Path | None = None) -> dict[str, Any]:
    """The whole params file as plain Python values (YAML 1.2, so that `1e-4` is a number).

    Raises ConfigError where the file is missing or is not a YAML mapping.
    """
    path = path or params_path()
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such params file. Run from the project's root, or set HARKEN_PARAMS to its path."
        )
    try:
        params = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {e}") from None
    if not isinstance(params, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(params).__name__}.")
    return params


def parse(where: str, cls: type[T], values: Any) -> T:
    """`values` as a `cls`. Raises ConfigError naming every wrong key as `where.key: what is wrong`."""
    try:
        # JSON mode keeps strictness (no "3" for 3) and still lets a YAML list become a tuple and a string a Path
        return cls.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as e:
        raise ConfigError("\n".join(_explain(where, cls, values, err) for err in e.errors())) from None


def load(name: str, cls: type[T], **overrides: Any) -> T:
    """Section `name` of params.yaml as a `cls`; `overrides` replace single keys (used by tests and the CLI)."""
    path = params_path()
    params = read_params(path)
    if name not in params:
        guess = nearest(name, params)
        raise ConfigError(
            f"{path}: section {name!r} is missing."
            + (f" Did you mean {guess!r}?" if guess else "")
            + f" Sections here: {', '.join(params)}."
        )
    values = params[name]
    if isinstance(values, dict):
        values = {**values, **overrides}
    return parse(f"{path}: {name}", cls, values)


def _explain(where: str, cls: type[BaseModel], values: Any, err: Any) -> str:
    loc = [str(p) for p in err["loc"]]
    spot = ".".join([where, *_as_written(values, loc)])
    if err["type"].startswith("union_tag"):
        # where a key such as `kind` says which class the rest is of
        key = err["ctx"]["discriminator"].strip("'")
        if err["type"] == "union_tag_not_found":
            return f"{spot}.{key}: missing key. Add it; presets/ holds complete examples."
        return str(unknown(f"{spot}.{key}", err["ctx"]["tag"], re.findall(r"'(.*?)'", err["ctx"]["expected_tags"])))
    if err["type"] == "missing":
        return f"{spot}: missing key. Add it; presets/ holds complete examples."
    if err["type"] == "extra_forbidden":
        siblings = _fields_at(cls, loc[:-1])
        guess = nearest(loc[-1], siblings)
        return (
            f"{spot}: unknown key."
            + (f" Did you mean {guess!r}?" if guess else "")
            + (f" Known: {', '.join(sorted(siblings))}." if siblings else "")
        )
    if err["type"] == "literal_error":
        guess = nearest(str(err["input"]), err["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "))
        return (
            f"{spot}: unknown name {err['input']!r}."
            + (f" Did you mean {guess!r}?" if guess else "")
            + f" Known: {err['ctx']['expected']}."
        )
    return f"{spot}: {err['msg']} (found {err['input']!r})."


def _as_written(values: Any, loc: list[str]) -> list[str]:
    """`loc` without the names of classes that a key such as `kind` chose: they are no keys of the file."""
    told, here = [], values
    for i, part in enumerate(loc):
        if isinstance(here, dict) and part not in here and i < len(loc) - 1:
            continue
        told.append(part)
        if isinstance(here, dict):
            here = here.get(part)
        elif isinstance(here, list) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
    return told


def _fields_at(cls: type[BaseModel], loc: list[str]) -> list[str]:
    """The field names of the config class found by walking `loc` from `cls`; empty where the walk loses its way."""
    here: Any = cls
    for part in loc:
        if isinstance(here, type) and issubclass(here, BaseModel):
            field = here.model_fields.get(part)
            here = field.annotation if field else None
        else:
            here = _inside(here, part)
    if not (isinstance(here, type) and issubclass(here, BaseModel)):
        here = _inside(here, "")
    return list(here.model_fields) if here is not None else []


def _inside(kind: Any, part: str) -> Any:
    """What lies in a dict, a list or a union at `part`: a dict's or list's one kind of value; of several classes the
    one that has `part` for a name of its own.
    """
    if get_origin(kind) is dict or get_origin(kind) is list:
        return get_args(kind)[-1]
    found = [a for a in _classes(kind) if len(_classes(kind)) == 1 or part in _names_of(a)]
    return found[0] if len(found) == 1 else None


def _classes(kind: Any) -> list[type[BaseModel]]:
    """The config classes of a union, however it is wrapped."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [c for a in get_args(kind) for c in _classes(a)]


def _names_of(cls: type[BaseModel]) -> set[str]:
    """The strings that some key of the class may have: how a union tells it from others."""
    return {
        name
        for f in cls.model_fields.values()
        if get_origin(f.annotation) is Literal
        for name in get_args(f.annotation)
    }


class Paths(Config):
    """Where each stage's folder lies. Presets use folders of their own, so that they never overwrite each other."""

    lists: Path
    manifest: Path
    weights: Path
    media: Path
    visits: Path
    audit: Path
    features: Path
    stats: Path
    embeddings: Path
    pretrained: Path
    finetuned: Path
    trained: Path
    evaluations: Path
    report: Path
    work: Path
    ledger: Path


FOLDERS = {
    "lists": "lists",
    "catalog": "manifest",
    "download": "media",
    "audit": "audit",
    "extract": "features",
    "weights": "weights",
    "stats": "stats",
    "embed": "embeddings",
    "pretrain": "pretrained",
    "finetune": "finetuned",
    "train": "trained",
    "evaluate": "evaluations",
    "report": "report",
}
"""stage -> the name in `paths` of the folder that it fills, in the order of the corridor"""
