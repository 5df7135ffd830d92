#!/usr/bin/env python3
"""The README's table of what runs where, from the variants that CMake was told of.

support_matrix.py BUILD_FOLDER [--fix]      fail when README.md holds another table, or rewrite it
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support matrix: nox -s docs -- --fix -->\n", "<!-- support matrix ends -->\n"
# By room; mha_prefill_dense/backward lies in a room of another operator.
OPERATORS = {
    "mla_decode_dense": "dense decode",
    "mla_decode_sparse": "sparse decode",
    "mla_prefill_sparse": "sparse prefill",
    "mha_prefill_dense": "dense prefill",
    "mha_prefill_dense/backward": "dense prefill, backward",
    "split_kv_combine": "merge",
    "kv_cache": "KV cache",
}
# The rows of kernels that a machine runs (row_runs_on in kernels-core/src/runtime/variant.cc).
MACHINES = {
    "CPU": {"cpu"},
    "Hopper (9.0)": {"portable", "sm90"},
    "Blackwell (10.x)": {"portable", "sm100"},
    "8.x, 12.x": {"portable"},
}
AXES = ("KV", "Q", "D_QK")  # others are no concern of a caller
Combination = tuple[str, ...]  # a value of each axis, "" where the room has no such axis


def combinations(words: list[str]) -> tuple[str, list[Combination]]:
    """The row, and the combinations of axes, of a call "ROW sm90 KV bf16 fp16 ..."."""
    axes: dict[str, list[str]] = {}
    for word in words:
        if word.isupper():
            axes[word] = values = []
        else:
            values.append(word)
    return axes["ROW"][0], list(itertools.product(*(axes.get(axis, [""]) for axis in AXES)))


def cells(rows: list[str]) -> list[str]:
    """By machine, the first of the rows that runs there: they stand in order of preference."""
    return [next((row for row in rows if row in runs), "–") for runs in MACHINES.values()]


def joined(lines: list[list[str]], column: int) -> list[list[str]]:
    """Those that differ in one column only become one."""
    values: dict[tuple[str, ...], list[str]] = {}
    for line in lines:
        values.setdefault((*line[:column], *line[column + 1 :]), []).append(line[column])
    return [[*key[:column], ", ".join(v), *key[column:]] for key, v in values.items()]


def table(calls: list[str]) -> str:
    rows: dict[str, dict[Combination, list[str]]] = {room: {} for room in OPERATORS}
    for call in calls:
        room, *words = call.split()
        row, found = combinations(words)
        for combination in found:
            if any(combination):
                rows[room].setdefault(combination, []).append(row)

    header = ["operator", "cache format", "q", "d_qk", *MACHINES]
    text = [header, ["---"] * len(header)]
    for room, served in rows.items():
        # The CPU's variant serves what any other of its room does.
        lines = [[OPERATORS[room], *key, *cells([*rows, "cpu"])] for key, rows in served.items()]
        for axis in ("q", "d_qk", "cache format"):
            lines = joined(lines, header.index(axis))
        text += lines
    return "".join(f"| {' | '.join(line)} |\n" for line in text)


def main() -> int:
    calls = Path(sys.argv[1], "generated/variants.txt").read_text().splitlines()
    readme = README.read_text()
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    fresh = f"{before}{BEGIN}{table(calls)}{END}{after}"
    if "--fix" in sys.argv:
        README.write_text(fresh)
    elif fresh != readme:
        print(f"README.md's support matrix is not this:\n{table(calls)}nox -s docs -- --fix")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
