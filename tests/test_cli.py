"""The command line as a user meets it."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import HERE, small_config, write_random

import grokscope as gs
from grokscope.checkpoint import ckpt0
from grokscope.cli import routing_table
from grokscope.run.engine import bundled_checkpoint


def run(*args, cwd=None, code=0, env=None, typed=None):
    command = [sys.executable, "-m", "grokscope", *map(str, args)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, input=typed)
    assert found.returncode == code, found.stdout + found.stderr
    return found


def test_help_shows_examples():
    top = run("--help").stdout
    for command in ("generate", "demo", "verify", "download", "rehearse", "train"):
        assert command in top
        assert f"grokscope {command}" in " ".join(run(command, "--help").stdout.split())


def test_generate(tmp_path):
    found = run("generate", "The old keeper", "--max-new-tokens", 8, "--save", tmp_path / "d")
    assert found.stdout.startswith("The old keeper")
    assert "float32" in found.stderr
    assert gs.open(tmp_path / "d").text + "\n" == found.stdout


def test_prompts_from_standard_input(tmp_path):
    """A text without the newline that `echo` adds; prompts of a dump."""
    found = run("generate", "-", "--max-new-tokens", 1, "--save", tmp_path / "d", typed="The old keeper\n")
    assert found.stdout.startswith("The old keeper")
    assert found.stdout[14] != "\n"
    run("dump", "-", tmp_path / "many", typed='"The old keeper"\n[1, 5]\n')
    assert gs.open(tmp_path / "many")[0].text == "The old keeper"


def test_verify(tmp_path):
    assert run("verify", bundled_checkpoint()).stdout.strip().endswith("ok")
    found = run("verify", HERE / "golden" / "tiny")
    assert "cannot be seen" in found.stdout
    broken = shutil.copytree(HERE / "golden" / "tiny", tmp_path / "broken")
    (broken / "ckpt-0" / "tensor00004_000").write_bytes(b"")
    found = run("verify", broken, code=1)
    assert "tensor00004_000" in found.stdout
    assert "1 problems" in found.stdout


@pytest.mark.slow
def test_rehearse(tmp_path):
    found = run("rehearse", tmp_path / "r", "--layers", 2, "--width", "mini").stdout
    assert "2 layers" in found
    assert run("verify", tmp_path / "r").stdout.strip().endswith("26 files, 8.95 MB: ok")
    assert run("generate", "The", "--max-new-tokens", 4, "--checkpoint", tmp_path / "r").stdout.startswith("The")
    found = run("rehearse", tmp_path / "r", "--layers", 2, "--width", "mini", code=1)
    assert "not empty" in found.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("generate", "x", "--checkpoint", "nowhere"), "nowhere is not a directory"),
        (("generate", "x", "--temperature", "-1"), "temperature=-1"),
        (("plan", "--tokens", "9", "--capture", "q:layers=0:2"), "'2' is not a selector; expected as in layers=2,5"),
        (("verify", "nowhere"), "nowhere is not a directory"),
        (("download", "--from", "ftp"), "--from ftp: expected torrent or hub"),
        (("rehearse", "r", "--layers", "2", "--width", "tiny"), "--width tiny: expected full or mini"),
        (("rehearse", "r", "--layers", "0"), "num_layers=0"),
        (("rehearse", "r", "--layers", "6400"), "make room"),
        (
            ("train", "--data", "d", "--out", "o", "--steps", "3"),
            "either --config (from scratch) or --start (a checkpoint); nei",
        ),
        (("plan", "--tokens", "9", "--capture", "q:foo=3"), "the selector 'foo' is none; there are layers"),
        (("plan", "--tokens", "9", "--capture", "q:layers=1:layers=2"), "'layers' is given twice"),
        (("plan", "--tokens", "9", "--capture", "resid_post:reduce=lens:k="), "k=: expected a whole number"),
        (("plan", "--model", "grok-1", "--batch", "0"), "batch=0: expected at least 1"),
        (("plan", "--tokens", "9", "--mesh", "2x2"), "--mesh, --context and --weights go with --model"),
        (("dump", "latin.jsonl", "o"), "latin.jsonl is not UTF-8 text"),
        (("dump", "deep.jsonl", "o"), "deep.jsonl, line 1, is not JSON"),
        (("plan", "--tokens", "9", "--capture", "attn_pattern:later=1"), "later='1': expected True or False"),
        (("plan", "--tokens", "9", "--capture", "attn_pattern:phase=decode"), "is about no position"),
        (("dump", "words.jsonl", "o"), "words.jsonl, line 2: expected a text, a list of ids"),
    ],
)
def test_errors_are_one_line(args, words, tmp_path):
    (tmp_path / "words.jsonl").write_text('{"prompt": null, "tokens": [5]}\n["a", "b"]\n')
    (tmp_path / "latin.jsonl").write_bytes('"é"'.encode("latin-1"))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    found = run(*args, code=1, cwd=tmp_path)
    *_, last = found.stderr.splitlines()
    assert last.startswith("grokscope: ")
    assert words in last
    assert "Traceback" not in found.stderr
    assert "Traceback" in run(*args, "--debug", code=1, cwd=tmp_path).stderr


def test_a_plan_reads_no_weights(tmp_path):
    broken = shutil.copytree(HERE / "golden" / "tiny", tmp_path / "broken")
    experts = ckpt0.slots(gs.GrokConfig.read(broken / "config.json"))[2]
    assert experts.param.module == "layer/experts"
    os.truncate(broken / "ckpt-0" / experts.file, 0)
    found = run("plan", "--tokens", 9, "--capture", "attn_pattern:later=false", "--checkpoint", broken)
    assert "attn_pattern" in found.stdout
    assert not found.stderr


@pytest.mark.parametrize(("count", "places"), [(1, "1st"), (4, "1st, 2nd, 3rd, 4th")])
def test_a_routing_table_of_other_numbers_of_experts(tmp_path, count, places):
    with gs.load(write_random(tmp_path / "one", small_config(num_selected_experts=count))) as grok:
        head, *rows = routing_table(grok.generate([5, 6], 4, stop_at_eos=False)).splitlines()[1:]
    assert head.endswith(f"mean prob of {places}")
    assert len(rows) == 3
    assert len(rows[0].split(",")) == count


def test_nothing_is_generated_for_a_folder_that_is_taken(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    found = run("generate", "x", "--save", tmp_path, code=1)
    assert "not an empty folder" in found.stderr
    assert not found.stdout
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "mine.txt").touch()
    found = run("demo", "--out", tmp_path, code=1)
    assert "not an empty folder" in found.stderr
    assert not found.stdout


@pytest.mark.parametrize("command", [("generate", "The", "--max-new-tokens", "900"), ("demo",)])
def test_ctrl_c(command, tmp_path):
    import signal

    # The tests may run in the background, where Ctrl-C is ignored.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", f"{listen}; from grokscope.cli import main; main()", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    seen = b""
    while b"The" not in seen:
        seen += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr


def test_usage_errors():
    assert run("generate", code=2).stderr
    assert run("dance", code=2).stderr


def test_demo(tmp_path):
    for _ in range(2):  # twice: it replaces what it left
        found = run("demo", "--out", tmp_path / "demo", cwd=tmp_path).stdout
    assert "Routing of the" in found
    for name in ("routing.png", "expert_load.png"):
        assert (tmp_path / "demo" / name).read_bytes()[:4] == b"\x89PNG"
    trace = gs.open(tmp_path / "demo" / "trace")
    assert trace.text in found
    share = (trace["expert_index", 0][trace.phase == "decode"] == 3).mean()
    row = next(line for line in found.splitlines() if line.startswith("    0 "))
    assert row.split()[4] == f"{100 * share:.0f}%"


def test_demo_replaces_only_demos(tmp_path):
    kept = gs.load().generate("Mine", 2).save(tmp_path / "trace")
    assert "is not an empty folder" in run("demo", "--out", tmp_path, code=1).stderr
    assert gs.open(kept).text.startswith("Mine")


def test_a_terminal_without_the_letters(tmp_path):
    found = run(
        "generate",
        "café",
        "--max-new-tokens",
        "2",
        "--save",
        "kept",
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert found.stdout.startswith("caf?")
    assert gs.open(tmp_path / "kept").text.startswith("café")
