"""Downloads, from servers on loopback that break: what is there is not fetched again, and all is verified after."""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from conftest import small_config, write_random

import grokscope as gs
from grokscope.checkpoint import ckpt0, download

REVISION = "1234567890abcdef1234567890abcdef12345678"


def total(directory):
    return sum(p.stat().st_size for p in (directory / "ckpt-0").iterdir())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of 1 MB, so that there is a middle to break in."""
    config = small_config(emb_size=96, num_layers=2, vocab_size=1000)
    return write_random(tmp_path_factory.mktemp("source") / "grok", config)


@pytest.fixture
def target(source, tmp_path):
    """A folder that expects the network of `source`."""
    (tmp_path / "to").mkdir()
    shutil.copy(source / "config.json", tmp_path / "to")
    return tmp_path / "to"


class Hub(http.server.ThreadingHTTPServer):
    """The parts of the hub that a download meets. Sends `allowance` bytes of files, then nothing; breaks each
    connection after `length` bytes; knows ranges or not; waits `delay` seconds after each 4 KB; answers the first `busy`
    requests for files with 503."""

    def __init__(self, source: Path):
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.source, self.allowance, self.length, self.ranges = source, 1 << 40, 1 << 40, True
        self.sent, self.delay, self.busy = 0, 0.0, 0
        self.spoiled: str | None = None
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass

    @property
    def files(self):
        return sorted(p for p in (*self.source.glob("ckpt-0/*"), self.source / "config.json"))


class _HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        if path.startswith("/api/models/xai-org/grok-1/tree/"):
            self.answer([self.entry(p) for p in self.server.files])
        elif path.startswith("/api/models/xai-org/grok-1"):
            self.answer({"id": "xai-org/grok-1", "sha": REVISION, "siblings": []})
        elif path.startswith(f"/xai-org/grok-1/resolve/{REVISION}/"):
            self.send_file(self.server.source / path.split(REVISION + "/")[1])
        else:
            self.send_error(404)

    def entry(self, path):
        data = path.read_bytes()
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return {
            "type": "file",
            "path": str(path.relative_to(self.server.source)),
            "size": len(data),
            "oid": "0" * 40,
            "lfs": lfs,
        }

    def send_file(self, path):
        with self.server.lock:
            self.server.busy -= 1
            if self.server.busy >= 0:
                return self.send_error(503)
        data = path.read_bytes()
        if path.name == self.server.spoiled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        begin = re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.server.ranges else None
        body = data[int(begin[1]) :] if begin else data
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with self.server.lock:
            part = body[: min(self.server.length, self.server.allowance)]
            self.server.allowance -= len(part)
            self.server.sent += len(part)
        for at in range(0, len(part), 4096):
            self.wfile.write(part[at : at + 4096])
            time.sleep(self.server.delay)
        if len(part) < len(body):
            self.close_connection = True


@pytest.fixture
def hub(source, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install 'grokscope[hub]'")
    server = Hub(source)
    yield server
    server.shutdown()
    server.server_close()


def start(hub, target):
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(target.parent / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "*",
    }
    # The tests may run in the background, where Ctrl-C is ignored.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    return subprocess.Popen(
        [sys.executable, "-c", f"{listen}; from grokscope.cli import main; main()",
         "download", "--from", "hub", "--to", str(target)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def run(hub, target, code=0):
    """What a download printed: standard output and standard error."""
    process = start(hub, target)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stdout + stderr
    return subprocess.CompletedProcess(process.args, code, stdout, stderr)


def test_connections_that_break_are_taken_up_where_they_were(hub, source, target):
    hub.length, hub.busy = 70_000, 3
    found = run(hub, target)
    assert found.stdout.splitlines()[-2].endswith("26 files, 988 kB: ok")
    assert "tokenizer.model" in found.stdout
    assert hub.sent == total(source)
    for path in (source / "ckpt-0").iterdir():
        assert (target / "ckpt-0" / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in target.iterdir()) == ["SHA256SUMS", "ckpt-0", "config.json"]
    run(hub, target)
    assert hub.sent == total(source)  # complete: nothing is asked for


@pytest.mark.slow
def test_a_download_cut_short_goes_on(hub, source, target):
    """The server ends in the middle of a file: one line says so; the next run fetches the rest and no more."""
    hub.allowance = total(source) // 2
    found = run(hub, target, code=1)
    assert "goes on from here" in found.stderr
    assert "Traceback" not in found.stderr
    assert list(target.glob("ckpt-0/*.partial"))
    assert hub.sent == total(source) // 2
    hub.allowance = 1 << 40
    run(hub, target)
    assert hub.sent == total(source)
    assert gs.verify(target).ok


@pytest.mark.slow
def test_ctrl_c(hub, source, target):
    """Ends at once, although eight files are under way, and the same command goes on."""
    hub.delay = 0.2
    process = start(hub, target)
    wait(lambda: download.present_bytes(target) > 60_000)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=5)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("grokscope: interrupted; the same command goes on in")
    assert "Traceback" not in stderr
    hub.delay, hub.sent = 0.0, 0
    run(hub, target)
    assert 0 < hub.sent < total(source) - 30_000


def test_no_connection_is_tried_again_after_ctrl_c(tmp_path, monkeypatch):
    tried, stop = [], threading.Event()

    def broken(*_):
        tried.append(1)
        stop.set()
        raise RuntimeError

    monkeypatch.setattr(download, "_append", broken)
    with pytest.raises(InterruptedError):
        download._receive("http://there", tmp_path / "c" / "file", 9, lambda count: None, stop)
    assert len(tried) == 1


@pytest.mark.slow
def test_a_server_without_ranges(hub, source, target):
    hub.allowance = total(source) // 2
    run(hub, target, code=1)
    hub.allowance, hub.ranges = 1 << 40, False
    run(hub, target)
    assert gs.verify(target).ok


def test_a_byte_that_changed_on_the_way(hub, target):
    """No size or shape tells it, but the hub's sums do."""
    hub.spoiled = "tensor00005_000"
    found = run(hub, target, code=1)
    assert "tensor00005_000: contents differ from SHA256SUMS" in found.stdout
    assert "Delete the files" in found.stdout
    (target / "ckpt-0" / hub.spoiled).unlink()
    hub.spoiled = None
    run(hub, target)


def test_a_hub_that_is_not_there(hub, target):
    hub.shutdown()
    hub.server_close()
    found = run(hub, target, code=1)
    assert found.stderr.splitlines()[-1].startswith("grokscope: xai-org/grok-1 on http://127.0.0.1")


def test_grok_1_needs_more_room(hub, tmp_path, monkeypatch):
    """Before a byte is asked for."""
    monkeypatch.setattr(ckpt0.shutil, "disk_usage", lambda path: type("", (), {"free": 318_300_000_000}))
    with pytest.raises(OSError, match=r"needs 321 GB more \(318 GB and 1 % to spare, less 0 B .* has 318 GB free"):
        download.hub(tmp_path / "to")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_model_stays_as_it_is(hub, target):
    config = gs.GrokConfig.read(target / "config.json")
    (target / "config.json").write_text(dataclasses.replace(config, num_layers=1).to_json())
    found = run(hub, target, code=1)
    assert "another model, of 14 tensor files, and xai-org/grok-1 has 26; choose another folder" in found.stderr
    assert hub.sent == 0
    with pytest.raises(ValueError, match="another model, and the torrent is Grok-1's"):
        download.torrent(target)
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_the_torrents_folder_is_the_one_with_all_files(tmp_path):
    for name, count in (("a", 74), ("b", 769), ("c", 74)):
        (tmp_path / name / "ckpt-0").mkdir(parents=True)
        for slot in ckpt0.slots(gs.GROK_1)[:count]:
            (tmp_path / name / "ckpt-0" / slot.file).touch()
    download._link(tmp_path)
    assert not (tmp_path / "ckpt-0").exists()
    (tmp_path / "b" / "ckpt-0" / "tensor00769_000").touch()
    download._link(tmp_path)
    assert (tmp_path / "ckpt-0").readlink() == Path("b/ckpt-0")


def test_what_is_there_needs_no_room(target, monkeypatch):
    expected = download.expected_bytes(target)
    room = expected + expected // 100 - download.present_bytes(target)
    monkeypatch.setattr(ckpt0.shutil, "disk_usage", lambda path: type("", (), {"free": room - 500_000}))
    with pytest.raises(OSError, match="make room"):
        download._prepare(target)
    with (target / "tensor00001_000").open("wb") as file:
        file.truncate(10_000_000)  # as a torrent's client leaves for later
    (target / "of something else").write_bytes(os.urandom(500_000))
    os.sync()
    with pytest.raises(OSError, match="make room"):
        download._prepare(target)
    (target.parent / "elsewhere").mkdir()
    (target / "ckpt-0").symlink_to(target.parent / "elsewhere")
    (target.parent / "elsewhere" / "tensor00000_000.partial").write_bytes(os.urandom(500_000))
    os.sync()
    download._prepare(target)


def test_without_the_tools(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError) as found:
        download.torrent(tmp_path / "to")
    assert "urn:btih:5f96d43576e3d386c9ba65b883210a393b68210e&tr=" in str(found.value)
    assert f"\naria2c --dir={tmp_path}/to --seed-time=0" in str(found.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match=r"pip install 'grokscope\[hub\]'"):
        download.hub(tmp_path / "to")
    assert not list(tmp_path.iterdir())


def bencode(value) -> bytes:
    match value:
        case int():
            return b"i%de" % value
        case str():
            return bencode(value.encode())
        case bytes():
            return b"%d:%s" % (len(value), value)
        case list():
            return b"l" + b"".join(map(bencode, value)) + b"e"
    return b"d" + b"".join(bencode(k) + bencode(value[k]) for k in sorted(value)) + b"e"


class Tracker(http.server.ThreadingHTTPServer):
    """Tells every client of the seed alone."""

    def __init__(self, seed_port: int):
        super().__init__(("127.0.0.1", 0), _TrackerHandler)
        self.seed_port = seed_port
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _TrackerHandler(http.server.BaseHTTPRequestHandler):
    server: Tracker

    def log_message(self, *args):
        pass

    def do_GET(self):
        peer = bytes([127, 0, 0, 1]) + self.server.seed_port.to_bytes(2, "big")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(bencode({"interval": 60, "peers": peer}))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def swarm(source, tmp_path, monkeypatch):
    """A tracker and a seed of `source`, with the released layout one folder down; gives the magnet link, and a function that tells how many
    bytes the seed has given."""
    if shutil.which("aria2c") is None:
        pytest.skip("aria2c is not installed: apt install aria2")
    pieces = 16384
    paths = sorted((source / "ckpt-0").iterdir())
    data = b"".join(p.read_bytes() for p in paths)
    info = {
        "name": "release",
        "piece length": pieces,
        "pieces": b"".join(hashlib.sha1(data[i : i + pieces]).digest() for i in range(0, len(data), pieces)),
        "files": [{"length": p.stat().st_size, "path": ["ckpt-0", p.name]} for p in paths],
        "private": 1,
    }
    port, rpc = free_port(), free_port()
    tracker = Tracker(port)
    announce = f"http://127.0.0.1:{tracker.server_port}/announce"
    (tmp_path / "t.torrent").write_bytes(bencode({"announce": announce, "info": info}))
    shutil.copytree(source, tmp_path / "seed" / "release")
    home = tmp_path / "home"
    (home / ".aria2").mkdir(parents=True)
    settings = "enable-dht=false\nenable-dht6=false\nenable-peer-exchange=false\ndisable-ipv6=true\n"
    (home / ".aria2" / "aria2.conf").write_text(settings + f"listen-port={free_port()}\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "no"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "no"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    seed = subprocess.Popen(
        ["aria2c", f"--dir={tmp_path}/seed", "--check-integrity", "--seed-ratio=0", f"--listen-port={port}",
         "--enable-rpc", f"--rpc-listen-port={rpc}", "--quiet", str(tmp_path / "t.torrent")]
    )  # fmt: skip
    wait(lambda: socket.create_connection(("127.0.0.1", port), 1).close() or True)
    magnet = f"magnet:?xt=urn:btih:{hashlib.sha1(bencode(info)).hexdigest()}&tr={urllib.parse.quote(announce, '')}"

    def given():
        question = json.dumps({"jsonrpc": "2.0", "id": "", "method": "aria2.tellActive"}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{rpc}/jsonrpc", question) as answer:
            return int(json.load(answer)["result"][0]["uploadLength"])

    yield magnet, given
    seed.terminate()
    seed.wait()
    tracker.shutdown()
    tracker.server_close()


def wait(condition, seconds=60):
    """Until the condition holds; refused connections count as no."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(ConnectionError):
            if condition():
                return
        time.sleep(0.1)
    raise TimeoutError("never came true")


@pytest.mark.slow
def test_torrent(swarm, source, target):
    """Fetched, linked into the released layout, verified; with half of it there, but no record of that, the other half."""
    magnet, given = swarm
    half = sorted((source / "ckpt-0").iterdir())[::2]
    (target / "release" / "ckpt-0").mkdir(parents=True)
    for path in half:
        shutil.copy(path, target / "release" / "ckpt-0")
    fetch = functools.partial(download.torrent, magnet=magnet)
    report = download.download(target, fetch)
    assert report.ok, report.problems
    assert (target / "ckpt-0").readlink() == Path("release/ckpt-0")
    assert report.num_bytes == total(source)
    assert 0 < (once := given()) < 0.75 * total(source)
    assert download.download(target, fetch).ok  # complete: not asked again
    assert given() == once
    (target / "ckpt-0" / half[3].name).unlink()
    assert download.download(target, fetch).ok  # one is missing: it alone is fetched
    assert given() - once < 0.5 * total(source)


@pytest.mark.slow
def test_torrent_killed(swarm, source, target, tmp_path):
    """kill -9 in the middle of it; the client ends too, and the next run does not begin anew."""
    magnet, given = swarm
    settings = tmp_path / "home" / ".aria2" / "aria2.conf"
    unlimited = settings.read_text()
    settings.write_text(unlimited + "max-overall-download-limit=100K\nauto-save-interval=1\n")
    code = f"from pathlib import Path; from grokscope.checkpoint.download import torrent; torrent(Path({str(target)!r}), {magnet!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    wait(lambda: download.present_bytes(target) > total(source) / 2)
    process.kill()
    process.wait()
    wait(lambda: not clients(target))
    assert list(target.glob("*.aria2"))  # it did not stay to the end
    settings.write_text(unlimited)
    before = given()
    report = download.download(target, functools.partial(download.torrent, magnet=magnet))
    assert report.ok, report.problems
    assert given() - before < 0.7 * total(source)


def clients(directory):
    """Processes of aria2c that write there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path] if f"--dir={directory}".encode() in path.read_bytes().split(b"\0") else []
    return found
