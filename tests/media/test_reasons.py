from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from harken.errors import ConfigError
from harken.media import reasons
from harken.media.reasons import MEASURED, POLICIES, REASONS, RULE_VERSION, classify, group, normalise

# (message, facts, code): YouTube's and yt-dlp's own words, a row of the taxonomy at a time, traps beside them
CASES = [
    (
        "ERROR: [youtube] -PJHxphWEs1: Sign in to confirm you\u2019re not a bot. Use --cookies-from-browser or",
        {},
        "session.bot_check",
    ),
    ("Sign in to confirm you're not a bot", {}, "session.bot_check"),
    (
        "Video unavailable. This content isn't available, try again later. The current session has been rate-limited "
        "by YouTube for up to an hour",
        {},
        "session.rate_limited",
    ),
    ("Video unavailable. This content isn\u2019t available, try again later.", {}, "session.rate_limited"),
    ("Video unavailable. YouTube is requiring a captcha challenge before playback", {}, "session.captcha"),
    ("All player responses are invalid. Your IP is likely being blocked by Youtube", {}, "session.ip_blocked"),
    ("Unable to download API page: HTTP Error 429: Too Many Requests", {}, "session.http_429"),
    ("Video unavailable", {"http_status": 429}, "session.http_429"),
    ("HTTP Error 429", {"where": "media"}, "session.http_429"),
    ("This content isn't available.", {}, "session.suspect"),
    ("The page needs to be reloaded", {}, "session.suspect"),
    ("Unable to download webpage: HTTP Error 403: Forbidden", {}, "session.suspect"),
    ("Failed to extract any player response", {}, "tool.extractor_broken"),
    ("Unable to extract yt initial data", {}, "tool.extractor_broken"),
    ("No video formats found!", {}, "tool.extractor_broken"),
    ("WARNING: n challenge solving failed: some formats may be missing", {}, "tool.extractor_broken"),
    ("No supported JavaScript runtime could be found", {}, "tool.extractor_broken"),
    (
        "'NoneType' object is not subscriptable",
        {"expected": False, "exception": "ExtractorError"},
        "tool.extractor_broken",
    ),
    ("Requested format is not available. Use --list-formats", {}, "tool.no_format"),
    (
        "Video unavailable. This video is no longer available because the YouTube account associated with this video "
        "has been terminated.",
        {},
        "gone.account_terminated",
    ),
    (
        "Video unavailable. This video is no longer available because the uploader has closed their YouTube account.",
        {},
        "gone.account_closed",
    ),
    ("Video unavailable. This video has been removed by the uploader", {}, "gone.removed_uploader"),
    ("This video has been removed by the user", {}, "gone.removed_uploader"),
    ("This video has been removed for violating YouTube\u2019s policy on spam", {}, "gone.removed_policy"),
    ("This video has been removed for violating YouTube's Terms of Service", {}, "gone.removed_policy"),
    ("This video has been removed for violating YouTube's Community Guidelines.", {}, "gone.removed_policy"),
    ("Video unavailable. This video is no longer available due to a copyright claim by X.", {}, "gone.copyright_claim"),
    (
        "Video unavailable. This video contains content from X, who has blocked it on copyright grounds",
        {},
        "gone.copyright_blocked",
    ),
    (
        "Video unavailable. This video contains content from X, who has blocked it in your country on copyright "
        "grounds",
        {},
        "denied.copyright_country",
    ),
    ("The uploader has not made this video available in your country", {}, "denied.geo"),
    ("Video unavailable", {"exception": "GeoRestrictedError", "countries": ["DE"]}, "denied.geo"),
    ("Private video. Sign in if you've been granted access to this video. Use --cookies", {}, "gone.private"),
    ("Video unavailable. This video is private", {}, "gone.private"),
    ("Sign in to confirm your age. This video may be inappropriate for some users.", {}, "denied.age"),
    ("This video is age-restricted", {}, "denied.age"),
    ("Join this channel to get access to members-only content like this video", {}, "denied.members"),
    ("This video is available to this channel's members on level: Fan", {}, "denied.members"),
    ("This video requires payment to watch", {}, "denied.paid"),
    ("Please sign in", {}, "denied.login"),
    ("Premieres in 3 hours", {}, "live.upcoming"),
    ("This live event will begin in 2 days.", {}, "live.upcoming"),
    ("This live event has ended.", {}, "live.ended"),
    ("This live stream recording is not available.", {}, "live.ended"),
    ("We're processing this video. Check back later.", {}, "live.processing"),
    ("This video is DRM protected", {}, "denied.drm"),
    ("Video unavailable. This video is not available", {}, "denied.client"),
    ("The following content is not available on this app.", {}, "denied.client"),
    ("ERROR: [youtube] abcdefghijk: Video unavailable", {}, "gone.unspecified"),
    ("Video unavailable.", {}, "gone.unspecified"),
    ("\x1b[0;31mERROR:\x1b[0m [youtube] abcdefghijk: This video is unavailable", {}, "gone.unspecified"),
    (
        "Unable to download webpage: <urlopen error [Errno -2] Name or service not known>",
        {"exception": "TransportError"},
        "net.dns",
    ),
    ("[Errno 111] Connection refused", {"exception": "TransportError"}, "net.connect"),
    ("something odd on the wire", {"exception": "TransportError"}, "net.connect"),
    ("The read operation timed out", {"exception": "TransportError"}, "net.timeout"),
    ("", {"exception": "TimeoutError"}, "net.timeout"),
    ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", {}, "net.tls"),
    ("[Errno 104] Connection reset by peer", {}, "net.reset"),
    ("Remote end closed connection without response", {"exception": "RemoteDisconnected"}, "net.reset"),
    ("HTTP Error 503: Service Unavailable", {}, "net.5xx"),
    ("Video unavailable?", {"http_status": 500}, "net.5xx"),
    ("Giving up after 1 retries", {}, "net.5xx"),
    ("HTTP Error 403: Forbidden", {"http_status": 403, "where": "media"}, "media.403"),
    ("unable to download video data: HTTP Error 403: Forbidden", {}, "media.403"),
    ("HTTP Error 404: Not Found", {"where": "media"}, "media.404"),
    ("HTTP Error 410: Gone", {"where": "media"}, "media.410"),
    ("HTTP Error 416: Range", {"where": "media"}, "media.416"),
    ("HTTP Error 404: Not Found", {"where": "extract"}, "gone.unspecified"),
    ("2293760 bytes read, 7348002 more expected", {"where": "media"}, "media.truncated"),
    ("IncompleteRead(5 bytes read)", {"where": "extract"}, "net.reset"),
    ("Invalid data found when processing input", {"exception": "InvalidDataError"}, "media.not_media"),
    ("[Errno 28] No space left on device", {"exception": "OSError"}, "local.disk"),
    ("", {"exception": "MemoryError"}, "local.oom"),
    ("list index out of range", {"exception": "IndexError"}, "local.bug"),
    ("Something YouTube has never said before", {}, "unknown.unmapped"),
    ("", {}, "unknown.unmapped"),
]


@pytest.mark.parametrize(("message", "facts", "code"), CASES, ids=[f"{c}-{i}" for i, (_, _, c) in enumerate(CASES)])
def test_each_message_has_its_reason(message: str, facts: dict[str, object], code: str) -> None:
    assert classify(message, **facts).code == code


def test_every_reason_that_a_message_can_have_is_tested() -> None:
    assert {code for _, _, code in CASES} == set(REASONS) - MEASURED


def test_the_start_of_a_message_is_never_enough() -> None:
    rate_limited = classify("Video unavailable. This content isn't available, try again later")
    assert rate_limited.code.startswith("session.")
    assert rate_limited.retry == "session"
    assert rate_limited.about == "us"
    assert group(rate_limited.code) == "ours"
    bare = classify("Video unavailable")
    assert group(bare.code) == "unknown"
    assert bare.retry == "later"


def test_a_ledger_row_may_be_passed_whole() -> None:
    row = {
        "http_status": None,
        "where": "extract",
        "duration_s": 12.0,
        "client": "web",
        "exception": "ExtractorError",
        "expected": True,
    }
    assert classify("Private video", **row).code == "gone.private"


def test_groups_cover_every_reason() -> None:
    groups = {code: group(code) for code in REASONS}
    assert set(groups.values()) == {"gone", "denied", "content", "ours", "unknown", "absent"}
    assert {c for c, g in groups.items() if g == "gone"} == {c for c in REASONS if c.startswith("gone.")} - {
        "gone.unspecified"
    }
    assert groups["denied.copyright_country"] == "denied"
    assert groups["folder.absent"] == "absent"
    assert groups["qc.silent"] == groups["media.truncated"] == "content"
    assert (
        groups["session.bot_check"]
        == groups["net.timeout"]
        == groups["tool.no_format"]
        == groups["local.oom"]
        == "ours"
    )
    assert all(code == reason.code for code, reason in REASONS.items())


def test_an_unknown_code_is_refused_with_a_guess() -> None:
    with pytest.raises(ConfigError, match=r"unknown name 'gone.privat'. Did you mean 'gone.private'\?"):
        group("gone.privat")


def test_messages_are_normalised_for_the_ledger() -> None:
    raw = (
        "\x1b[0;31mERROR:\x1b[0m [youtube] --PJHxphWEs: Sign in to confirm you\u2019re not a bot. Use --cookies\n see x"
    )
    assert normalise(raw) == "Sign in to confirm you're not a bot"
    assert (
        normalise("[Errno 111] refused by 10.1.2.3 at https://a.b/c?sig=1")
        == "[Errno 111] refused by <address> at <url>"
    )


# every row of the table of words: one message per alternative of its pattern, as YouTube or yt-dlp says it
WORDS = [
    ("session.bot_check", "Sign in to confirm you're not a bot"),
    ("session.rate_limited", "This content isn't available, try again later."),
    ("session.rate_limited", "The current session has been rate-limited by YouTube for up to an hour"),
    ("session.captcha", "YouTube is requiring a captcha challenge before playback"),
    ("session.ip_blocked", "All player responses are invalid."),
    ("session.ip_blocked", "Your IP is likely being blocked by Youtube"),
    ("session.suspect", "This content isn't available"),
    ("session.suspect", "This content isn't available."),
    ("session.suspect", "The page needs to be reloaded."),
    ("tool.extractor_broken", "Failed to extract any player response"),
    ("tool.extractor_broken", "Unable to extract yt initial data"),
    ("tool.extractor_broken", "No video formats found!"),
    ("tool.extractor_broken", "Signature solving failed: some formats may be missing"),
    ("tool.extractor_broken", "n challenge solving failed: some formats may be missing"),
    ("tool.extractor_broken", "No supported JavaScript runtime could be found"),
    ("tool.no_format", "Requested format is not available"),
    ("gone.account_terminated", "The YouTube account associated with this video has been terminated."),
    (
        "gone.account_terminated",
        "This video is no longer available because the YouTube account associated with this video has been terminated "
        "due to multiple third-party notifications of copyright infringement.",
    ),
    ("gone.account_closed", "This video is no longer available because the uploader has closed their YouTube account."),
    ("gone.removed_uploader", "This video has been removed by the uploader"),
    ("gone.removed_uploader", "This video has been removed by the user"),
    ("gone.removed_policy", "This video has been removed for violating YouTube's policy on nudity or sexual content"),
    ("gone.removed_policy", "This video has been removed for violating YouTube's Terms of Service"),
    ("gone.removed_policy", "This video has been removed for violating YouTube's Community Guidelines"),
    ("gone.copyright_claim", "This video is no longer available due to a copyright claim by Somebody's Music, Inc."),
    ("gone.copyright_claim", "This video was taken down for copyright infringement"),
    ("gone.copyright_blocked", "This video contains content from X, who has blocked it on copyright grounds."),
    (
        "denied.copyright_country",
        "This video contains content from X, who has blocked it in your country on copyright grounds.",
    ),
    ("denied.geo", "The uploader has not made this video available in your country"),
    ("gone.private", "Private video. Sign in if you've been granted access to this video"),
    ("gone.private", "Private video. Please sign in to verify that you may see it."),
    ("gone.private", "This video is private."),
    ("denied.age", "Sign in to confirm your age. This video may be inappropriate for some users."),
    ("denied.age", "This video is age-restricted and only available on YouTube"),
    ("denied.age", "Age restricted"),
    ("denied.age", "This video may be inappropriate for some users."),
    ("denied.members", "Join this channel to get access to members-only content like this video"),
    ("denied.members", "This video is available to this channel's members on level: Fan (or any higher level)."),
    ("denied.paid", "This video requires payment to watch."),
    ("denied.paid", "This video is only available to Music Premium members"),
    ("denied.paid", "This video is only available with YouTube Premium"),
    ("denied.login", "Login details are needed to download this content"),
    ("denied.login", "Please sign in"),
    ("live.upcoming", "Premieres in 3 hours"),
    ("live.upcoming", "Premiere will begin shortly"),
    ("live.upcoming", "This live event will begin in a few moments."),
    ("live.ended", "This live event has ended."),
    ("live.ended", "This live stream recording is not available."),
    ("live.processing", "We're processing this video. Check back later."),
    ("live.processing", "live_status is post_live"),
    ("denied.drm", "This video is DRM protected"),
    ("denied.client", "The following content is not available on this app."),
    ("denied.client", "This video is not available"),
    ("denied.client", "This video is not available."),
    ("gone.unspecified", "This video is unavailable"),
    ("gone.unspecified", "This video does not exist"),
]


@pytest.mark.parametrize(("code", "words"), WORDS, ids=[f"{c}-{i}" for i, (c, _) in enumerate(WORDS)])
@pytest.mark.parametrize("apostrophe", ["'", "\u2019", "\u2018"])
@pytest.mark.parametrize(
    "frame",
    [
        "{}",
        "Video unavailable. {}",
        "ERROR: [youtube] -a_b-c_d-e1: {}",
        "\x1b[0;31mERROR:\x1b[0m [youtube] abcdefghijk: Video unavailable. {}",
        "{hinted}. Use --cookies-from-browser or --cookies for the authentication. See  https://a.b/c for how",
    ],
)
def test_every_row_of_the_table_in_every_dress(code: str, words: str, apostrophe: str, frame: str) -> None:
    said = words.replace("'", apostrophe)
    assert classify(frame.format(said, hinted=said.rstrip("."))).code == code
    assert classify(frame.format(said, hinted=said.rstrip(".")).upper()).code == code


def test_the_table_of_words_is_tested_whole() -> None:
    """Every alternative of every pattern is what decides for some message above."""
    rows = [(code, part) for table in (reasons._EARLY, reasons._MESSAGES) for code, pattern in table
            for part in _alternatives(pattern)]  # fmt: skip
    said = [(code, words.lower()) for code, words in [*WORDS, ("gone.unspecified", "video unavailable")]]
    untested = [row for row in rows if not any(code == row[0] and re.search(row[1], words) for code, words in said)]
    assert untested == []


def _alternatives(pattern: str) -> list[str]:
    """A pattern's alternatives, those within one pair of brackets spelled out."""
    inner = re.search(r"\((?!\?)([^)]*)\)", pattern)
    if inner:
        return [p for word in inner[1].split("|") for p in _alternatives(pattern.replace(inner[0], word))]
    return pattern.split("|")


def test_a_bare_start_proves_nothing_and_an_answer_of_the_media_host_is_not_the_pages() -> None:
    for bare in ("Video unavailable", "video unavailable.", "ERROR: [youtube] abcdefghijk: Video unavailable"):
        assert classify(bare).code == "gone.unspecified"
        assert POLICIES[classify(bare).code].confirmations == 2
    # words of a page have no place in what the media host says
    assert classify("This video is unavailable", where="media").code == "unknown.unmapped"
    assert classify("Sign in to confirm you're not a bot", where="media").code == "session.bot_check"


def test_every_reason_has_a_policy_that_agrees_with_it() -> None:
    assert set(POLICIES) == set(REASONS)
    for code, policy in POLICIES.items():
        retry = REASONS[code].retry
        assert policy.group == group(code), code
        assert policy.is_counted == (group(code) not in ("ours", "absent") or code[:4] in ("net.", "medi")), code
        if retry == "session":
            assert not policy.is_counted, code
        if policy.confirmations == 1:
            assert retry == "never", code
            assert group(code) in ("gone", "denied", "content"), code
        if retry in ("soon", "later"):
            assert policy.delays_s, code
        if policy.confirmations > 1:  # the wait is long enough for the next observation to count
            assert policy.delays_s == (policy.gap_s,), code
        assert list(policy.delays_s) == sorted(policy.delays_s), code


def test_the_policies_are_those_of_the_design() -> None:
    hour, day = 3600.0, 86_400.0
    for code in ("session.bot_check", "session.captcha", "session.ip_blocked"):
        assert POLICIES[code].delays_s == (day, 2 * day, 3 * day)
    assert POLICIES["session.rate_limited"].delays_s == (hour,)
    assert POLICIES["session.http_429"].delays_s[:4] == (900, 1800, 3600, 7200)
    assert {c for c, p in POLICIES.items() if p.recheck_s} == {
        c for c in REASONS if c.startswith(("gone.", "denied."))
    } | {"live.ended"}
    assert {p.recheck_s for p in POLICIES.values()} == {None, 90 * day}
    suspicions = {c: (p.confirmations, p.gap_s) for c, p in POLICIES.items() if p.confirmations > 1}
    assert suspicions == {
        "gone.unspecified": (2, day), "live.ended": (2, 7 * day), "denied.client": (2, day),
    }  # fmt: skip
    assert POLICIES["live.processing"].delays_s == (6 * hour,)
    assert POLICIES["live.upcoming"].delays_s == (day,)
    for code in (c for c in REASONS if c.startswith("net.")):
        policy = POLICIES[code]
        assert (policy.delays_s[0], policy.delays_s[-1], policy.max_attempts) == (2, 600, 6)
        assert sum(policy.delays_s) < 2 * day


def test_the_version_changes_exactly_when_the_rules_do() -> None:
    source = Path(reasons.__file__).read_text()

    def version(text: str) -> str:
        module: dict[str, Any] = {"__name__": reasons.__name__}
        exec(compile(text, "reasons", "exec"), module)
        return str(module["RULE_VERSION"])

    assert version(source) == RULE_VERSION
    assert re.fullmatch("[0-9a-f]{8}", RULE_VERSION)
    assert version(source.replace("# First match wins.", "# The first match wins.")) == RULE_VERSION
    for old, new in [
        (r"requiring a captcha challenge", r"requiring a captcha"),
        ("private video|", ""),
        ('"SSLError": "net.tls"', '"SSLError": "net.connect"'),
        ('"ZeroDivisionError",', ""),
        ('404: "gone.unspecified"', '404: "media.404"'),
        ("use --cookies|", ""),
    ]:
        assert old in source
        assert version(source.replace(old, new)) != RULE_VERSION, old
