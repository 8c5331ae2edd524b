"""Real downloads from a server on this machine."""

import hashlib
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from resnest_imagenet.errors import CheckpointError, ConfigError
from resnest_imagenet.models.zoo import ARCHITECTURES, TIMM_RESNESTS
from resnest_imagenet.weights import published
from resnest_imagenet.weights.published import MIRRORS, OFFICIAL, fetch

CONTENT = os.urandom(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = f"resnest50-{SHA256[:8]}.pth"
HUB_FILE = "/timm/resnest50d.in1k/resolve/main/model.safetensors"
COMMIT = "c" * 40


class Server(ThreadingHTTPServer):
    """Serves `files` (path to content), counts the GETs, and can send too little, nothing or nonsense."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.gets: Counter[str] = Counter()
        self.missing_bytes = 0
        self.silent = threading.Event()
        self.garbled = False
        self.etag = SHA256

    def stop(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self):
        self.start()

    def do_GET(self):
        self.server.gets[self.path] += 1
        if self.server.silent.is_set():
            self.server.silent.clear()
            threading.Event().wait(5)
        if content := self.start():
            self.wfile.write(content[: len(content) - self.server.missing_bytes])

    def start(self) -> bytes | None:
        if self.server.garbled:
            self.wfile.write(b"nonsense\r\n\r\n")
            return None
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return None
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        if self.path.startswith("/timm/"):  # what the hub says of a file in LFS
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{self.server.etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.end_headers()
        return content

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("NO_PROXY", "*")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    if thread.is_alive():
        server.stop()
    thread.join()


@pytest.fixture
def cache(server, tmp_path, monkeypatch) -> Path:
    """Point official:resnest50 to two mirrors on the server, one with its file; return the file's place."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(OFFICIAL, "resnest50", SHA256)
    monkeypatch.setattr(published, "MIRRORS", (f"{server.url}/first", f"{server.url}/second"))
    server.files[f"/first/{FILE}"] = CONTENT
    return tmp_path / "hub" / "checkpoints" / FILE


def visible(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.glob("[!.]*"))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_cache_whose_storage_fails_is_a_line(cache):
    cache.parent.mkdir(parents=True)
    cache.symlink_to("/proc/self/mem")  # a file whose first byte is EIO
    with pytest.raises(CheckpointError, match=r"official:resnest50 not fetched \(.*Input/output error\)") as caught:
        fetch("official:resnest50")
    assert one_line(caught) and cache.is_symlink()


def test_official_file_is_fetched_once_and_used_offline(server, cache):
    assert fetch("official:resnest50") == (cache, "resnest50")
    assert cache.read_bytes() == CONTENT
    server.stop()
    assert fetch("official:resnest50") == (cache, "resnest50")
    assert server.gets == {f"/first/{FILE}": 1}
    assert visible(cache) == [FILE]


def test_eight_digits_are_enough(server, cache, monkeypatch):
    monkeypatch.setitem(OFFICIAL, "resnest50", SHA256[:8])
    assert fetch("official:resnest50") == fetch("official:resnest50") == (cache, "resnest50")
    assert server.gets == {f"/first/{FILE}": 1}


@pytest.mark.parametrize("first", [None, CONTENT[:-1] + b"x"], ids=["404", "wrong hash"])
def test_second_mirror_serves_where_the_first_does_not(server, cache, first):
    server.files = {f"/second/{FILE}": CONTENT} | ({f"/first/{FILE}": first} if first else {})
    assert fetch("official:resnest50")[0].read_bytes() == CONTENT
    assert server.gets == {f"/first/{FILE}": 1, f"/second/{FILE}": 1}


def test_silent_mirror_is_given_up(server, cache, monkeypatch):
    monkeypatch.setattr(published, "SILENCE", 0.2)
    server.files[f"/second/{FILE}"] = CONTENT
    server.silent.set()
    assert fetch("official:resnest50")[0].read_bytes() == CONTENT
    assert server.gets == {f"/first/{FILE}": 1, f"/second/{FILE}": 1}


def test_damaged_cached_file_is_fetched_again(server, cache, capsys):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(CONTENT[:-1])
    fetch("official:resnest50")
    assert cache.read_bytes() == CONTENT
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1 and str(cache) in said[0]


def test_wrong_file_everywhere_is_refused(server, cache):
    server.files = dict.fromkeys((f"/first/{FILE}", f"/second/{FILE}"), b"not the weights")
    with pytest.raises(CheckpointError, match="invalid hash") as error:
        fetch("official:resnest50")
    one_line(error)
    assert visible(cache) == []


def test_truncated_transfer_is_refused(server, cache):
    server.files[f"/second/{FILE}"] = CONTENT
    server.missing_bytes = 1000
    with pytest.raises(CheckpointError) as error:
        fetch("official:resnest50")
    one_line(error)
    assert visible(cache) == []
    assert len(server.gets) == 2


def test_garbled_answer_is_one_line(server, cache):
    server.garbled = True
    with pytest.raises(CheckpointError, match="nonsense") as error:
        fetch("official:resnest50")
    one_line(error)


def test_official_offline_is_one_line_with_url_and_path(server, cache):
    server.stop()
    with pytest.raises(CheckpointError, match="refused") as error:
        fetch("official:resnest50")
    line = one_line(error)
    assert f"{server.url}/first/{FILE}" in line and str(cache) in line and error.value.exit_code == 4


def test_cache_that_cannot_be_written_is_one_line(cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="File exists") as error:
        fetch("official:resnest50")
    one_line(error)


def test_ranks_that_ask_at_once_download_once(server, cache):
    with ThreadPoolExecutor(4) as ranks:
        answers = set(ranks.map(fetch, ["official:resnest50"] * 4))
    assert answers == {(cache, "resnest50")}
    assert server.gets == {f"/first/{FILE}": 1}


def test_official_table():
    assert len(OFFICIAL) == 11 and OFFICIAL.keys() <= ARCHITECTURES.keys() and len(MIRRORS) == 2
    assert all(len(digits) in (8, 64) and int(digits, 16) for digits in OFFICIAL.values())


@pytest.mark.parametrize(
    ("source", "nearest"),
    [
        ("official:resnest51", "official:resnest50"),
        ("offical:resnest101", "official:resnest101"),
        ("resnest269", "official:resnest269"),
        ("timm:resnest50d.in1", "resnest50d.in1k"),
        ("timm:resnet50.tv_in2k", "resnet50.tv_in1k"),
        ("timm:resnest200", "resnest200e.in1k"),
    ],
)
def test_unknown_names(source, nearest):
    with pytest.raises(ConfigError, match=f"unknown .*did you mean '{nearest}'") as error:
        fetch(source)
    one_line(error)


@pytest.fixture
def hub(server, tmp_path, monkeypatch) -> Path:
    """Point the hub's client to the server, which has resnest50d.in1k; return the blob's place."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # it asks the server for more, and writes at home
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client's pauses between its tries: half a minute
    server.files[HUB_FILE] = CONTENT
    return tmp_path / "models--timm--resnest50d.in1k" / "blobs" / SHA256


def test_timm_file_is_fetched_once_and_used_offline(server, hub):
    path, network = fetch("timm:resnest50d.in1k")
    assert network == "resnest50"
    assert path.name == "model.safetensors" and path.read_bytes() == CONTENT and path.resolve() == hub
    server.stop()
    assert fetch("timm:resnest50d.in1k") == (path, network)
    assert server.gets[HUB_FILE] == 1


def test_timm_offline_mode_uses_the_cache(server, hub, monkeypatch):
    path, _ = fetch("timm:resnest50d.in1k")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("timm:resnest50d.in1k")[0] == path
    assert server.gets[HUB_FILE] == 1


def test_timm_damaged_file_is_fetched_again(server, hub, capsys):
    path, _ = fetch("timm:resnest50d.in1k")
    hub.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert fetch("timm:resnest50d.in1k")[0].read_bytes() == CONTENT
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1 and str(path) in said[0]
    assert server.gets[HUB_FILE] == 2


@pytest.mark.parametrize("offline", ["mode", "server down"])
def test_timm_damaged_file_offline_is_one_line(server, hub, monkeypatch, offline):
    fetch("timm:resnest50d.in1k")
    hub.write_bytes(b"damaged")
    if offline == "mode":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        server.stop()
    with pytest.raises(CheckpointError, match=server.url) as error:
        fetch("timm:resnest50d.in1k")
    one_line(error)


def test_timm_file_unlike_its_hash_is_refused(server, hub):
    server.files[HUB_FILE] = b"not the weights"
    with pytest.raises(CheckpointError, match="differs from its SHA-256 again") as error:
        fetch("timm:resnest50d.in1k")
    one_line(error)


def test_file_with_another_kind_of_name_is_not_compared(server, hub):
    server.etag = "d" * 40  # a file in git itself
    assert fetch("timm:resnest50d.in1k")[0].read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("trouble", "said"),
    [("mode", "HF_HUB_OFFLINE"), ("server down", "refused"), ("no such file", "404"), ("garbled", "illegal")],
)
def test_timm_without_file_is_one_line(server, hub, monkeypatch, trouble, said):
    if trouble == "mode":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif trouble == "server down":
        server.stop()
    elif trouble == "garbled":
        server.garbled = True
    else:
        server.files.clear()
    with pytest.raises(CheckpointError, match=said) as error:
        fetch("timm:resnest50d.in1k")
    line = one_line(error)
    assert server.url + HUB_FILE in line and "HF_HOME" in line and "ckpt=FILE model=resnest50" in line


@pytest.mark.slow
def test_every_network_of_timms_is_found_or_refused():
    """All pretrained names of our networks: ImageNet's normalisation and three channels, or refused."""
    import timm
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    networks = {theirs: ours for ours, theirs in TIMM_RESNESTS.items()}
    networks |= {name: name for name in ARCHITECTURES if name.startswith(("resnet", "resnext", "se", "sk"))}
    names = [name for name in timm.list_pretrained() if name.partition(".")[0] in networks]
    assert len({name.partition(".")[0] for name in names}) == 19
    refused = set()
    for name in names:
        expected = timm.get_pretrained_cfg(name)
        assert expected.input_size[0] == 3
        if expected.mean == IMAGENET_DEFAULT_MEAN and expected.std == IMAGENET_DEFAULT_STD:
            assert published.find_by_timm_name(name) == networks[name.partition(".")[0]]
        else:
            refused.add(name)
            with pytest.raises(ConfigError, match="need pixels of mean"):
                published.find_by_timm_name(name)
    assert "resnet50d.ra4_e3600_r224_in1k" in refused
