"""A tab of Debian's Chromium, driven through its DevTools; and the mark of tests that need it."""

import base64
import contextlib
import json
import pathlib
import shutil
import subprocess
import time
import urllib.request
from typing import Any

import pytest
from websockets.sync import client

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needed = pytest.mark.skipif(
  not CHROMIUM, reason="no chromium on the path: apt-get install chromium"
)
_TOLD = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


class Tab:
  """A page in a browser of its own; a context, at whose end the browser has gone.

  Attributes:
    told: what the console, and exceptions that nothing caught, said.
  """

  def __init__(
    self, profile: pathlib.Path, width: int = 1200, height: int = 800, dark: bool = False
  ):
    command = [
      CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
      f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    self._number, self.told = 0, list[str]()
    with contextlib.ExitStack() as stack:
      log = stack.enter_context((profile.parent / f"{profile.name}.log").open("w"))
      process = subprocess.Popen(command, stderr=log)
      stack.callback(process.wait)
      stack.callback(process.terminate)
      port = profile / "DevToolsActivePort"
      self._wait(lambda: port.exists() and port.read_text().count("\n"))
      with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
        (page,) = (tab for tab in json.load(answer) if tab["type"] == "page")
      connection = client.connect(page["webSocketDebuggerUrl"], max_size=None)
      self._socket = stack.enter_context(connection)
      self._prepare(width, height, dark)
      self._stack = stack.pop_all()

  def _prepare(self, width: int, height: int, dark: bool) -> None:
    for domain in ("Page", "Runtime", "Log"):
      self._call(f"{domain}.enable")
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    self._call("Emulation.setDeviceMetricsOverride", **size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    self._call("Emulation.setEmulatedMedia", features=[scheme])

  def __enter__(self) -> "Tab":
    return self

  def __exit__(self, *exc: object) -> None:
    self._stack.close()

  def _wait(self, ready: Any, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (found := ready()):
      assert time.monotonic() < end, "waited in vain"
      time.sleep(0.02)
    return found

  def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
    self._number += 1
    message = {"id": self._number, "method": method, "params": parameters}
    self._socket.send(json.dumps(message))
    while True:
      said = json.loads(self._socket.recv())
      if said.get("method") in _TOLD:
        self.told.append(json.dumps(said["params"]))
      if said.get("id") == self._number:
        assert "error" not in said, said
        return said["result"]

  def open(self, address: str) -> None:
    """Goes to an address, and waits until it is there."""
    self._call("Page.navigate", url=address)
    self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

  def value(self, script: str) -> Any:
    """Returns what an expression of JavaScript is in the page."""
    found = self._call("Runtime.evaluate", expression=script, returnByValue=True)
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")

  def until(self, script: str) -> None:
    """Waits until an expression is true."""
    self._wait(lambda: self.value(script))

  def click(self, selector: str) -> None:
    """Presses the mouse on the middle of an element."""
    box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
    place = self.value(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({box})")
    where = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
    for kind in ("mousePressed", "mouseReleased"):
      self._call("Input.dispatchMouseEvent", type=kind, **where)

  def press(self, key: str) -> None:
    """Presses a key, "ArrowLeft" or "t"."""
    text = {"text": key} if len(key) == 1 else {}
    self._call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
    self._call("Input.dispatchKeyEvent", type="keyUp", key=key)

  def write(self, selector: str, text: str) -> None:
    """Types a text into a field."""
    self.click(selector)
    self._call("Input.insertText", text=text)

  def picture(self, path: pathlib.Path) -> None:
    """Writes what is seen as a PNG."""
    path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))
