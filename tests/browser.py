"""Pages in a real browser: what a reader would see, asked by a script in a page around them."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# In CI a missing browser is a failure, as a tool that is not there.
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no Chromium here: apt-get install chromium"
)

_FRAME = """<!DOCTYPE html><meta charset="utf-8">
<iframe id="page" src="{page}" style="width:{width}px;height:900px;border:0"></iframe><pre id="seen"></pre><script>
document.getElementById("page").onload = (event) => {{
  const inside = event.target.contentDocument;
  const shown = (kind) => [...inside.querySelectorAll(kind)].filter((each) => each.getBoundingClientRect().width > 100);
  document.getElementById("seen").textContent = JSON.stringify({{
    width: inside.documentElement.scrollWidth,
    charts: shown("svg").map((each) => each.getAttribute("aria-label")),
    pictures: shown("img").filter((each) => each.complete && each.naturalWidth > 0).length,
    paper: getComputedStyle(inside.body).backgroundColor,
    ink: getComputedStyle(inside.querySelector("svg text") || inside.body).fill,
    loaded: event.target.contentWindow.performance.getEntriesByType("resource").map((each) => each.name),
  }});
}};
</script>"""


def look_at(page: Path, width: int, dark: bool = False) -> dict[str, object]:
    """Return what a browser window shows of a page; fail on anything in its console."""
    assert CHROMIUM, "no Chromium here: apt-get install chromium"
    frame = page.with_suffix(f".{width}.html")
    frame.write_text(_FRAME.format(page=page.name, width=width))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--allow-file-access-from-files",
    ]
    options += ["--virtual-time-budget=10000", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [CHROMIUM, *options, f"--window-size={width},900", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert seen and seen[1], done.stdout[-2000:]
    return json.loads(seen[1].replace("&amp;", "&").replace("&gt;", ">").replace("&lt;", "<"))
