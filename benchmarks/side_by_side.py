"""Contenders in processes of their own, timed in turns: what one run costs another of the same minute shows in both."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Sequence

import numpy as np

Tasks = dict[str, Callable[[], object]]


def _serve(pipe, build: Callable[..., Tasks], arguments: tuple) -> None:
    tasks = build(*arguments)
    pipe.send(list(tasks))
    with contextlib.suppress(EOFError):  # the other end is gone
        while name := pipe.recv():
            begin = time.perf_counter()
            said = tasks[name]()
            pipe.send(said if isinstance(said, float) else time.perf_counter() - begin)


class Contender:
    """A process that holds what `build(*arguments)` made, {task: call}, and runs one of them at a time."""

    def __init__(self, build: Callable[..., Tasks], *arguments):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.tasks: list[str] = self._pipe.recv()

    def __call__(self, task: str) -> float:
        """Seconds of the task, or the figure that it gives itself."""
        self._pipe.send(task)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def in_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """{name: figure [rounds]}: all runs once in each round, in an order that turns.

    Each is run twice, and the second time counts: the first compiles, and brings back memory that the kernel took away
    while the process was idle.
    """
    names, found = list(runs), {name: [] for name in runs}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            runs[name]()
            found[name].append(runs[name]())
    return {name: np.array(values) for name, values in found.items()}


def ratio(of: Sequence[float], to: Sequence[float]) -> str:
    """Median of the paired ratios and its 95 % bootstrap interval."""
    ratios = np.asarray(of) / np.asarray(to)
    draws = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{np.median(ratios):.2f} ({low:.2f} to {high:.2f})"
