"""Check which answers of servers make images fail, and which are faults of the machine. For reads see test_tars.py."""

import asyncio
import contextlib
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from conftest import draw
from featcli import extract, open_dump
from featcli.errors import MachineError, UsageError
from featcli.inputs import urls
from featcli.inputs.listing import find
from featcli.pixels.failure import UnreadableError
from featcli.pixels.image_file import opened
from featcli.spec.groups import InputSpec

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "pool": "avg", "threads": 1, "decode_threads": 1}


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Record how long would have been waited."""
    waited = []
    monkeypatch.setattr(urls, "pause", waited.append)
    return waited


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Return the bytes of a picture."""
    return draw(tmp_path_factory.mktemp("urls") / "a.png", 0, (32, 32)).read_bytes()


class Answered(Exception):  # noqa: N818
    """What a library raises for the answer of a server."""

    def __init__(self, status):
        super().__init__(f"{status}, message='of a server'")
        self.status = status


@pytest.fixture
def server(monkeypatch, picture):
    """Make objects in memory whose server gives `answers` by name, one after another, the last for ever."""
    system = fsspec.filesystem("memory")
    for name in ("a.png", "b.png", "c.png"):
        system.pipe_file(f"/web/photos/{name}", picture)
    answers, asked, whole = {}, Counter(), MemoryFileSystem.cat_file

    def cat_file(self, path, *rest, **options):
        name = path.rpartition("/")[2]
        asked[name] += 1
        said = answers.get(name, answers.get("*", []))
        if said and (answer := said[min(asked[name], len(said)) - 1]) is not None:
            raise answer if isinstance(answer, Exception) else Answered(answer)
        return whole(self, path, *rest, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    yield answers
    system.store.clear()


@pytest.fixture
def images(server, tmp_path):
    """Return a list of the three objects, without a root."""
    (tmp_path / "list").write_text("".join(f"memory://web/photos/{name}.png\n" for name in "abc"))
    return find(InputSpec(files_from=str(tmp_path / "list"))).images


def outcome(image):
    """Return `read`, `machine`, or the reason of a failure."""
    try:
        with opened(image) as file:
            file.read()
    except UnreadableError as error:
        return error.reason
    except MachineError:
        return "machine"
    return "read"


@pytest.mark.parametrize("answer", [404, 410, FileNotFoundError("gone")])
def test_an_object_that_is_gone(server, images, answer):
    """An object that is gone fails alone, whatever its server calls it."""
    server["b.png"] = [answer]
    assert [outcome(image) for image in images] == ["read", "not_found", "read"]


@pytest.mark.parametrize("answer", [400, 401, 403, 451, PermissionError("Access Denied")])
def test_an_object_that_is_kept_from_us(server, images, answer):
    """An object that may not be read fails if its server gives another one; else the machine is at fault."""
    server["a.png"] = server["b.png"] = [answer]
    assert [outcome(image) for image in images] == ["unreadable", "unreadable", "read"]
    server["*"] = [answer]  # a token has expired
    assert [outcome(image) for image in images] == ["machine"] * 3


def test_a_cache_is_no_witness(server):
    """An object that comes from a local cache does not prove that its server gives any."""
    image = find(InputSpec(["simplecache::memory://web/photos"])).images[0]
    assert outcome(image) == "read"
    assert urls.Remote(image.path).is_given()
    server["*"] = [403]
    assert outcome(image) == "read"
    assert not urls.Remote(image.path).is_given()


@pytest.mark.parametrize(
    "answer", [408, 429, 500, 502, 503, 504, ConnectionError("no route"), TimeoutError(), asyncio.TimeoutError()]
)
def test_a_server_that_fails(server, images, answer):
    """An error of a server now is no failure of an object, although it gives others."""
    server["b.png"] = [answer]
    assert [outcome(image) for image in images] == ["read", "machine", "read"]


@pytest.mark.parametrize("answer", [429, 503, ConnectionError("reset")])
def test_a_web_server_is_asked_again(server, images, pauses, monkeypatch, answer):
    """An answer of a web server that may change is waited for twice, because fsspec asks only once, and no other is."""
    monkeypatch.setattr(urls, "WEB", ("memory",))
    server["a.png"] = [answer, answer, None]
    server["b.png"] = [answer]
    server["c.png"] = [410]
    assert [outcome(image) for image in images] == ["read", "machine", "not_found"]
    assert pauses == [*urls.PAUSES] * 2


def test_a_folder_that_cannot_be_listed(server, monkeypatch, picture):
    """A remote folder, however deep, that cannot be listed ends the run, because its images would be missing."""
    monkeypatch.setattr(MemoryFileSystem, "find", AbstractFileSystem.find)  # as sftp:// and smb:// have it
    fsspec.filesystem("memory").pipe_file("/web/photos/deep/d.png", picture)
    assert find(InputSpec(["memory://web/photos"])).images.keys == ["a.png", "b.png", "c.png", "deep/d.png"]
    whole = MemoryFileSystem.ls

    def ls(self, path, **options):
        if path.endswith("deep"):
            raise ConnectionResetError
        return whole(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "ls", ls)
    with pytest.raises(MachineError, match="ConnectionResetError"):
        find(InputSpec(["memory://web/photos"]))


@pytest.fixture
def web(picture, tmp_path):
    """Run a local web server whose paths begin with its answer, and count how often each was asked for."""
    (tmp_path / "a.png").write_bytes(picture)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "in/a.png")
    asked = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            how, _, name = self.path[1:].partition("/")
            asked[self.path] += 1
            if how == "closes" or (how == "twice" and asked[self.path] < 3):
                return  # without an answer
            content = (tmp_path / "x.tar").read_bytes() if name == "x.tar" else picture
            status, first, end = (int(how) if how.isdecimal() else 200), 0, len(content)
            if "Range" in self.headers and status == 200:
                first, end = (int(at) for at in self.headers["Range"].removeprefix("bytes=").split("-"))
                status, content = 206, content[first : end + 1]
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(content[: 9 if how == "cut" else None])

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", asked
        served.shutdown()


def test_the_web(web, tmp_path):
    """With a real web server a list gives a dump with failures, and other errors end the run."""
    base, asked = web
    names = ["ok/a.png", "404/b.png", "410/c.png", "403/d.png", "twice/e.png"]
    (tmp_path / "list").write_text("".join(f"{base}/{name}\n" for name in names))
    dump = open_dump(extract(files_from=tmp_path / "list", root=base, output=tmp_path / "d", **OPTIONS).dump)
    assert {one["key"]: one["reason"] for one in dump.failures} == {
        "404/b.png": "not_found", "410/c.png": "not_found", "403/d.png": "unreadable",
    }  # fmt: skip
    assert asked["/twice/e.png"] == 3
    for name in ("503/a.png", "closes/a.png", "cut/a.png"):
        (tmp_path / "list").write_text(f"{base}/{name}\n")
        assert outcome(find(InputSpec(files_from=str(tmp_path / "list"))).images[0]) == "machine", name
        assert asked[f"/{name}"] >= 3


def test_inputs_of_the_web(web):
    """An input of a failing server is no wrong name, also for a tar, and one that the server lacks is."""
    base, _ = web
    for name in ("503/a.png", "closes/a.png", "403/a.png", "503/x.tar", "closes/x.tar"):
        with pytest.raises(MachineError):
            find(InputSpec([f"{base}/{name}"]))
    for name in ("404/a.png", "410/x.tar"):
        with pytest.raises(UsageError, match="there is nothing at this URL"):
            find(InputSpec([f"{base}/{name}"]))
    assert outcome(find(InputSpec([f"{base}/ok/x.tar"])).images[0]) == "read"
