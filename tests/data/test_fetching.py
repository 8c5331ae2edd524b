"""images=http://...: one file, of a bounded size, in a temporary place."""

import atexit
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from resnest_imagenet.data import fetching
from resnest_imagenet.data.folder import find_images
from resnest_imagenet.errors import DataError

PICTURE = b"a picture"


class Handler(BaseHTTPRequestHandler):
    """Answers by path."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/gone"):
            self.send_error(404)
        elif self.path == "/moved.jpg":
            self.send_response(302)
            self.send_header("Location", "/cat.jpg")
            self.end_headers()
        elif self.path == "/secret.jpg":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        else:
            self.send_response(200)
            if self.path == "/short.jpg":
                self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(PICTURE * (1000 if self.path == "/large.jpg" else 1))

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    fetching.fetch_image.cache_clear()


def test_an_address_is_an_image_like_a_file(server, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(atexit, "register", lambda *call, **options: ended.append((call, options)))
    images = find_images(
        [f"{server.url}/cat%20a.jpg?size=1", f"{server.url}/moved.jpg", f"{server.url}/cat%20a.jpg?size=1"]
    )
    assert [images.read(index) for index in range(len(images))] == [PICTURE] * 2
    assert [os.path.basename(images.name(index)) for index in range(2)] == ["cat a.jpg", "moved.jpg"]
    assert server.asked == ["/cat%20a.jpg?size=1", "/moved.jpg", "/cat.jpg"]  # each is fetched once
    assert f"{server.url}/moved.jpg: fetched into {images.name(1)}" in capsys.readouterr().err
    assert [call[0] for call, _ in ended] == [shutil.rmtree] * 2
    for (remove, folder), options in ended:
        remove(folder, **options)
    assert not os.path.exists(images.name(0)) and not os.path.exists(images.name(1))


def test_what_cannot_be_fetched_is_one_line(server, monkeypatch):
    monkeypatch.setattr(fetching, "MAX_BYTES", 2**12)
    for path, cause in (
        ("/gone.jpg", "HTTP Error 404: Not Found"),
        ("/large.jpg", "more than 0 MiB"),
        ("/short.jpg", "only 9 of 1,000 bytes came"),
        ("/secret.jpg", "HTTP Error 302"),
    ):
        with pytest.raises(DataError) as error:
            find_images([f"{server.url}{path}"])
        line = str(error.value)
        assert line.startswith(f"images={server.url}{path}: cannot be fetched ({cause}") and "\n" not in line
    server.server_close()  # nobody listens any more
    with pytest.raises(
        DataError, match=r"cannot be fetched \(\[Errno 111\] Connection refused\): save it, and give the file"
    ):
        fetching.fetch_image("http://127.0.0.1:9/cat.jpg")
    with pytest.raises(DataError, match=r"images=http://: cannot be fetched \(no host given\)"):
        fetching.fetch_image("http://")
