"""The report in a real browser: headless Chromium, driven through its pipe by the DevTools protocol.

The browser is the one that COMPRESS_BROWSER names, else the first on the path. COMPRESS_SHOTS=FOLDER keeps screenshots.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="matplotlib draws the report: pip install 'compress-llm[report]'")

import compress
from compress.passes.rtn import RTN
from compress.passes.spqr import SpQR
from compress.report import html

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = os.environ.get("COMPRESS_BROWSER") or next((p for n in NAMES if (p := shutil.which(n))), None)
SHOTS = os.environ.get("COMPRESS_SHOTS")
WAIT = 60

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: COMPRESS_BROWSER names one, or one of {', '.join(NAMES)}"),
    pytest.mark.xdist_group("browser"),
]


class Browser:
    """A browser with one page. `events` holds what it told, in order."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
                 "--remote-debugging-pipe", f"--user-data-dir={profile}"]  # fmt: skip

        # the protocol's pipes are the file descriptors 3 and 4
        line = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser} {to_browser}<&- {from_browser}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", line, program, *flags, "about:blank"], pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._bytes, self._count, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        pages = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        target = pages[0]["targetId"] if pages else self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **given: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": given}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + WAIT
        while True:
            found = self._next(end)
            if found.get("id") == self._count:
                assert "error" not in found, found
                return dict(found["result"])
            self.events.append(found)

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._bytes:
            assert select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0], "the browser does not answer"
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has ended"
            self._bytes += more
        one, _, self._bytes = self._bytes.partition(b"\0")
        return dict(json.loads(one))

    def open(self, page: Path) -> None:
        """Load a page and wait until it is there."""
        self.events.clear()
        self("Page.navigate", url=page.as_uri())
        end = time.monotonic() + WAIT
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next(end))

    def run(self, script: str) -> Any:
        """The value of an expression. What it raises fails the test."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def key(self, name: str, code: int, text: str = "") -> None:
        """Press a key."""
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        self("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self("Input.dispatchKeyEvent", type="keyUp", **common)

    def size(self, width: int, height: int, phone: bool = False) -> None:
        """The window."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def media(self, scheme: str = "", kind: str = "") -> None:
        """Which colours the system wants; "print" as kind."""
        wanted = [{"name": "prefers-color-scheme", "value": scheme}] if scheme else []
        self("Emulation.setEmulatedMedia", media=kind, features=wanted)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(WAIT)
        os.close(self._out)
        os.close(self._in)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert BROWSER is not None
    made = Browser(BROWSER, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def reports(toy: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one model and one of three."""
    folder = tmp_path_factory.mktemp("reports")
    (folder / "text.txt").write_text(text_file.read_text()[:3000])
    given = {"device": "cpu", "eval": str(folder / "text.txt"), "calib": str(folder / "text.txt"), "samples": 2}
    for name, method in (("three", RTN(bits=3, group_size=32)), ("four", RTN(bits=4, group_size=32)), ("spqr", SpQR())):
        compress.run(toy, method, folder / name, seq_len=32, **given)
    found = [folder / n for n in ("three", "four", "spqr")]
    html.write(found[:1], folder / "one.html", against=[toy])
    html.write(found, folder / "many.html", against=[toy], command="compress report three four spqr")
    return {n: folder / f"{n}.html" for n in ("one", "many")}


@pytest.mark.parametrize("name", ["one", "many"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_errors_no_requests_no_empty_section(
    browser: Browser, reports: dict[str, Path], name: str, scheme: str
) -> None:
    browser.size(1100, 800)
    browser.media(scheme)
    browser.open(reports[name])
    empty = browser.run(
        "[...document.querySelectorAll('main section')].filter(s => s.innerText.trim().length < 40 || "
        "![...s.children].some(c => c.tagName !== 'H2' && c.getBoundingClientRect().height > 10)).map(s => s.innerText)"
    )
    assert empty == []
    assert browser.run("document.querySelectorAll('main section').length") == 9
    drawn = "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height > 40).length"
    assert browser.run(drawn) >= 5
    for event in browser.events:
        method, params = event.get("method"), event.get("params", {})
        assert method not in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"), params
        if method == "Network.requestWillBeSent":
            assert params["request"]["url"].startswith(("file:", "data:")), params
    assert browser.run("performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length") == 0


def test_the_policy_forbids_the_network(browser: Browser, reports: dict[str, Path]) -> None:
    browser.open(reports["one"])
    found = browser.run("fetch('http://127.0.0.1:9/').then(() => 'sent', e => String(e))")
    assert "TypeError" in found
    assert any("Content Security Policy" in json.dumps(e) for e in browser.events)


def test_the_theme_switch_works_by_keyboard(browser: Browser, reports: dict[str, Path]) -> None:
    browser.media("light")
    browser.open(reports["many"])
    paper = "getComputedStyle(document.body).backgroundColor"
    assert browser.run(paper) == "rgb(255, 255, 255)"
    browser.run("document.getElementById('theme').focus()")
    browser.key("Enter", 13, "\r")
    dark = browser.run(paper)
    assert dark != "rgb(255, 255, 255)"
    assert "light" in browser.run("document.getElementById('theme').getAttribute('aria-label')")
    ink = "getComputedStyle(document.querySelector('svg text')).fill"
    assert browser.run(ink) != "rgb(27, 29, 33)"
    browser.media("light", "print")
    assert browser.run(paper) == "rgb(255, 255, 255)"  # on paper it is light, whatever was chosen
    browser.media("light")
    browser.run("document.getElementById('theme').focus()")
    browser.key("Enter", 13, "\r")
    assert browser.run(paper) == "rgb(255, 255, 255)"


def test_the_first_tab_skips_to_the_report_and_every_stop_is_seen(browser: Browser, reports: dict[str, Path]) -> None:
    browser.size(1100, 800)
    browser.media("light")
    browser.open(reports["many"])
    seen: list[str] = []
    for _ in range(12):
        browser.key("Tab", 9)
        seen.append(browser.run("document.activeElement.textContent.trim().slice(0, 30)"))
    assert seen[0] == "Skip to the report"
    assert "Warnings and fallbacks" in seen


def test_a_table_is_sorted_by_a_click(browser: Browser, reports: dict[str, Path]) -> None:
    browser.open(reports["many"])
    column = "[...document.querySelectorAll('#quality ~ .scroll tbody tr')].map(r => Number(r.cells[1].dataset.v))"
    browser.run("document.querySelectorAll('#quality ~ .scroll th button')[1].click()")
    up = browser.run(column)
    assert up == sorted(up)
    assert len(up) == 4
    browser.run("document.querySelectorAll('#quality ~ .scroll th button')[1].click()")
    assert browser.run(column) == up[::-1]


@pytest.mark.parametrize("name", ["one", "many"])
def test_a_phone_scrolls_down_only(browser: Browser, reports: dict[str, Path], name: str) -> None:
    browser.size(375, 700, phone=True)
    browser.media("light")
    browser.open(reports[name])
    for opened in (False, True):
        browser.run(f"document.querySelectorAll('details').forEach(d => d.open = {str(opened).lower()})")
        assert browser.run("document.documentElement.scrollWidth") <= 375
    small = browser.run(
        "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect()).filter(b => b.height > 0 && "
        "b.height < 8 && b.width > b.height).length"
    )
    assert small == 0, "text that is too small to read"


@pytest.mark.skipif(SHOTS is None, reason="COMPRESS_SHOTS names no folder for screenshots")
@pytest.mark.parametrize("name", ["one", "many"])
def test_screenshots(browser: Browser, reports: dict[str, Path], name: str) -> None:
    from PIL import Image

    given = os.environ.get(f"COMPRESS_PAGE_{name.upper()}")
    looks = {"light": (1100, "light", ""), "dark": (1100, "dark", ""), "phone": (375, "light", ""),
             "print": (720, "light", "print")}  # fmt: skip
    for look, (width, scheme, kind) in looks.items():
        browser.size(width, 900, phone=look == "phone")
        browser.media(scheme, kind)
        browser.open(Path(given) if given else reports[name])
        height = browser.run("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = browser("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path = Path(SHOTS or "") / f"{name}-{look}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot))
        Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    browser.media()
