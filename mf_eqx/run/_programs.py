"""Compiled programs that take too much of what Linux allows a process."""

import gc
from pathlib import Path

import jax


def drop_programs_if_many() -> None:
    """Forget all compiled programs if they take half of the memory mappings that Linux allows a process.

    XLA needs hundreds of mappings for each program of a CPU. Of the default number, 65,530, some eighty training steps
    take all, and then XLA ends the process ("Unable to allocate section memory").
    """
    try:
        used = Path("/proc/self/maps").read_bytes().count(b"\n")
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:  # another system
        return
    if used > allowed / 2:
        jax.clear_caches()
        gc.collect()
