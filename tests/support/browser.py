"""Headless Chromium for tests of pages, controlled over its debugging pipe. No driver or library is needed besides the browser."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

PATIENCE = 120.0
"""Time limit of a command in seconds, after which the test fails."""
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def found() -> str | None:
    """Return the path of this machine's browser, or None. CHROMIUM can name one that is not on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. ``complaints`` lists console messages, exceptions and violations of the content security policy."""

    def __init__(self, command: str) -> None:
        self._profile = tempfile.TemporaryDirectory(
            ignore_cleanup_errors=True
        )  # the browser's processes end one by one and write files until they end
        take, give_in = os.pipe()
        take_out, give = os.pipe()
        options = ["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        options += [f"--user-data-dir={self._profile.name}", "--disable-dev-shm-usage", "--disable-background-networking"]
        shell = f'exec "$0" "$@" 3<&{take} 4>&{give}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, command, *options],
            pass_fds=(take, give),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(take)
        os.close(give)
        self._to, self._from = os.fdopen(give_in, "wb", 0), os.fdopen(take_out, "rb", 0)
        self._waiting, self._number = b"", 0
        self._session: str | None = None
        self._loaded = 0
        self._until = 0.0
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._to.close()
        self._from.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol, and return its result."""
        self._number += 1
        self._until = time.monotonic() + PATIENCE
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._from], [], [], max(0.0, self._until - time.monotonic()))
            assert ready, f"the page did not come to it in {PATIENCE:.0f} s; the console said: {self.complaints}"
            part = self._from.read(1 << 16)
            assert part, "the browser has ended"
            self._waiting += part
        line, _, self._waiting = self._waiting.partition(b"\0")
        event: dict[str, Any] = json.loads(line)
        if event.get("method") == "Page.loadEventFired":
            self._loaded += 1
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(event["params"]["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            self.complaints.append(str(event["params"]["entry"]["text"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(str(event["params"]["args"]))
        elif event.get("method") == "Inspector.targetCrashed":
            raise AssertionError("the page's process has ended")
        elif event.get("method") == "Page.javascriptDialogOpening":
            raise AssertionError(f"a dialog was opened: {event['params']}")
        return event

    def open(self, url: str) -> None:
        """Open a page, and wait until it has loaded."""
        before = self._loaded
        self.call("Page.navigate", url=url)
        while self._loaded == before:
            self._next()

    def run(self, script: str) -> Any:
        """Return the value of an expression. A promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key."""
        text = key if len(key) == 1 else ""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **({"text": text} if text and kind == "keyDown" else {}))

    def look(self, width: int, height: int) -> None:
        """Set the size of the window in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write a PNG of the visible part of the page, or of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
