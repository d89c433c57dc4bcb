"""One process at a time writes a folder."""

import fcntl
from pathlib import Path
from typing import TextIO


def lock(directory: Path) -> TextIO:
    """Held until it is closed, or the process ends. Raises RuntimeError where another has it."""
    file = (directory / ".lock").open("w")  # stays: who deletes it may delete another's
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        file.close()
        raise RuntimeError(f"{directory} is being written by another process") from err
    return file
