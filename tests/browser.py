"""Pages in a real browser: what a reader would see, asked by a script in a page around them."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# In CI a missing browser is a failure, as a tool that is not there.
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no Chromium here: apt-get install chromium"
)

_WINDOW = '<iframe src="{page}" style="width:{width}px;height:900px;border:0"></iframe>'
_FRAME = """<!DOCTYPE html><meta charset="utf-8">{windows}<pre id="seen"></pre><script>
const windows = [...document.querySelectorAll("iframe")], seen = {{}};
const look = (page) => {{
  const inside = page.contentDocument;
  const shown = (kind) => [...inside.querySelectorAll(kind)].filter((each) => each.getBoundingClientRect().width > 100);
  return {{
    width: inside.documentElement.scrollWidth,
    charts: shown("svg").map((each) => each.getAttribute("aria-label")),
    pictures: shown("img").filter((each) => each.complete && each.naturalWidth > 0).length,
    outside: [...inside.querySelectorAll("th, td, .card, h1, h2, p, li")]
      .filter((each) => each.getBoundingClientRect().right > inside.documentElement.clientWidth + 1)
      .map((each) => each.textContent.slice(0, 40)),
    paper: getComputedStyle(inside.body).backgroundColor,
    ink: getComputedStyle(inside.querySelector("svg text") || inside.body).fill,
    loaded: page.contentWindow.performance.getEntriesByType("resource").map((each) => each.name),
  }};
}};
windows.forEach((page, number) => page.onload = () => {{
  seen[number] = look(page);
  if (Object.keys(seen).length == windows.length)
    document.getElementById("seen").textContent = JSON.stringify(windows.map((_, number) => seen[number]));
}});
</script>"""


def look_at(page: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """Return what a browser window shows of a page; fail on anything in its console."""
    return look_in_windows(page, [width], dark)[0]


def look_in_windows(page: Path, widths: Sequence[int], dark: bool = False) -> list[dict[str, Any]]:
    """Return what windows of some widths show of a page, in one browser: to start it takes seconds."""
    assert CHROMIUM, "no Chromium here: apt-get install chromium"
    frame = page.with_suffix(".windows.html")
    windows = "".join(_WINDOW.format(page=page.name, width=width) for width in widths)
    frame.write_text(_FRAME.format(windows=windows))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--allow-file-access-from-files",
    ]
    options += ["--virtual-time-budget=10000", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [CHROMIUM, *options, f"--window-size={max(widths)},900", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert seen and seen[1], done.stdout[-2000:]
    return json.loads(seen[1].replace("&amp;", "&").replace("&gt;", ">").replace("&lt;", "<"))
