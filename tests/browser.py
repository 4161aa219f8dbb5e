"""A headless Chromium, controlled over its own protocol (chromedevtools.github.io/devtools-protocol)."""

import asyncio
import base64
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium")


@dataclass(frozen=True)
class Seen:
    """A page as displayed in a window."""

    complaints: list[str]
    """Console messages, exceptions, failed loads, and requests for anything but the page itself."""
    too_wide: int
    """Pixels by which the page is wider than the window."""
    pictures: int
    broken: int
    """Pictures that did not load."""
    screenshot: bytes


def look_at(page: Path, width: int, dark: bool) -> Seen:
    """Open a file in a window of `width` pixels, and return what the whole page looks like."""
    return asyncio.run(_look_at(page, width, dark))


async def _look_at(page: Path, width: int, dark: bool) -> Seen:
    assert CHROMIUM
    with tempfile.TemporaryDirectory() as profile:
        how = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        browser = subprocess.Popen([CHROMIUM, *how, "about:blank"], stderr=subprocess.PIPE, text=True)
        try:
            assert browser.stderr
            found = next((match for line in browser.stderr if (match := re.search(r"ws://([^/]+)/", line))), None)
            assert found, "Chromium did not start"
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{found[1]}/json/list") as answer:
                    (tab,) = [one for one in await answer.json() if one["type"] == "page"]
                async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    return await _seen(_Tab(socket), page, width, dark)
        finally:
            browser.kill()
            browser.wait()
            browser.communicate()


class _Tab:
    def __init__(self, socket: Any) -> None:
        self.socket, self.asked = socket, 0
        self.events: list[dict[str, Any]] = []

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.asked += 1
        await self.socket.send_json({"id": self.asked, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("id") == self.asked:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    async def value_of(self, expression: str) -> Any:
        asked = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        return (await self.ask("Runtime.evaluate", **asked))["result"].get("value")


async def _seen(tab: _Tab, page: Path, width: int, dark: bool) -> Seen:
    for domain in ("Log", "Runtime", "Network", "Page"):
        await tab.ask(f"{domain}.enable")
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    await tab.ask("Emulation.setEmulatedMedia", features=[scheme])
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    await tab.ask("Emulation.setDeviceMetricsOverride", **metrics)
    await tab.ask("Page.navigate", url=page.as_uri())
    loaded = "new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', done))"
    for _ in range(600):
        if await tab.value_of("location.href") == page.as_uri():
            break
        await asyncio.sleep(0.05)
    else:
        raise TimeoutError(page)
    await tab.value_of(loaded)
    await tab.value_of("document.fonts.ready.then(() => 0)")
    too_wide = await tab.value_of("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    pictures = await tab.value_of("document.images.length")
    broken = await tab.value_of("[...document.images].filter(image => !image.naturalWidth).length")
    shot = await tab.ask("Page.captureScreenshot", captureBeyondViewport=True)
    bad = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed")
    complaints = [str(event["params"]) for event in tab.events if event["method"] in bad]
    complaints += [
        event["params"]["request"]["url"][:80]
        for event in tab.events
        if event["method"] == "Network.requestWillBeSent"
        and not event["params"]["request"]["url"].startswith(("data:", page.as_uri()))
    ]
    return Seen(complaints, too_wide, pictures, broken, base64.b64decode(shot["data"]))
