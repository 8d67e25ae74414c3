"""Pages as a browser shows them: Chromium, at the widths of a desktop and of a small window."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTHS = (1280, 500)

_FIND = """() => {
  const root = document.documentElement, width = root.clientWidth, body = document.body;
  const all = [...body.querySelectorAll('*')], short = e => e.outerHTML.slice(0, 80), found = [];
  // what scrolls within a box of its own may be as wide as it likes
  const boxed = e => e !== body && (getComputedStyle(e).overflowX !== 'visible' || boxed(e.parentElement));
  const scrolls = e => e.scrollWidth > e.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(e).overflowX);
  for (const e of all.filter(scrolls)) found.push(`scrolls sideways: ${short(e)}`);
  if (root.scrollWidth > width) found.push(`wider than the window by ${root.scrollWidth - width}`);
  for (const e of all.filter(e => e.getBoundingClientRect().right > width + 0.5 && !boxed(e.parentElement)).slice(0, 3))
    found.push(`sticks out: ${short(e)}`);

  const light = color => {
    const parts = color.match(/[0-9.]+/g).map(Number);
    const linear = parts.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return parts[3] === 0 ? null : 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const ground = e => e === null ? 1 : light(getComputedStyle(e).backgroundColor) ?? ground(e.parentElement);
  const walker = document.createTreeWalker(body, NodeFilter.SHOW_TEXT), range = document.createRange();
  for (let node; node = walker.nextNode();) {
    const parent = node.parentElement, [a, b] = [light(getComputedStyle(parent).color), ground(parent)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (node.data.trim() && contrast < 4.5) found.push(`contrast ${contrast.toFixed(1)}: ${node.data.slice(0, 40)}`);
    // longer ones are hashes
    for (const word of node.data.matchAll(/(?<![\\p{L}\\p{N}])[\\p{L}\\p{N}]{2,30}(?![\\p{L}\\p{N}])/gu)) {
      range.setStart(node, word.index), range.setEnd(node, word.index + word[0].length);
      const rows = new Set([...range.getClientRects()].map(r => Math.round(r.top)));
      if (rows.size > 1) found.push(`broken within a word: ${word[0]}`);
    }
  }

  if (!root.lang) found.push('no language');
  for (const e of all.filter(e => e.tagName === 'IMG' && !e.alt)) found.push(`no alternative text: ${short(e)}`);
  const levels = all.filter(e => /^H[1-6]$/.test(e.tagName)).map(e => Number(e.tagName[1]));
  levels.forEach((level, i) => { if (level > (levels[i - 1] ?? 0) + 1) found.push(`heading ${i + 1} skips a level`); });
  return found;
}"""


@dataclass(frozen=True)
class Shown:
    """What became of a page: why it should not be shown so, none if it may; and a PNG of all of it."""

    problems: list[str]
    screenshot: bytes


class Browser:
    """A running Chromium, playwright's."""

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium

    def show(self, page: Path, width: int, scheme: str = "light") -> Shown:
        """Opens a file in a window of this width, in the light or dark scheme.

        Problems are what sticks out of the window or scrolls sideways, words broken over two lines, low contrast,
        missing headings and texts, errors and warnings of the console, scripts that fail, and requests for anything
        else.
        """
        told: list[str] = []
        asked: list[str] = []
        with contextlib.closing(
            self._chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        ) as context:
            tab = context.new_page()
            tab.on("console", lambda message: told.append(f"console: {message.type}: {message.text}"))
            tab.on("pageerror", lambda error: told.append(f"script: {error}"))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(page.as_uri(), wait_until="load")
            told += tab.evaluate(_FIND)
            told += [f"asks for {url[:80]}" for url in asked[1:] if not url.startswith("data:")]
            return Shown(told, tab.screenshot(full_page=True))


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Chromium, in a profile of its own.

    Raises:
        RuntimeError, ImportError: it, or playwright, is not installed.
    """
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        raise RuntimeError("no browser was found: apt-get install chromium")
    flags = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
    flags += ["disable-background-networking", "disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[f"--{name}" for name in flags])
        try:
            yield Browser(browser)
        finally:
            browser.close()
