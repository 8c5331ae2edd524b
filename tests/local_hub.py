"""A hub on this machine: what the Hugging Face hub's protocol needs to take a commit and to give files back."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

WRITER, READER = "hf_writer", "hf_reader"  # its tokens


class Hub:
    """Its state: repositories with the files of their last commit."""

    def __init__(self, address):
        self.address = address
        self.repositories, self.private, self.blobs, self.messages = {}, set(), {}, []
        self.failing = set()  # parts of paths that get a 500

    @property
    def commit(self):
        return hashlib.sha1(repr(self.messages).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, content=b"{}", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuses(self, writes):
        """Answer what this token may not do."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        hub = self.server.hub
        if any(part in self.path for part in hub.failing):
            self.reply(500, {"error": "broken"})
        elif token not in (WRITER, READER):
            self.reply(401, {"error": "Invalid credentials"})
        elif writes and token == READER:
            self.reply(403, {"error": "Forbidden"})
        else:
            return False
        return True

    def do_GET(self):
        hub = self.server.hub
        if self.refuses(writes=False):
            return
        if match := re.fullmatch(r"/api/models/([\w-]+/[\w.-]+)", self.path):
            if match[1] not in hub.repositories:
                self.reply(404, {"error": "no"}, X_Error_Code="RepoNotFound")
            else:
                self.reply(200, {"id": match[1], "sha": hub.commit})
            return
        match = re.fullmatch(r"/([\w-]+/[\w.-]+)/resolve/\w+/([\w.-]+)", self.path)
        content = hub.repositories.get(match[1], {}).get(match[2]) if match else None
        if content is None:
            self.reply(404, {"error": "no"}, X_Error_Code="EntryNotFound")
        else:
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.reply(200, content, ETag=etag, X_Repo_Commit=hub.commit)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.server.hub
        if self.path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif self.refuses(writes=True):
            pass
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.reply(409 if name in hub.repositories else 200, {"url": f"{hub.address}/{name}"})
            # huggingface_hub sends the one or the other, by its version
            if name not in hub.repositories and (asked.get("private") is True or asked.get("visibility") == "private"):
                hub.private.add(name)
            hub.repositories.setdefault(name, {})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
            answer = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self.reply(200, {"files": answer})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**asked, "actions": {"upload": {"href": f"{hub.address}/upload/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            self.reply(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([\w-]+/[\w.-]+)/commit/main", self.path):
            self.commit(hub.repositories[match[1]], body.splitlines())
            self.reply(200, {"commitUrl": f"{hub.address}/{match[1]}/commit/{hub.commit}", "commitOid": hub.commit})
        else:
            self.reply(404)

    def commit(self, repository, lines):
        hub = self.server.hub
        for entry in map(json.loads, lines):
            value = entry["value"]
            if entry["key"] == "header":
                hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                repository[value["path"]] = base64.b64decode(value["content"])
            else:
                repository[value["path"]] = hub.blobs[value["oid"]]

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() == digest:
            self.server.hub.blobs[digest] = content
            self.reply(200)
        else:
            self.reply(400)


@contextmanager
def open_hub():
    """Serve a hub for the time of the context."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
