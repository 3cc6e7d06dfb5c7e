"""Every error harken raises on purpose, and the one way to refuse an unknown name.

HarkenError > ConfigError (params or arguments), DataError (files that are not what they should be),
ClipError (one clip cannot be used, with its canonical reason; caught in the shard function and nowhere else).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, Final

REFUSED: Final = 1
TRY_AGAIN: Final = 75  # EX_TEMPFAIL of sysexits.h: the same command may go well later


class HarkenError(Exception):
    """Something a user can act on: the message says what, where, what would have been right and what to do."""


class ConfigError(HarkenError):
    """A value in params.yaml, an environment variable or an argument is not usable."""


class DataError(HarkenError):
    """A file or folder is missing or is not what its name promises."""


class TransientError(HarkenError):
    """Nothing is wrong with what was asked: the same command may go well later. A stage ends with status 75 for it."""


class ClipError(HarkenError):
    """One clip cannot be used.

    `reason` is a canonical code such as `qc.no_audio` (see `harken.media.reasons`); `message` is what the tool said;
    `facts` is what else is known of the attempt and can be written as JSON (http_status, exception, where, countries,
    expected, retry_after_s, playability_status).
    """

    def __init__(self, reason: str, message: str = "", **facts: Any) -> None:
        super().__init__(f"{reason}: {message}" if message else reason)
        self.reason = reason
        self.message = message
        self.facts = facts

    def __reduce__(self) -> tuple[Callable[..., ClipError], tuple[str, str, dict[str, Any]]]:
        return _clip_error, (self.reason, self.message, self.facts)  # survives the trip back from a worker process


def _clip_error(reason: str, message: str, facts: dict[str, Any]) -> ClipError:
    return ClipError(reason, message, **facts)


def status_of(error: BaseException) -> int:
    """The exit status of a stage or a flow's command that ends with `error`."""
    return TRY_AGAIN if isinstance(error, TransientError) else REFUSED


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was most likely meant to be, if any is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return close[0] if close else None


def unknown(where: str, name: object, known: Iterable[str]) -> ConfigError:
    """The error for a name that is no known choice: `where: unknown name 'pmrr'. Did you mean 'pmr'? Known: ...`"""
    known = sorted(known)
    guess = nearest(str(name), known)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return ConfigError(f"{where}: unknown name {str(name)!r}.{hint} Known: {', '.join(known)}.")
