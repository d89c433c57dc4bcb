"""Grok-1's files from where they were released: the torrent (through aria2c) or the hub (through huggingface_hub).

Both go on where they were cut short, to the byte or the piece, and refuse a disk without room before they begin. Where
the folder has a config.json, it is that network which is expected, not Grok-1.
"""

import os
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from grokscope import look
from grokscope.checkpoint import ckpt0
from grokscope.checkpoint.ckpt0 import Progress, Report
from grokscope.config import GROK_1, GrokConfig

REPOSITORY = "xai-org/grok-1"
PATTERN = "ckpt-0/*"
MAGNET = (
    "magnet:?xt=urn:btih:5f96d43576e3d386c9ba65b883210a393b68210e"
    "&tr=https%3A%2F%2Facademictorrents.com%2Fannounce.php"
    "&tr=udp%3A%2F%2Ftracker.coppersurfer.tk%3A6969"
    "&tr=udp%3A%2F%2Ftracker.opentrackr.org%3A1337%2Fannounce"
)

FILES_AT_ONCE = 8
ATTEMPTS = 5  # connections in a row that bring nothing
TIMEOUT = 30  # seconds without a byte
BUSY = (429, 500, 502, 503, 504)  # answers of a hub that may be asked again


def download(directory: Path | str, fetch: Callable[[Path], None], progress: Progress = iter) -> Report:
    """Fetches into `directory` what `ckpt0.verify` does not find there, and gives its report; `fetch` is `hub` or
    `torrent`. Raises OSError where there is no room or no connection; the same call then goes on."""
    directory = Path(directory)
    try:
        report = ckpt0.verify(directory, progress)
    except FileNotFoundError:
        report = None
    if report is not None and report.ok:
        return report
    fetch(directory)
    return ckpt0.verify(directory, progress)


def expected_bytes(directory: Path) -> int:
    """What the weights take on disk once they are there."""
    return ckpt0.payload_bytes(_config(directory))


def _config(directory: Path) -> GrokConfig:
    path = directory / "config.json"
    return GrokConfig.read(path) if path.exists() else GROK_1


def _other_model(directory: Path, why: str) -> ValueError:
    return ValueError(f"{directory} has the config.json of another model, {why}; choose another folder (--to)")


def present_bytes(directory: Path) -> int:
    """What the tensor files there take on disk, whole or begun; holes that a client left for later do not count."""
    return sum(p.lstat().st_blocks * 512 for p in directory.rglob("tensor*_000*") if p.is_file())


def _prepare(directory: Path) -> None:
    link = directory / "ckpt-0"
    files = link.resolve() if link.is_symlink() else directory  # perhaps on another disk
    ckpt0.require_room(files, expected_bytes(directory), present_bytes(files))
    directory.mkdir(parents=True, exist_ok=True)


def hub(directory: Path, progress: Callable[[int], Any] = lambda count: None, repository: str = REPOSITORY) -> None:
    """Fetches a hub repository's ckpt-0, with SHA256SUMS where the hub tells them. `progress` is called with each count
    of bytes that came in.

    Not snapshot_download: when that is stopped, it throws away what it has of each file, here up to 13 GB.
    """
    try:
        from huggingface_hub import hf_hub_url
    except ImportError as err:
        raise RuntimeError(
            "huggingface_hub is not installed; pip install 'grokscope[hub]', or take --from torrent"
        ) from err
    _prepare(directory)
    revision, files = _listing(repository)
    if len(files) != (expected := len(ckpt0.slots(_config(directory)))):
        raise _other_model(directory, f"of {expected} tensor files, and {repository} has {len(files)}")
    stop = threading.Event()

    def count(size: int) -> None:
        if stop.is_set():
            raise InterruptedError("another file failed")
        progress(size)

    def fetch(file) -> None:
        url = hf_hub_url(repository, file.path, revision=revision)
        _receive(url, directory / file.path, file.size, count, stop)

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        try:
            list(pool.map(fetch, files))
        finally:
            stop.set()
    if all(file.lfs for file in files):
        (directory / ckpt0.SUMS).write_text("".join(f"{file.lfs.sha256}  {file.path}\n" for file in files))


def _listing(repository: str) -> tuple[str | None, list]:
    """Newest revision of a hub repository and its files of PATTERN, with path, size and, where known, lfs.sha256."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    try:
        revision = api.model_info(repository).sha
        tree = api.list_repo_tree(repository, recursive=True, revision=revision)
        files = [f for f in tree if isinstance(f, RepoFile) and fnmatch(f.path, PATTERN)]
    except OSError:  # the hub's refusal, in words; the errors of httpx are not of this class
        raise
    except Exception as err:
        raise OSError(f"{repository} on {api.endpoint} cannot be listed: {type(err).__name__}: {err}") from err
    if not files:
        raise FileNotFoundError(f"{repository} on {api.endpoint} has no files {PATTERN}")
    return revision, files


def _receive(url: str, path: Path, size: int, count: Callable[[int], None], stop: threading.Event) -> None:
    """The file at `url`, of `size` bytes. What is there of it stays, in `path` with .partial, until it is whole; `stop`
    ends it after the connection under way."""
    if path.exists() and path.stat().st_size == size:
        return
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    failures = 0
    while (have := partial.stat().st_size) < size:
        try:
            _append(url, partial, have, count)
        except OSError:  # the disk's, or the hub's refusal
            raise
        except Exception as err:
            failures = 1 if partial.stat().st_size > have else failures + 1
            if failures == ATTEMPTS:
                raise OSError(
                    f"{url}: {type(err).__name__}: {err}; {ATTEMPTS} connections brought nothing. "
                    "The same command goes on from here"
                ) from err
            if stop.wait(2**failures / 4):
                raise InterruptedError("another file failed") from err
    if have != size:
        partial.unlink()
        raise OSError(f"{url} gave {have} bytes, the hub lists {size}; removed, the same command fetches it again")
    partial.replace(path)


def _append(url: str, partial: Path, have: int, count: Callable[[int], None]) -> None:
    """One connection's bytes, from `have` on, or all of them from a server that knows no ranges."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers() | {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response, partial.open("ab") as file:
        if response.status_code in BUSY:
            raise RuntimeError(f"the hub answers {response.status_code}")
        hf_raise_for_status(response)
        if response.status_code != 206:
            file.truncate(0)
        for chunk in response.iter_raw():
            count(len(chunk))
            file.write(chunk)


def torrent(directory: Path, magnet: str = MAGNET) -> None:
    """Fetches the torrent's files through aria2c, which shows its own progress, and links ckpt-0 to their folder."""
    command = ["aria2c", f"--dir={directory}", "--seed-time=0", "--file-allocation=none", magnet]
    if shutil.which("aria2c") is None:
        raise FileNotFoundError(
            "aria2c is not installed (Debian: apt install aria2). The torrent, for any client:\n"
            f"{magnet}\nIt needs {look.si(expected_bytes(directory), 'B')} on disk. With aria2c, which resumes:\n"
            f"{shlex.join(command)}"
        )
    if magnet == MAGNET and _config(directory) != GROK_1:
        raise _other_model(directory, "and the torrent is Grok-1's")
    _prepare(directory)
    if any(directory.rglob("tensor*_000")) and not any(directory.glob("*.aria2")):  # no record of what is there
        command.insert(1, "--check-integrity=true")
    command.insert(1, f"--stop-with-process={os.getpid()}")
    client = subprocess.Popen(command, start_new_session=True)
    try:
        code = client.wait()
    finally:
        if client.poll() is None:
            client.terminate()  # it writes down what it has
            client.wait()
    if code:
        raise OSError(f"aria2c ended with code {code}; the same command goes on from here")
    _link(directory)


def _link(directory: Path) -> None:
    """ckpt-0 -> where the torrent keeps its files, so that they can be checked and seeded as they lie."""
    link, slots = directory / "ckpt-0", ckpt0.slots(_config(directory))
    folders = (path.parent for path in directory.rglob(slots[0].file))
    folder = next((f for f in folders if all((f / slot.file).exists() for slot in slots)), None)  # not of another model
    if folder in (None, directory, link) or link.is_symlink():
        return
    if link.exists():
        raise FileExistsError(f"the torrent's files are in {folder}, but {link} is in their place; move it away")
    link.symlink_to(folder.relative_to(directory))
