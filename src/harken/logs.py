"""What stages say on stderr: plain lines for people, or with HARKEN_LOG=json an object a line for a log collector.

    {"time": "2026-11-22T10:15:03.120Z", "level": "info", "logger": "harken", "run_id": "...", "stage": "extract",
     "message": "clips: {'ok': 790}"}

`shard` or `item` says what a worker was at, `rank` which of several processes that train together, and `error` is a
traceback. The run's id is HARKEN_RUN_ID, which a flow sets to its own run's id; else the stage makes one. Workers take
it over, on any engine: it goes with the work, not with the environment. What native code prints stays as it is.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from harken.engines import Map
from harken.errors import unknown

log = logging.getLogger("harken")
KINDS: Final = ("text", "json")
# one to a thread: a cluster's worker may serve several stages, side by side
_about: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("harken_about", default={})  # noqa: B039


def is_json() -> bool:
    """Whether HARKEN_LOG asks for JSON. Raises ConfigError where it is neither `json` nor `text`."""
    kind = os.environ.get("HARKEN_LOG") or "text"
    if kind not in KINDS:
        raise unknown("HARKEN_LOG", kind, KINDS)
    return kind == "json"


def run_id() -> str:
    """HARKEN_RUN_ID. Made, and set for all that this process starts, where it is not: its time and this process's id.

    Runs that one command starts one after the other share an id only where that command sets it, as a flow does.
    """
    made = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}-{os.urandom(2).hex()}"
    return os.environ.setdefault("HARKEN_RUN_ID", made)


def begin(stage: str) -> None:
    """Let this process speak for a run of `stage`."""
    _about.set({"run_id": run_id(), "stage": stage})
    if is_json():
        _speak_json()
    else:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


def _speak_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


def refuse(message: str) -> None:
    """The last words of a stage that ends without a result."""
    _say(logging.ERROR, message)


def note(message: str) -> None:
    """What a person at the terminal should know at once."""
    _say(logging.WARNING, message)


def _say(level: int, message: str) -> None:
    if _is_formatted():
        log.log(level, "%s", message)
    else:
        print(f"harken: {message}", file=sys.stderr)


def _is_formatted() -> bool:
    return any(isinstance(h.formatter, JsonLines) for h in logging.getLogger().handlers)


class JsonLines(logging.Formatter):
    """A record as one line of JSON, whatever it holds."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": f"{when:%Y-%m-%dT%H:%M:%S}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            **_about.get(),
            "message": record.getMessage(),
        }
        if os.environ.get("WORLD_SIZE", "1") != "1":
            line["rank"] = os.environ.get("RANK")
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def telling(map_: Map) -> Map:
    """`map_`, whose workers speak as this process does, each line with the shard or item that it is about.

    Without HARKEN_LOG=json it is `map_` itself.
    """
    if not is_json():
        return map_

    def run(make: Callable[[Any], Callable[[Any], Any]], cfg: Any, items: Any, **how: Any) -> Iterator[Any]:
        return map_(partial(_make, make, _about.get()), cfg, items, **how)

    return run


def _make(make: Callable[[Any], Callable[[Any], Any]], about: dict[str, Any], cfg: Any) -> Callable[[Any], Any]:
    """In a worker: what `make` makes, saying what it is at."""
    if not _is_formatted():
        _speak_json()
    with _told(about):
        return partial(_call, make(cfg), about)


def _call(work: Callable[[Any], Any], about: dict[str, Any], item: Any) -> Any:
    with _told({**about, **_named(item)}):
        return work(item)


@contextlib.contextmanager
def _told(about: dict[str, Any]) -> Iterator[None]:
    token = _about.set(about)
    try:
        yield
    finally:
        _about.reset(token)


def _named(item: Any) -> dict[str, Any]:
    """What an item of a fan-out is called: the shard that it is or has, else its name."""
    first = item[0] if isinstance(item, tuple) and item else item
    shard = getattr(item, "shard", first)
    if isinstance(shard, int):
        return {"shard": shard}
    return {"item": first} if isinstance(first, str) else {}
