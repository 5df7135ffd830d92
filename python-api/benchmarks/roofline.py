"""The picture of a result file: each case's arithmetic intensity and speed under the machine's
ceilings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

COLOURS = {
    "bf16": "tab:blue",
    "fp16": "tab:cyan",
    "fp8": "tab:orange",
    "v32_fp8": "tab:red",
    "v4_fp8": "tab:purple",
    "v41_fp8": "tab:green",
}


def draw(results: dict[str, Any], rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Writes a picture of some rows of a result file. Needs matplotlib (dependency group `bench`).

    Args:
        results: a result file's content.
        rows: those to show, with `case`, `flops`, `bytes`, `tflops` and `kv_format`.
        title: first line of the picture; the machine is the second.
        path: where the PNG goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    read_gbps, gemm_tflops = (results["ceilings"][k] for k in ("read_gbps", "gemm_tflops"))
    points = [(row["flops"] / row["bytes"], row["tflops"]) for row in rows]
    ridge = gemm_tflops * 1e3 / read_gbps  # FLOP/byte where both ceilings meet
    left = min([x for x, _ in points] + [ridge / 4]) / 1.4
    right = max([x for x, _ in points] + [ridge]) * 3.2  # room for labels
    bottom, top = min([y for _, y in points] + [gemm_tflops / 4]) / 1.6, gemm_tflops * 1.6

    figure, axes = pyplot.subplots(figsize=(11, 7.5))
    axes.plot(
        [left, ridge, right], [left * read_gbps * 1e-3, gemm_tflops, gemm_tflops], "k-", lw=1.5
    )
    roof: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}
    axes.annotate(
        f"G: bf16 GEMM, {gemm_tflops:.0f} TFLOP/s",
        (right, gemm_tflops),
        (-6, 6),
        ha="right",
        **roof,
    )
    slope_x = math.sqrt(left * ridge)
    axes.annotate(
        f"R: read, {read_gbps:.0f} GB/s",
        (slope_x, slope_x * read_gbps * 1e-3),
        (-10, 6),
        ha="right",
        **roof,
    )
    for kv_format in dict.fromkeys(row["kv_format"] for row in rows):
        of_format = [
            p for p, row in zip(points, rows, strict=True) if row["kv_format"] == kv_format
        ]
        xs, ys = zip(*of_format, strict=True)
        axes.scatter(xs, ys, s=28, color=COLOURS.get(kv_format), label=kv_format, zorder=3)

    # Just past the ridge labels go to the left, where only the roof is; elsewhere to the right.
    sides = ["right" if ridge < x < 2 * ridge else "left" for x, _ in points]
    heights = _label_heights(points, sides, line=math.log(top / bottom) * 0.022)
    for (x, y), side, height, row in zip(points, sides, heights, rows, strict=True):
        axes.annotate(
            row["case"],
            (x, y),
            (x / 1.12 if side == "right" else x * 1.12, height),
            ha=side,
            va="center",
            fontsize=7.5,
            bbox={"boxstyle": "square,pad=0.1", "color": "white", "alpha": 0.8},
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.5"},
        )
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.set(xlabel="arithmetic intensity, FLOP/byte", ylabel="TFLOP/s")
    axes.set_title(f"{title}\n{results['gpu']}, torch {results['torch']}, {results['date']}")
    axes.grid(which="both", lw=0.3, alpha=0.5)
    if rows:
        axes.legend(title="KV cache", loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _label_heights(points: list[tuple[float, float]], sides: list[str], line: float) -> list[float]:
    """A height for each label, near that of its point, so that labels do not overlap.

    Cases of one head count have nearly one intensity: they form columns. Down a column, labels are
    at least a line apart, in the order of their points; `line` is a line's height in log units.
    """
    heights = [y for _, y in points]
    placed: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: -points[i][1]):
        for j in placed:
            near = abs(math.log(points[i][0] / points[j][0])) < math.log(1.5)
            if near and sides[i] == sides[j]:
                heights[i] = min(heights[i], heights[j] * math.exp(-line))
        placed.append(i)
    return heights
