"""A Chromium that is driven by its DevTools protocol over a pipe: pages that a server answers, and real drops."""

import json
import os
import subprocess
import time
from contextlib import contextmanager
from itertools import count

from browser import CHROMIUM

WAIT = 60  # seconds


class Tab:
    """A page; `requests` are the addresses that it has asked for, `problems` what its console has."""

    def __init__(self, reader, writer):
        self._reader, self._writer, self._buffer, self._ids = reader, writer, b"", count(1)
        self.requests, self.problems, self._session = [], [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _read(self):
        while b"\0" not in self._buffer:
            content = os.read(self._reader, 1 << 20)
            assert content, "Chromium has ended"
            self._buffer += content
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        values = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.problems.append(values["exceptionDetails"])
        elif event["method"] == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.problems.append(values["entry"])

    def evaluate(self, script):
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, script):
        """Evaluate a script until it gives something, and return that."""
        ends = time.monotonic() + WAIT
        while time.monotonic() < ends:
            if value := self.evaluate(script):
                return value
            time.sleep(0.1)
        raise AssertionError(f"{script} gives nothing: {self.evaluate('document.body.innerText')}")

    def drop(self, path, selector):
        """Drop a file on an element, as a person does: again where nothing came of it, as on a page that still loads.

        The element gives way to the picture.
        """
        script = f"(() => {{ const box = document.querySelector({selector!r})?.getBoundingClientRect();"
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        ends = time.monotonic() + WAIT
        while time.monotonic() < ends:
            box = self.wait_for(script + " return box && [box.x + box.width / 2, box.y + box.height / 2] })()")
            for kind in ("dragEnter", "dragOver", "drop"):
                self.call("Input.dispatchDragEvent", type=kind, x=box[0], y=box[1], data=data)
            retries = time.monotonic() + 5
            while time.monotonic() < retries:
                if self.evaluate(f"!document.querySelector({selector!r})"):
                    return
                time.sleep(0.1)
        raise AssertionError(f"{selector} takes nothing: {self.evaluate('document.body.innerText')}")


@contextmanager
def open_tab(address, profile, width=1280):
    """Open a page in a browser that can reach no other machine than this one."""
    assert CHROMIUM, "no Chromium here: apt-get install chromium"
    (child_in, writer), (reader, child_out) = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    options += [f"--window-size={width},1400", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    redirect = f'exec "$0" "$@" 3<&{child_in} 4>&{child_out}'
    browser = subprocess.Popen(
        ["bash", "-c", redirect, CHROMIUM, *options], pass_fds=(child_in, child_out), stderr=subprocess.DEVNULL
    )
    os.close(child_in)
    os.close(child_out)
    try:
        tab = Tab(reader, writer)
        tab.call("Page.navigate", url=address)
        yield tab
    finally:
        browser.kill()
        browser.wait()
        os.close(reader)
        os.close(writer)
