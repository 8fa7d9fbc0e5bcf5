"""A headless Chromium for tests, driven through its debugging pipe: no library, no port."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
OPTIONS = (
    "--headless=shell", "--no-sandbox", "--no-zygote", "--single-process", "--in-process-gpu", "--use-gl=angle",
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-first-run", "--remote-debugging-pipe",
)  # fmt: skip
# The browser reads its commands from descriptor 3 and answers on 4; both are first moved out of each other's way.
START = """
import os, sys
there, back = (os.dup(int(number)) for number in sys.argv[1:3])
while min(there, back) < 5:
    there, back = os.dup(there), os.dup(back)
os.dup2(there, 3), os.dup2(back, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser():
    """The path of a Chromium: what MINISFT_BROWSER names, or one on the PATH; None where there is none."""
    return os.environ.get("MINISFT_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. `problems` are its console's errors, its uncaught exceptions and its requests to other origins."""

    def __init__(self, path):
        self.folder = tempfile.TemporaryDirectory(prefix="browser-")
        there, self.write = os.pipe()
        self.read, back = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(there), str(back), path, *OPTIONS, f"--user-data-dir={self.folder.name}"],
            pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(there)
        os.close(back)
        os.set_blocking(self.read, False)
        self.buffer, self.number, self.problems, self.session, self.origin = b"", 0, [], None, None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send("Page.setLifecycleEventsEnabled", enabled=True)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)
        self.folder.cleanup()

    def open(self, page, width=1100, dark=False, height=900, mobile=False, fresh=False):
        """Load a file or an http URL in a window of that size, light or dark, and wait until its scripts have run.

        `fresh`: the page finds nothing that an earlier page kept in its session storage.
        """
        self.problems.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        url = str(page) if str(page).startswith("http://") else Path(page).resolve().as_uri()
        self.origin = urlsplit(url)[:2]
        forget = "try { sessionStorage.clear(); } catch {}" if fresh else ""
        script = self.send("Page.addScriptToEvaluateOnNewDocument", source=forget)["identifier"]
        self._loaded(self.send("Page.navigate", url=url)["loaderId"])
        self.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script)

    def _loaded(self, loader=None):
        """Wait until a page is loaded, the one of a loader or any new one, and drawn."""

        def is_load(message):
            event = message.get("params", {})
            found = message.get("method") == "Page.lifecycleEvent" and event["name"] == "load"
            return found and loader in (None, event["loaderId"])

        self._until(is_load)
        drawn = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
        self.send("Runtime.evaluate", expression=drawn, awaitPromise=True)

    def reload(self):
        self.send("Page.reload")
        self._loaded()

    def allow(self, origin, downloads):
        """Let the pages of an origin use the clipboard, and put downloads into a folder."""
        names = ["clipboardReadWrite", "clipboardSanitizedWrite"]
        self.send("Browser.grantPermissions", origin=origin, permissions=names)
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    # --- what a reader does

    def hover(self, selector, across, down):
        """Move the pointer over an element, to shares of its width and height."""
        self.mouse("mouseMoved", *self._place(selector, across, down))

    def click(self, selector):
        place = self._place(selector, 0.5, 0.5)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, *place, button="left", clickCount=1)

    def type(self, selector, text):
        """Write `text` into a field in place of what it holds."""
        self.run(f"(() => {{ const field = {_find(selector)}; field.focus(); field.select(); }})()")
        self.send("Input.insertText", text=text)

    def press(self, key, shift=False):
        """Press and release a key that is named as in JavaScript, such as Enter or Tab, in what has the focus."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        more = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code[key],
                modifiers=8 if shift else 0, **(more if kind == "keyDown" else {}),
            )  # fmt: skip

    def mouse(self, kind, x, y, **more):
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    # --- what a reader sees

    def text(self, selector):
        return self.run(f"{_find(selector)}.textContent")

    def run(self, script):
        """The value of a JavaScript expression in the page; of a promise, what it becomes."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script, seconds=20):
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"never true: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def _place(self, selector, across, down):
        x, y, width, height = self.run(
            f"(() => {{ const node = {_find(selector)}; node.scrollIntoView({{block: 'center'}});"
            "const box = node.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })()"
        )
        return x + across * width, y + down * height

    # --- the protocol (https://chromedevtools.github.io/devtools-protocol/)

    def send(self, method, **parameters):
        self.number += 1
        number = self.number
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda message: message.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def _until(self, wanted, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            text, found, rest = self.buffer.partition(b"\0")
            if found:
                self.buffer = rest
                message = json.loads(text)
                self._note(message)
                if wanted(message):
                    return message
                continue
            try:
                self.buffer += os.read(self.read, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
        raise TimeoutError("the browser did not answer")

    def _note(self, message):
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown" or (
            method == "Log.entryAdded" and parameters["entry"]["level"] == "error"
        ) or (method == "Runtime.consoleAPICalled" and parameters["type"] == "error"):  # fmt: skip
            self.problems.append(parameters)
        if method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            inside = self.origin and self.origin[0] == "http" and urlsplit(url)[:2] == self.origin
            if not inside and not url.startswith(("file:", "about:", "data:", "blob:")):
                self.problems.append(url)


def _find(selector):
    return f"document.querySelector({json.dumps(selector)})"
