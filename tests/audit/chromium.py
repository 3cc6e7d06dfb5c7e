"""Headless Chromium by its DevTools protocol over two pipes: no driver, no port, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
START = (
    "--headless=new",
    "--no-sandbox",  # test machines often run as root, where the sandbox does not start
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
)
# the browser reads commands from descriptor 3 and writes to 4, whatever the pipes are called here
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for at, end in enumerate(ends, 3):
    os.dup2(end, at)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Chromium:
    """One page in one browser. `errors` gathers console errors, exceptions and refusals by the content policy."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        if BROWSER is None:
            raise FileNotFoundError("no chromium or google-chrome on PATH")
        self.timeout_s = timeout_s
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.n_sent = 0
        self.unread = b""
        self.events: list[dict[str, Any]] = []
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (their_in, self.out), (self.into, their_out) = os.pipe(), os.pipe()
        profile = f"--user-data-dir={self.profile.name}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(their_in), str(their_out), BROWSER, *START, profile],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self.session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.page(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self.out)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.into)
        self.profile.cleanup()

    def call(self, method: str, params: Mapping[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        """The browser's answer to one command. Raises RuntimeError for an error, TimeoutError where none comes."""
        self.n_sent += 1
        number = self.n_sent
        command = {"id": number, "method": method, "params": dict(params or {})}
        text = json.dumps(command | ({"sessionId": session} if session else {})).encode() + b"\0"
        while text:
            text = text[os.write(self.out, text) :]
        ends = time.monotonic() + self.timeout_s
        while True:
            answer = self._read(ends)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._event(answer)

    def page(self, method: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self.call(method, params, self.session)

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False, scripts: bool = True) -> None:
        """Open a file at a size and in a theme, and wait until it has loaded."""
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.page("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.page("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.page("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        self.events.clear()
        self.page("Page.navigate", {"url": path.as_uri()})
        ends = time.monotonic() + self.timeout_s
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self._event(self._read(ends))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; promises are awaited, exceptions raised."""
        asked = {"expression": script, "returnByValue": True, "awaitPromise": True}
        found = self.page("Runtime.evaluate", asked)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def shot(self, path: Path, clip: Sequence[float] | None = None) -> None:
        """A picture of the whole page, or of (x, y, width, height) of it in CSS pixels."""
        options: dict[str, Any] = {"format": "png", "captureBeyondViewport": True}
        if clip is not None:
            options["clip"] = dict(zip(("x", "y", "width", "height"), clip, strict=True)) | {"scale": 1}
        path.write_bytes(base64.b64decode(self.page("Page.captureScreenshot", options)["data"]))

    def _read(self, ends: float) -> dict[str, Any]:
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.into], [], [], max(0.0, ends - time.monotonic()))
            if not ready:
                raise TimeoutError(f"the browser said nothing for {self.timeout_s:g} s")
            more = os.read(self.into, 1 << 16)
            if not more:
                raise ConnectionError("the browser ended")
            self.unread += more
        text, _, self.unread = self.unread.partition(b"\0")
        return dict(json.loads(text))

    def _event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        said = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(said["exceptionDetails"])[:500])
        if event["method"] == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(said["args"])[:500])
        if event["method"] == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(said["entry"]["text"])
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
