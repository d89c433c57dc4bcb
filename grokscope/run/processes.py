"""Several processes that run one program, as `srun` starts them: the same calls in each, and the first one writes."""

import os
import threading
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def join_slurm() -> None:
    """Joins the tasks of `srun`, if there are several: one a GPU. To be called before anything touches a device.

    Raises RuntimeError where srun left out a variable that JAX needs.
    """
    if int(os.environ.get("SLURM_NTASKS", 1)) < 2 or "SLURM_PROCID" not in os.environ:
        return  # a plain process, or a batch script outside srun
    missing = [name for name in SLURM if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"srun started several tasks, but {', '.join(missing)} is not set; start them with plain srun"
        )
    jax.distributed.initialize(initialization_timeout=300)


def is_first() -> bool:
    return jax.process_index() == 0


def from_first(numbers: set[int], count: int) -> set[int]:
    """The numbers, of 0 to count - 1, that the first process has, on all of them."""
    if jax.process_count() == 1:
        return numbers
    mask = multihost_utils.broadcast_one_to_all(np.isin(np.arange(count), sorted(numbers)))
    return set(np.flatnonzero(mask).tolist())


def from_any(flag: bool) -> bool:
    """Whether it is set in any of the processes."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def agreed(event: threading.Event, ask: bool) -> threading.Event:
    """The event; of several processes one that is set if any's is now, so that all stop before the same step. Without
    `ask`, the same in all, it is not set: asking waits for what runs on the devices."""
    if jax.process_count() == 1:
        return event
    found = threading.Event()
    if ask and from_any(event.is_set()):
        found.set()
    return found


def in_first(do: Callable[[], T]) -> T | None:
    """do() in the first process, and None in the others. They raise RuntimeError where it raises there."""
    made, failed = None, None
    try:
        made = do() if is_first() else None
    except Exception as err:
        failed = err
    if from_any(failed is not None):
        raise failed or RuntimeError("the first process failed, and says why; the others end with it")
    return made


def wait_for_all() -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("grokscope")
