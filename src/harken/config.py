"""params.yaml -> typed, frozen config objects. No defaults in code: a value has one home, and it is params.yaml."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from harken.errors import ConfigError, nearest

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
        raise ConfigError("\n".join(_explain(where, cls, err) for err in e.errors())) from None


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


def _explain(where: str, cls: type[BaseModel], err: Any) -> str:
    loc = [str(p) for p in err["loc"]]
    spot = ".".join([where, *loc])
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


def _fields_at(cls: type[BaseModel], loc: list[str]) -> list[str]:
    """The field names of the config class found by walking `loc` from `cls`; empty where the walk loses its way."""
    here: Any = cls
    for part in loc:
        if not (isinstance(here, type) and issubclass(here, BaseModel)):
            # inside a dict or a union: the values' class, if there is exactly one
            args = [a for a in getattr(here, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
            here = args[0] if len(args) == 1 else None
            continue
        field = here.model_fields.get(part)
        here = field.annotation if field else None
    if not (isinstance(here, type) and issubclass(here, BaseModel)):
        args = [a for a in getattr(here, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        here = args[0] if len(args) == 1 else None
    return list(here.model_fields) if here is not None else []


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
