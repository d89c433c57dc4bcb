"""A real JupyterLab on loopback and a real headless Chromium, each with a profile of its own."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip


def needs_chromium():
    """Skips where there is no browser to drive."""
    pytest.importorskip("playwright", reason="playwright is not installed here")
    if not CHROMIUM:
        pytest.skip("Chromium is not on this machine (apt-get install chromium)")


@contextlib.contextmanager
def server(root: Path):
    """JupyterLab serving `root`; gives a function: notebook name -> address."""
    home = Path(tempfile.mkdtemp(prefix="lab-home-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    folders = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    env = os.environ | {f"JUPYTER_{name}": str(home / folder) for name, folder in folders.items()}
    env |= {"JUPYTERLAB_WORKSPACES_DIR": str(home / "ws"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    env |= {"IPYTHONDIR": str(home / "ipython"), "JUPYTER_PLATFORM_DIRS": "1"}
    env.pop("MPLBACKEND", None)
    settings = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=",
        "--ServerApp.terminals_enabled=False", "--LabApp.extension_manager=readonly",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 90
            while True:
                assert process.poll() is None, (home / "server.log").read_text()
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=1).close()
                    break
                assert time.monotonic() < deadline, "JupyterLab did not start"
                time.sleep(0.1)
            yield lambda notebook: f"http://127.0.0.1:{port}/doc/tree/{notebook}?token={token}&reset"
        finally:
            process.terminate()
            process.wait(20)
    shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def page(width: int = 1280, height: int = 1700):
    """A page that remembers `errors` of its console, the `requests` it made and what it `told` the kernels."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        opened = browser.new_context(viewport={"width": width, "height": height}).new_page()
        opened.errors, opened.requests, opened.told = [], [], []
        opened.on("console", lambda m: opened.errors.append(m.text) if m.type == "error" else None)
        opened.on("pageerror", lambda e: opened.errors.append(str(e)))
        opened.on("request", lambda r: opened.requests.append(r.url))
        opened.on("websocket", lambda socket: socket.on("framesent", lambda data: opened.told.append(data)))
        try:
            yield opened
        finally:
            browser.close()


READY = """() => { const app = window.jupyterapp, w = app && app.shell.currentWidget, c = w && w.sessionContext;
  const k = c && c.isReady && c.session && c.session.kernel;
  return !!k && k.connectionStatus === 'connected' && k.status === 'idle'; }"""


def write_notebook(path: Path, *cells: str) -> None:
    import nbformat

    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={"kernelspec": kernel}
    )
    nbformat.write(made, path)


def run_all(opened, address: str) -> None:
    """Opens a notebook and runs its cells to the end."""
    opened.set_default_timeout(120_000)
    opened.goto(address)
    opened.wait_for_function(READY)
    opened.evaluate("async () => await window.jupyterapp.commands.execute('notebook:run-all-cells')")
