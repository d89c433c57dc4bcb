"""A cluster of processes on this host, through ipyparallel and as srun starts them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import grokscope as gs

cluster_module = pytest.importorskip("grokscope.notebook.cluster", reason="the extra `cluster` is not installed")

PROMPTS = ["The old keeper of the lighthouse wrote", "In the beginning", "7 + 5 ="]
ON_CPU = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),  # of ipyparallel and tornado
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster():
    with gs.cluster(n=2, mesh="2x2", environment=ON_CPU) as cluster:
        yield cluster


def agree(one: gs.Trace, other: gs.Trace) -> None:
    assert one.tokens.tolist() == other.tokens.tolist()
    for tap in other.taps:
        np.testing.assert_allclose(one[tap], other[tap], atol=1e-4, err_msg=tap)


def test_a_cluster_does_what_a_grok_does(cluster, grok, tmp_path):
    wishes = [
        "resid_post",
        "attn_pattern",
        gs.capture("resid_pre", reduce="lens"),
        gs.capture("expert_index", reduce="count"),
    ]
    heard = []
    ours = cluster.generate(PROMPTS, 8, capture=wishes, on_token=heard.append)
    theirs = grok.generate(PROMPTS, 8, capture=wishes)
    for one, other in zip(ours, theirs, strict=True):
        agree(one, other)
        assert "".join(e.text for e in heard if e.prompt == one.meta["prompt"]) == one.continuation
    with cluster.edits(gs.route.ban(layers=3, experts=1)), grok.edits(gs.route.ban(layers=3, experts=1)):
        agree(cluster.trace(PROMPTS[0]), grok.trace(PROMPTS[0]))
    assert len(cluster.dump(PROMPTS, tmp_path / "dump", 3)) == 3
    assert cluster.loss(PROMPTS[0]).nats_per_token == pytest.approx(grok.loss(PROMPTS[0]).nats_per_token, abs=1e-4)
    assert cluster.plan(PROMPTS, 8, capture=wishes).total["host"] == grok.plan(PROMPTS, 8, capture=wishes).total["host"]
    assert "2 engines, mesh 2x2" in repr(cluster)


def test_looking_while_it_runs_and_stopping(cluster, grok):
    seen = []

    def look(event: gs.TokenEvent) -> None:
        seen.append((event.glimpse("router_logits", False), event.glimpse("router_logits", True)))
        if len(seen) == 5:
            raise KeyboardInterrupt

    trace = cluster.generate(PROMPTS[0], 40, on_token=look)
    assert trace.meta["finish"] == "interrupt"
    assert len(trace.tokens) - trace.prompt_length in (5, 6)
    np.testing.assert_array_equal(seen[3][0], trace["router_logits"][:, trace.prompt_length + 3])
    np.testing.assert_array_equal(seen[0][1], trace["router_logits"][:, : trace.prompt_length])
    agree(cluster.trace(PROMPTS[0]), grok.trace(PROMPTS[0]))


def test_looking_at_the_last_token(cluster, grok):
    """It is done when its token is told of; afterwards the engines keep nothing of it."""
    keep = [gs.capture(tap, phase="prefill") for tap in ("final_norm", "resid_post")]

    def looks(model):
        seen, events = {}, []

        def look(event):
            events.append(event)
            for key in ("final_norm", "resid_post"):
                seen[event.position, key] = event.glimpse(key, True)
                with pytest.raises(KeyError, match="not captured at generated tokens"):
                    event.glimpse(key, False)

        model.generate(PROMPTS[0], 2, on_token=look, capture=keep, stop_at_eos=False)
        with pytest.raises(KeyError, match="its Trace has it"):
            events[0].glimpse("final_norm", True)
        return seen

    ours, theirs = looks(cluster), looks(grok)
    assert len(ours) == 4
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], atol=1e-4)
    held = "len(__import__('grokscope.run.worker', fromlist=['_worker'])._worker.jobs)"
    assert cluster._client[cluster._engines[0]].apply_sync(eval, held) == 0


def test_what_was_asked_wrongly_leaves_it_whole(cluster):
    with pytest.raises(ValueError, match="vocabulary"):
        cluster.generate([99999], 3)
    with pytest.raises(ZeroDivisionError):
        cluster.generate(PROMPTS[0], 5, on_token=lambda event: 1 / 0)
    assert cluster.generate(PROMPTS[0], 3).meta["finish"] == "length"


def test_stopped_at_the_last_token(cluster):
    def stop(event: gs.TokenEvent) -> None:
        if event.position == start + 3:
            raise KeyboardInterrupt

    start = len(cluster.encode(PROMPTS[0]))
    trace = cluster.generate(PROMPTS[0], 4, on_token=stop, stop_at_eos=False)
    assert (len(trace), trace.meta["finish"]) == (start + 4, "interrupt")


def test_functions_are_as_they_are_when_a_call_begins(cluster, grok, tmp_path, monkeypatch):
    """Those of modules too, which an engine imports once, or cannot; what is the same is compiled once."""
    (tmp_path / "of_the_user.py").write_text(
        "FACTOR = 1.0\ndef fn(value, layer, positions):\n    return value * FACTOR\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import of_the_user

    for factor in (1.0, 0.0, 1.0):
        of_the_user.FACTOR = factor
        with cluster.edits(gs.edit("attn_delta", of_the_user.fn)), grok.edits(gs.edit("attn_delta", of_the_user.fn)):
            agree(cluster.trace(PROMPTS[0]), grok.trace(PROMPTS[0]))
    held = "len(__import__('grokscope.run.worker', fromlist=['_worker'])._worker.functions)"
    assert cluster._client[cluster._engines[1]].apply_sync(eval, held) == 2


def test_an_error_of_the_users_own(cluster):
    class MineError(Exception):
        def __init__(self, what, where):
            super().__init__(f"{what} at {where}")

    def fails(value, layer, positions):
        raise MineError("mine", "home")

    with cluster.edits(gs.edit("attn_delta", fails)), pytest.raises(RuntimeError, match="MineError: mine at home"):
        cluster.trace(PROMPTS[0])
    assert cluster.generate(PROMPTS[0], 3).meta["finish"] == "length"


def test_an_engine_that_fails_alone_says_why(cluster, monkeypatch):
    monkeypatch.setattr(cluster_module, "GRACE", 1.0)

    def fails(value, layer, positions):
        import jax

        if jax.process_index() == 1:
            raise OSError("its disk is gone")
        return value

    with (
        cluster.edits(gs.edit("attn_delta", fails)),
        pytest.raises(gs.ClusterError, match=r"engine 1 failed alone \(OSError: its disk is gone\) while .*restart"),
    ):
        cluster.trace(PROMPTS[0])
    with pytest.raises(gs.ClusterError, match="restart"):
        cluster.trace(PROMPTS[0])
    join = cluster_module.Cluster._join

    def join_without(self):
        lacking = "def load(**_): raise FileNotFoundError('it is not on host 1')"
        self._client[self._engines[1]].execute(f"from grokscope.run import engine\n{lacking}\nengine.load = load").get()
        return join(self)

    with monkeypatch.context() as at, pytest.raises(FileNotFoundError, match="it is not on host 1"):
        at.setattr(cluster_module.Cluster, "_join", join_without)
        cluster.restart()
    with pytest.raises(gs.ClusterError, match=r"did not come back; .*restart\(\)"):
        cluster.trace(PROMPTS[0])
    cluster.restart()
    process = cluster._client[cluster._engines[1]].apply_sync(os.getpid)
    os.kill(process, 9)
    while cluster._engines[1] in cluster._client.ids:
        time.sleep(0.1)
    with pytest.raises(gs.ClusterError, match=r"engine 1 was lost while beginning.*restart\(\)"):
        cluster.trace(PROMPTS[0])
    cluster.restart()
    assert cluster.generate(PROMPTS[0], 3).meta["finish"] == "length"


def test_a_lost_controller_is_told_at_once(cluster):
    begun = []

    def kill(_: gs.TokenEvent) -> None:
        controller = cluster._ipp.controller.process
        begun.append(time.monotonic())
        for process in (*controller.children(recursive=True), controller):
            process.kill()

    with pytest.raises(gs.ClusterError, match=r"controller of the engines was lost while running.*restart\(\)"):
        cluster.generate(PROMPTS[0], 40, on_token=lambda event: begun or kill(event))
    assert time.monotonic() - begun[0] < 30
    cluster.restart()
    assert cluster.generate(PROMPTS[0], 3).meta["finish"] == "length"


@pytest.mark.parametrize("when", ["prefill", "decode", "gather"])
def test_a_lost_engine_is_one_clear_error_at_once(cluster, when):
    process = cluster._client[cluster._engines[1]].apply_sync(os.getpid)
    clock = []

    def kill(event: gs.TokenEvent | None) -> None:
        clock.append(time.monotonic())
        os.kill(process, 9)
        if event and when == "gather":
            event.glimpse("router_logits", False)

    with pytest.raises(gs.ClusterError, match=r"engine 1 was lost .*restart\(\)"):
        if when == "prefill":
            kill(None)
        cluster.generate(PROMPTS[0], 40, on_token=lambda event: clock or kill(event))
    assert time.monotonic() - clock[0] < 60, "not the heartbeat of jax.distributed, 100 s"
    with pytest.raises(gs.ClusterError, match="restart"):
        cluster.trace(PROMPTS[0])
    cluster.restart()
    assert cluster.generate(PROMPTS[0], 3).meta["finish"] == "length"


def test_four_processes(grok):
    with gs.cluster(n=4, mesh="1x8", environment=ON_CPU) as cluster:
        agree(cluster.generate(PROMPTS[0], 6), grok.generate(PROMPTS[0], 6))


def test_streamed_weights(grok):
    with gs.cluster(n=2, mesh="2x2", weights="streamed", memory="30MB", environment=ON_CPU) as cluster:
        one, streamed = cluster.plan(PROMPTS[0], 6), gs.load(weights="streamed", memory="30MB", mesh="2x2")
        assert one.read == streamed.plan(PROMPTS[0], 6).read > 1_000_000
        agree(cluster.generate(PROMPTS[0], 6), grok.generate(PROMPTS[0], 6))


def test_a_mesh_that_does_not_fit_is_refused_from_the_engines():
    with pytest.raises(ValueError, match="these fit"):
        gs.cluster(n=2, mesh="1x3", environment=ON_CPU)
    with pytest.raises(ValueError, match="how many engines"):
        gs.cluster()


HEARING = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
runpy.run_module("grokscope", run_name="__main__", alter_sys=True)
"""


def srun_dump(folder, tasks: int, prompts: list[str], *options: str) -> list[subprocess.Popen]:
    """`grokscope dump` as srun would start it."""
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    variables = {
        "SLURM_JOB_ID": str(int(time.time()) % 4096), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-c", HEARING, "dump", "prompts.jsonl", "out", "--resume", *options], cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | ON_CPU | variables | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        )
        for i in range(tasks)
    ]  # fmt: skip


def ends(started: list[subprocess.Popen], seconds: float = 240) -> tuple[list[int], list[str]]:
    """Return codes, and what each said."""
    said = [process.communicate(timeout=seconds)[0].decode() for process in started]
    return [process.returncode for process in started], said


@pytest.mark.parametrize("tasks", [2, 4])
def test_a_dump_under_srun_is_the_dump_of_one_process(grok, tmp_path, tasks):
    codes, said = ends(srun_dump(tmp_path, tasks, PROMPTS, "--max-new-tokens", "4"))
    assert codes == [0] * tasks, said
    found = gs.open(tmp_path / "out")
    for one, other in zip(found, grok.generate(PROMPTS, 4), strict=True):
        agree(one, other)
    assert found[0].meta["mesh"] == f"1x{2 * tasks}"


def test_ctrl_c_under_srun(tmp_path):
    """All tasks stop before the same step, whenever each hears of it; what cannot go on is told by all."""
    prompts, options = PROMPTS * 60, ("--max-new-tokens", "60")
    started, heard = srun_dump(tmp_path, 2, prompts, *options), b""
    while not re.search(rb" [1-9]\d*/180", heard):
        heard += os.read(started[0].stdout.fileno(), 4096) or pytest.fail(heard.decode())
    for process in reversed(started):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    codes, said = ends(started, 60)
    assert codes == [130, 130], said
    assert "--resume goes on" in said[0]
    assert 0 < len(gs.open(tmp_path / "out").prompts) < 180
    codes, said = ends(srun_dump(tmp_path, 2, prompts, "--max-new-tokens", "5"), 60)
    assert codes == [1, 1], said
    assert "different: max_new_tokens (60, now 5)" in said[0]
    assert "the first process failed, and says why" in said[1]
