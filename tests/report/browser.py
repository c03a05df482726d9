"""A headless Chromium, driven by its DevTools protocol.

What a page asks of the network, writes to the console or throws is kept, so that a test can
say that there was none of it.
"""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-port=0",
)
PATIENCE_SECONDS = 60.0


class Page:
    """One page of the browser."""

    def __init__(self, socket: websocket.WebSocket) -> None:
        self._socket = socket
        self._last_id = 0
        self.requests: list[str] = []
        """Addresses asked for, the page itself left out."""
        self.problems: list[str] = []
        """Exceptions, console errors and warnings, and what the browser itself logged."""
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, width: int = 1200, height: int = 900) -> "Page":
        """Load a file and wait until its scripts say that all is drawn."""
        self.resize(width, height)
        self._call("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("document.body && document.body.dataset.ready === 'yes'")
        return self

    def resize(self, width: int, height: int) -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise AssertionError(f"never came true: {condition}; {self.problems}")
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """Text of the first element that a selector finds."""
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def texts(self, selector: str) -> list[str]:
        """Text of every element that a selector finds."""
        return self.run(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)"
        )

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def fill(self, selector: str, text: str) -> None:
        """Type into an input, or choose in a select, as a user does."""
        self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            f"e.value = {json.dumps(text)};"
            f"e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change')); }})()"
        )

    def hover(self, selector: str) -> None:
        """Move the mouse over an element."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const b = e.getClientRects()[0]; return [b.x + b.width / 2, b.y + b.height / 2];"
            "})()"
        )
        for offset in (3, 0):
            self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x + offset, y=y)

    def mouse_click(self, x: float, y: float) -> None:
        """Press and release the mouse at a place in the window."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """Save the whole page as a PNG image."""
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent" and parameters.get("type") != "Document":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.problems.append(json.dumps(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(json.dumps(parameters["entry"]))


class Browser:
    """A running Chromium."""

    def __init__(self, port: int, browser_path: str) -> None:
        self._port = port
        self._socket = websocket.create_connection(
            f"ws://127.0.0.1:{port}{browser_path}",
            timeout=PATIENCE_SECONDS,
            suppress_origin=True,
        )
        self._last_id = 0

    @contextmanager
    def page(self) -> Iterator[Page]:
        """A fresh page."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        socket = websocket.create_connection(
            f"ws://127.0.0.1:{self._port}/devtools/page/{target}",
            timeout=PATIENCE_SECONDS,
            suppress_origin=True,
        )
        try:
            yield Page(socket)
        finally:
            socket.close()
            self._call("Target.closeTarget", targetId=target)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last_id += 1
        self._socket.send(json.dumps({"id": self._last_id, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._last_id:
                return answer["result"]


def find_chromium() -> str | None:
    """Where Chromium is; None if it is not installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile; end it afterwards."""
    program = find_chromium()
    if program is None:
        raise AssertionError("Chromium is not installed: apt-get install chromium")
    process = subprocess.Popen(
        [program, *SWITCHES, f"--user-data-dir={profile}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        announced = profile / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (announced.exists() and len(announced.read_text().splitlines()) == 2):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("Chromium did not start")
            time.sleep(0.05)
        port, path = announced.read_text().splitlines()
        yield Browser(int(port), path)
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE_SECONDS)
