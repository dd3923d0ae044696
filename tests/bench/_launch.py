"""Run one command and report what it took: `python -I -S _launch.py DESCRIPTOR COMMAND...`, the answer a JSON line.

A program of its own because Linux counts the memory of the process that started a child into the child's peak: measured
from a large parent, every child looks large. This one has a bare interpreter's few megabytes.
"""

import os
import sys
import time


def main() -> None:
    """Spawn, wait, report."""
    report, command = int(sys.argv[1]), sys.argv[2:]
    started = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, dict(os.environ), file_actions=[(os.POSIX_SPAWN_CLOSE, report)])
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - started
    # ru_maxrss is in bytes on macOS, in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    numbers = (wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit, os.waitstatus_to_exitcode(status))
    os.write(report, ("[" + ",".join(map(repr, numbers)) + "]\n").encode())


main()
