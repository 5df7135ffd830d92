#!/usr/bin/env python3
"""Keeps compiling cheap: CPU seconds a file, and in all.

    compile_budget.py launch COMPILER...     as CMAKE_<LANG>_COMPILER_LAUNCHER: run, note the time
    compile_budget.py check BUILD_FOLDER     fail when a file or the sum is over the budget

CPU time, not wall time, so that a busy machine changes little. Each object's time lies beside it,
which keeps the sum right when a later build compiles only some of the files.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

FILE_SECONDS = 30
TOTAL_SECONDS = 1100
SUFFIX = ".cpu_seconds"


def launch(argv: list[str]) -> int:
    code = subprocess.call(argv)
    if "-o" in argv and "-c" in argv:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = usage.ru_utime + usage.ru_stime
        Path(argv[argv.index("-o") + 1] + SUFFIX).write_text(f"{seconds:.2f}")
    return code


def check(build: Path) -> int:
    times = {
        str(path.relative_to(build))[: -len(SUFFIX)]: float(path.read_text())
        for path in build.rglob(f"*{SUFFIX}")
        if path.with_suffix("").exists()  # the object: not one of a file since renamed
    }
    if not times:
        print(f"no compile times in {build}: was it built with this script as the launcher?")
        return 1
    slowest = sorted(times.items(), key=lambda item: -item[1])
    for name, seconds in slowest[:5]:
        print(f"{seconds:7.1f} s  {name}")
    total = sum(times.values())
    print(f"{total:7.1f} s  of CPU in {len(times)} files; {TOTAL_SECONDS} s allowed")
    over = [(name, seconds) for name, seconds in slowest if seconds > FILE_SECONDS]
    for name, seconds in over:
        print(f"over the budget of a file: {name}: {seconds:.1f} s, {FILE_SECONDS} s allowed")
    if total > TOTAL_SECONDS:
        print("over the budget in all")
    return 1 if over or total > TOTAL_SECONDS else 0


if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    sys.exit(launch(rest) if mode == "launch" else check(Path(rest[0])))
