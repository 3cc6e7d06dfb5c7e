"""Why a clip cannot be used: the canonical reasons, and what an error message really says.

A wrong verdict costs more than a missing one. YouTube's rate limit and captcha messages begin with "Video unavailable",
so the patterns for a troubled session come first, and a bare "Video unavailable" is a suspicion, never a death.
What follows from a reason for the clip, and when to ask again, is its policy (`POLICIES`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from harken.attempts import Policy
from harken.errors import unknown
from harken.shards import fingerprint

Group = Literal["gone", "denied", "content", "ours", "unknown", "absent"]
Retry = Literal["never", "soon", "later", "session"]


@dataclass(frozen=True, slots=True)
class Reason:
    """One canonical reason.

    `about` is what the reason is a fact of: `clip`, `vantage` (the country we ask from), `credential`, `client`, `net`,
    `tool` or `us`. `retry` says when another attempt may end differently: `soon` (seconds to minutes), `later` (a day
    or more), `session` (after a pause of this whole session; the attempt does not count against the clip) or `never`.
    """

    code: str
    about: str
    retry: Retry


def _table(*rows: tuple[str, str, Retry]) -> dict[str, Reason]:
    return {code: Reason(code, about, retry) for code, about, retry in rows}


UNVISITED: Final = "local.unvisited"
REASONS: Final[dict[str, Reason]] = _table(
    ("session.bot_check", "us", "session"),
    ("session.rate_limited", "us", "session"),
    ("session.captcha", "us", "session"),
    ("session.ip_blocked", "us", "session"),
    ("session.http_429", "us", "session"),
    ("session.suspect", "us", "session"),
    ("tool.extractor_broken", "tool", "later"),
    ("tool.no_format", "tool", "later"),
    ("gone.account_terminated", "clip", "never"),
    ("gone.account_closed", "clip", "never"),
    ("gone.removed_uploader", "clip", "never"),
    ("gone.removed_policy", "clip", "never"),
    ("gone.copyright_claim", "clip", "never"),
    ("gone.copyright_blocked", "clip", "never"),
    ("gone.private", "clip", "never"),
    ("gone.unspecified", "clip", "later"),  # a suspicion: to be confirmed a day later
    ("denied.copyright_country", "vantage", "never"),
    ("denied.geo", "vantage", "never"),
    ("denied.age", "credential", "never"),
    ("denied.members", "credential", "never"),
    ("denied.paid", "credential", "never"),
    ("denied.login", "credential", "never"),
    ("denied.drm", "clip", "never"),
    ("denied.client", "client", "later"),
    ("live.upcoming", "clip", "later"),
    ("live.ended", "clip", "later"),
    ("live.processing", "clip", "later"),
    ("net.dns", "net", "soon"),
    ("net.connect", "net", "soon"),
    ("net.timeout", "net", "soon"),
    ("net.reset", "net", "soon"),
    ("net.tls", "net", "soon"),
    ("net.5xx", "net", "soon"),
    ("media.403", "net", "soon"),
    ("media.404", "net", "soon"),
    ("media.410", "net", "soon"),
    ("media.416", "net", "soon"),
    ("media.no_range", "net", "never"),
    ("media.truncated", "net", "soon"),
    ("media.not_media", "net", "soon"),
    ("media.empty", "net", "soon"),
    ("media.too_slow", "clip", "never"),  # these three: its bytes are here, and working on them ends badly
    ("media.too_big", "clip", "never"),
    ("media.crash", "clip", "never"),
    ("qc.past_end", "clip", "never"),
    ("qc.short", "clip", "never"),
    ("qc.no_audio", "clip", "never"),
    ("qc.no_video", "clip", "never"),
    ("qc.silent", "clip", "never"),
    ("qc.frozen", "clip", "never"),
    ("qc.id_mismatch", "tool", "later"),
    ("local.disk", "us", "session"),
    ("local.oom", "us", "session"),
    ("local.killed", "us", "session"),
    ("local.bug", "us", "never"),
    (UNVISITED, "us", "soon"),  # not asked for yet: a row of an unfinished download
    ("local.forgotten", "us", "never"),  # taken down here on request, whatever the platform has
    ("folder.absent", "us", "never"),
    ("unknown.unmapped", "us", "later"),  # no rule matched: the audit raises an alarm when these grow
)

_EXACT_GROUPS: Final[dict[str, Group]] = {
    "gone.unspecified": "unknown",
    "qc.id_mismatch": "ours",
    "local.forgotten": "absent",
    "media.truncated": "content",
    "media.not_media": "content",
    "media.empty": "content",
    "media.too_slow": "content",
    "media.too_big": "content",
    "media.crash": "content",
    "media.404": "unknown",
    "media.410": "unknown",
    "media.416": "unknown",
}
_PREFIX_GROUPS: Final[dict[str, Group]] = {
    "gone": "gone",
    "denied": "denied",
    "qc": "content",
    "session": "ours",
    "tool": "ours",
    "net": "ours",
    "local": "ours",
    "media": "ours",
    "live": "unknown",
    "unknown": "unknown",
    "folder": "absent",
}


def group(code: str) -> Group:
    """The roll-up of a canonical reason for reports. Raises ConfigError for a code that is not in REASONS.

    `gone` (from the platform, for everybody), `denied` (from this country, credential or client), `content` (served but
    unusable), `ours` (session, tool, network, this machine), `unknown` (suspected, not proven) and `absent` (the local
    folder never had it). Only `gone` is a property of the dataset.
    """
    if code not in REASONS:
        raise unknown("reason", code, REASONS)
    return _EXACT_GROUPS.get(code) or _PREFIX_GROUPS[code.partition(".")[0]]


MEASURED: Final = frozenset(
    {
        "media.no_range", "media.empty", "media.too_slow", "media.too_big", "media.crash", "qc.past_end", "qc.short",
        "qc.no_audio", "qc.no_video", "qc.silent", "qc.frozen", "qc.id_mismatch", "local.killed", UNVISITED,
        "local.forgotten", "folder.absent",
    }
)  # fmt: skip
"""What harken's own checks find out and no message says: `classify` gives none of them."""

_S, _MIN, _HOUR, _DAY = 1.0, 60.0, 3600.0, 86_400.0
_RECHECK_S: Final = 90 * _DAY  # the platform changes: private becomes public, countries are opened
_BACKOFF_S: Final = (2 * _S, 10 * _S, _MIN, 5 * _MIN, 10 * _MIN)


def _ours(code: str, *delays_s: float) -> Policy:
    """Says nothing of the clip and never counts against it, however often."""
    return Policy(group(code), False, 0, 0.0, delays_s, 0, None)


def _passing(code: str, max_attempts: int, *delays_s: float) -> Policy:
    """May end differently in a while; exhausted after so many tries."""
    return Policy(group(code), True, 0, 0.0, delays_s, max_attempts, None)


def _verdict(code: str, recheck_s: float | None) -> Policy:
    """Says it all at once."""
    return Policy(group(code), True, 1, 0.0, (), 1, recheck_s)


def _suspicion(code: str, gap_s: float) -> Policy:
    """A verdict once seen again after `gap_s`."""
    return Policy(group(code), True, 2, gap_s, (gap_s,), 2, _RECHECK_S)


def _policy(code: str) -> Policy:
    """The policy of the reasons that share their prefix's; `_OWN_POLICIES` has the others."""
    match code.partition(".")[0]:
        case "gone" | "denied":
            return _verdict(code, _RECHECK_S)
        case "qc":
            return _verdict(code, None)  # a recording that is too short, silent or frozen stays so
        case "net":
            return _passing(code, 6, *_BACKOFF_S)
        case "media":
            return _passing(code, 4, 2 * _S, 10 * _MIN, _DAY)
        case "tool":
            return _ours(code, _DAY, 3 * _DAY, 7 * _DAY)  # until a newer yt-dlp
        case "local":
            return _ours(code, 10 * _MIN, _HOUR, _DAY)
        case prefix:
            raise unknown("policy of the reasons", prefix, _PREFIX_GROUPS)


_OWN_POLICIES: Final[dict[str, Policy]] = {
    # the lane pauses for as long; 72 h is what users of yt-dlp report for a bot check
    **{
        code: _ours(code, _DAY, 2 * _DAY, 3 * _DAY)
        for code in ("session.bot_check", "session.captcha", "session.ip_blocked")
    },
    "session.rate_limited": _ours("session.rate_limited", _HOUR),
    "session.http_429": _ours("session.http_429", *(15 * _MIN * 2**n for n in range(7))),  # or Retry-After if longer
    "session.suspect": _ours("session.suspect", 15 * _MIN, _HOUR, _DAY),
    "gone.unspecified": _suspicion("gone.unspecified", _DAY),
    "live.ended": _suspicion("live.ended", 7 * _DAY),
    "denied.client": _suspicion("denied.client", _DAY),  # another client may be served
    "live.upcoming": _passing("live.upcoming", 30, _DAY),
    "live.processing": _passing("live.processing", 12, 6 * _HOUR),
    **{code: _passing(code, 3, 2 * _S, _DAY) for code in ("media.404", "media.410", "media.416")},
    "media.truncated": _passing("media.truncated", 6, *_BACKOFF_S),
    "media.not_media": _passing("media.not_media", 4, 10 * _MIN, _HOUR, _DAY),  # a consent page is the session's
    **{code: _verdict(code, None) for code in ("media.too_slow", "media.too_big", "media.crash")},
    "media.no_range": _passing("media.no_range", 3, _DAY, 7 * _DAY),
    "qc.id_mismatch": _ours("qc.id_mismatch", _DAY, 7 * _DAY),
    "folder.absent": _ours("folder.absent", 10 * _MIN),  # a folder can be filled any time
    "unknown.unmapped": _passing("unknown.unmapped", 4, _DAY, 3 * _DAY, 7 * _DAY),
}
POLICIES: Final[dict[str, Policy]] = {code: _OWN_POLICIES.get(code) or _policy(code) for code in REASONS}
"""What each reason means for the clip and when to ask again (see `harken.attempts`)."""


# First match wins. Each row is (code, pattern on the normalised message).
_EARLY: Final = (
    ("session.bot_check", r"sign in to confirm you're not a bot"),
    ("session.rate_limited", r"content isn't available, try again later|has been rate-limited by youtube"),
    ("session.captcha", r"requiring a captcha challenge"),
    ("session.ip_blocked", r"all player responses are invalid|your ip is likely being blocked"),
)
_MESSAGES: Final = (
    ("session.suspect", r"this content isn't available\.?$|page needs to be reloaded"),
    (
        "tool.extractor_broken",
        r"failed to extract any player response|unable to extract|no video formats found|signature solving failed"
        r"|n challenge solving failed|no supported javascript runtime",
    ),
    ("tool.no_format", r"requested format is not available"),
    ("gone.account_terminated", r"account associated with this video has been terminated"),
    ("gone.account_closed", r"uploader has closed their youtube account"),
    ("gone.removed_uploader", r"removed by the (uploader|user)"),
    ("gone.removed_policy", r"removed for violating youtube's (policy|terms of service|community guidelines)"),
    ("gone.copyright_claim", r"no longer available due to a copyright claim|copyright infringement"),
    ("gone.copyright_blocked", r"who has blocked it on copyright grounds"),
    ("denied.copyright_country", r"who has blocked it in your country on copyright grounds"),
    ("denied.geo", r"not made this video available in your country"),
    ("gone.private", r"private video|this video is private"),
    ("denied.age", r"confirm your age|age[- ]restricted|inappropriate for some users"),
    ("denied.members", r"members-only content|available to this channel's members"),
    ("denied.paid", r"requires payment|music premium|youtube premium"),
    ("denied.login", r"login details are needed|please sign in"),
    ("live.upcoming", r"premieres in|premiere will begin|live event will begin"),
    ("live.ended", r"this live event has ended|live stream recording is not available"),
    ("live.processing", r"processing this video|\bpost_live\b"),
    ("denied.drm", r"this video is drm protected"),
    ("denied.client", r"not available on this app|this video is not available\.?$"),
    ("gone.unspecified", r"^video unavailable\.?$|this video is unavailable|does not exist"),
)
_LOCAL: Final = (
    ("local.disk", r"no space left on device|disk quota exceeded|read-only file system"),
    ("local.oom", r"cannot allocate memory|out of memory"),
)
_NET: Final = (
    (
        "net.dns",
        r"name or service not known|name resolution|getaddrinfo failed|nodename nor servname|failed to resolve",
    ),
    ("net.tls", r"certificate verify failed|\bssl\b|\btls\b"),
    ("net.timeout", r"timed out|timeout"),
    ("net.reset", r"connection reset|remote end closed|connection aborted|broken pipe|more expected"),
    (
        "net.connect",
        r"connection refused|no route to host|network is unreachable|failed to establish a new connection"
        r"|redirect loop detected",
    ),
    ("net.5xx", r"giving up after"),
)
_NET_EXCEPTIONS: Final = {
    "gaierror": "net.dns",
    "SSLError": "net.tls",
    "CertificateVerifyError": "net.tls",
    "TimeoutError": "net.timeout",
    "ConnectionResetError": "net.reset",
    "ConnectionAbortedError": "net.reset",
    "BrokenPipeError": "net.reset",
    "RemoteDisconnected": "net.reset",
    "ConnectionRefusedError": "net.connect",
    "TransportError": "net.connect",
    "ProxyError": "net.connect",
    "URLError": "net.connect",
}
_BUGS: Final = frozenset(
    {
        "ArithmeticError",
        "AssertionError",
        "AttributeError",
        "IndexError",
        "KeyError",
        "NameError",
        "NotImplementedError",
        "RecursionError",
        "RuntimeError",
        "TypeError",
        "UnicodeDecodeError",
        "UnicodeEncodeError",
        "ValueError",
        "ZeroDivisionError",
    }
)

_ANSI: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PREFIX: Final = re.compile(r"^(?:error|warning):\s*", re.IGNORECASE)
_EXTRACTOR: Final = re.compile(r"^\[[\w:+-]+\]\s+(?:[\w-]{1,64}:\s+)?")
_HINTS: Final = re.compile(
    r"(?:\.\s+|;\s*)(?:use --cookies|also see|please report this issue|see\s+https?://).*$", re.I | re.S
)
_STATUS: Final = re.compile(r"\bhttp(?:\s+error)?\s*:?\s*(\d{3})\b", re.IGNORECASE)
_PAGE: Final = re.compile(r"unable to download (?:\w+ )*(?:webpage|page|json|xml|manifest)")
_URL: Final = re.compile(r"\bhttps?://\S+")
_IP: Final = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")


_EXTRACT_HTTP: Final = {403: "session.suspect", 404: "gone.unspecified", 410: "gone.unspecified"}

RULE_VERSION: Final = fingerprint(
    [_EARLY, _MESSAGES, _LOCAL, _NET, sorted(_NET_EXCEPTIONS.items()), sorted(_BUGS), sorted(_EXTRACT_HTTP.items())],
    [p.pattern for p in (_ANSI, _PREFIX, _EXTRACTOR, _HINTS, _STATUS, _PAGE, _URL, _IP)],
)[:8]
"""A short hash of the tables that `classify` decides by: it changes exactly when they do."""


def normalise(message: str) -> str:
    """`message` in one line, without colour codes, the tool's prefix and its advice; URLs and addresses are masked.

    Typographic apostrophes become straight ones. This is the text that patterns are matched on and that ledgers keep.
    """
    text = _ANSI.sub("", message).replace("\u2019", "'").replace("\u2018", "'")
    text = " ".join(text.split())
    text = _EXTRACTOR.sub("", _PREFIX.sub("", text))
    text = _HINTS.sub("", text)
    return _IP.sub("<address>", _URL.sub("<url>", text)).strip()


def classify(message: str, **facts: object) -> Reason:
    """The canonical reason for an error message and what else is known of the attempt. The first matching rule wins.

    Facts used, all optional: `http_status` (int), `exception` (class name), `where` (`extract` or `media`: which
    step failed), `countries` (where a geo-restricted video may be watched), `expected` (yt-dlp's flag; False means that
    its extractor broke). A ledger row may be passed whole: other facts are kept out of the decision.

        classify("Video unavailable").code                                              gone.unspecified
        classify("Video unavailable. This content isn't available, try again later").code   session.rate_limited
    """
    return REASONS[_code(normalise(message), facts)]


def _code(text: str, facts: Mapping[str, object]) -> str:
    low = text.lower()
    exception = str(facts.get("exception") or "").rpartition(".")[2]
    where = facts.get("where") or ("extract" if _PAGE.search(low) else None)
    in_media = where == "media"
    status = _status(low, facts)

    def first(rows: tuple[tuple[str, str], ...]) -> str | None:
        return next((code for code, pattern in rows if re.search(pattern, low)), None)

    rules: tuple[Callable[[], str | None], ...] = (
        lambda: first(_EARLY),
        lambda: "session.http_429" if status == 429 else None,
        lambda: "denied.geo" if exception == "GeoRestrictedError" or facts.get("countries") else None,
        lambda: first(_MESSAGES) if not in_media else None,
        lambda: "local.oom" if exception == "MemoryError" else first(_LOCAL),
        lambda: "net.5xx" if status is not None and status >= 500 else None,
        lambda: _http(status, where),
        lambda: _incomplete(low, exception, in_media),
        lambda: _NET_EXCEPTIONS.get(exception) if exception != "TransportError" else None,
        lambda: first(_NET),
        lambda: _NET_EXCEPTIONS.get(exception),  # a transport error whose text names no cause
        lambda: "media.not_media" if exception == "InvalidDataError" else None,
        lambda: "tool.extractor_broken" if facts.get("expected") is False else None,
        lambda: "local.bug" if exception in _BUGS else None,
    )
    return next((code for rule in rules if (code := rule())), "unknown.unmapped")


def _status(low: str, facts: Mapping[str, object]) -> int | None:
    given = facts.get("http_status")
    if isinstance(given, int):
        return given
    found = _STATUS.search(low)
    return int(found[1]) if found else None


def _http(status: int | None, where: object) -> str | None:
    if where == "extract":
        # a watch page is never simply forbidden or missing: a refusal is the session's, an absence is not yet a proof
        return _EXTRACT_HTTP.get(status or 0)
    return f"media.{status}" if f"media.{status}" in REASONS else None


def _incomplete(low: str, exception: str, in_media: bool) -> str | None:
    if exception in ("IncompleteRead", "ContentTooShortError") or "incompleteread" in low or "bytes read" in low:
        return "media.truncated" if in_media else "net.reset"
    return None
