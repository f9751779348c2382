"""A real browser for tests: Chromium without a window, driven by its DevTools protocol.

Messages go through a pair of pipes (``--remote-debugging-pipe``), each ended by a null byte, so no
driver and no WebSocket library is needed.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # which root may not use; the pages are our own
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
)
_SECONDS = 20.0


class Page:
    """A tab.

    Attributes:
        requests: The addresses of all requests that it has made.
        problems: Errors and warnings of its console, refusals by its policy among them.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.problems: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "Accessibility"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        ends = time.monotonic() + _SECONDS
        while (found := self._next(ends)).get("id") != self._count:
            self._note(found)
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        return dict(found["result"])

    def _next(self, ends: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, ends - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            self._buffer += os.read(self._read, 2**20)
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    def _note(self, event: dict[str, Any]) -> None:
        match event:
            case {"method": "Network.requestWillBeSent", "params": params}:
                self.requests.append(params["request"]["url"])
            case {"method": "Runtime.exceptionThrown", "params": params}:
                self.problems.append(str(params["exceptionDetails"]))
            case {"method": "Log.entryAdded", "params": {"entry": entry}}:
                if entry["level"] in ("error", "warning"):
                    self.problems.append(entry["text"])

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def open(self, url: str) -> None:
        """Go to an address, and wait until the page is complete."""
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def wait(self, script: str, seconds: float = _SECONDS) -> None:
        """Wait until an expression is true."""
        ends = time.monotonic() + seconds
        while not self.evaluate(script):
            if time.monotonic() > ends:
                raise TimeoutError(f"{script} is not true after {seconds} s")
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press a key, such as ``Tab`` or ``Enter``."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        code = {"Tab": 9, "Enter": 13, " ": 32}[key]
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if kind == "keyDown" and text else {}
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more
            )

    def appear(
        self, *, width: int = 1280, height: int = 900, scale: float = 1, **media: str
    ) -> None:
        """Set the window's size in CSS pixels, and media features such as color_scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )
        features = [
            {"name": f"prefers-{name.replace('_', '-')}", "value": value}
            for name, value in media.items()
        ]
        self.send("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Write a screenshot: of the whole page, or of what is visible."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def tree(self) -> list[tuple[str, str]]:
        """The role and name of every element that a screen reader finds."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [
            (str(node["role"]["value"]), str(node.get("name", {}).get("value", "")))
            for node in nodes
            if not node.get("ignored")
        ]


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Start a browser with a fresh profile, and end it with the context.

    Raises:
        FileNotFoundError: There is none on this machine.
    """
    if PROGRAM is None:
        raise FileNotFoundError("no Chromium")
    theirs, write = os.pipe()
    read, back = os.pipe()

    def pipes() -> Callable[[], None]:
        def place() -> None:  # in the child: its ends become 3 and 4
            ends = [os.dup(theirs), os.dup(back)]
            for number, end in zip((3, 4), ends, strict=True):
                os.dup2(end, number)

        return place

    words = [PROGRAM, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=pipes(),
        close_fds=False,
    )
    os.close(theirs)
    os.close(back)
    try:
        yield Page(read, write)
    finally:
        os.close(write)
        os.close(read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
