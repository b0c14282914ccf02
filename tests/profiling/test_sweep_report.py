"""Ratios, table and picture of a sweep over two axes, from rows whose figures are easy to divide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from recast_cli.profiling import sweep_report as report
from recast_cli.profiling.sweep import ARMS

MIB = 1 << 20
FASTER = {"stock": 1, "stock_shared": 4, "recast": 8, "recast_shared": 16}


def rows(*, reference: bool = True) -> Iterator[dict[str, Any]]:
    """Prompts of 64 and 256 tokens, groups of 8 and 32; an arm divides stock's figures by its factor."""
    for length in (64, 256):
        for size in (8, 32):
            for arm in ARMS:
                scale = length * size / FASTER[arm]
                row: dict[str, Any] = {"arm": arm, "prompt_length": length, "group_size": size, "batch": 2}
                row |= {"hidden_size": None, "layers": None, "ref_log_prob_s": None}
                for phase, weight in (("old_log_prob", 1), ("ref_log_prob", 1), ("actor_update", 4)):
                    if reference or phase != "ref_log_prob":
                        row |= {f"{phase}_s": 2 * weight * scale, f"{phase}_cpu_s": weight * scale}
                        row |= {f"{phase}_peak_bytes": int(weight * scale * MIB), f"{phase}_mfu": weight / 10}
                row |= {"peak_memory_bytes": int(4 * scale * MIB), "flops": 30 * scale, "tokens": int(scale)}
                yield row


def test_ratios_are_over_stock_at_the_same_point() -> None:
    for row in report.with_ratios(list(rows()), "cpu_s"):
        wanted = pytest.approx(FASTER[row["arm"]])
        assert all(ratio == wanted for ratio in row["ratio"].values())
        assert set(row["ratio"]) >= {"old_log_prob", "ref_log_prob", "actor_update", "all", "peak_memory"}


def test_a_table_of_two_axes_and_its_longer_form() -> None:
    found = report.with_ratios(list(rows()), "cpu_s")
    headers, cells = report.table(found)
    assert headers[:4] == ["prompt length", "group size", "batch", "arm"]
    assert len(cells) == 4 * 4
    # 64 x 8 / 16 = 32 seconds, once, once and four times
    assert cells[3] == [64, 8, 2, report.LABELS["recast_shared"], "32.000", "32.000", "128.000", "16.0x",
                        "16.0x", "32", "128"]  # fmt: skip
    longer, cells = report.table(found, by_phase=True)
    phases = ("old log prob", "ref log prob", "actor update")
    assert longer[-6:] == [f"{phase}, {what}" for what in ("MFU", "peak MiB") for phase in phases]
    assert cells[3][-6:] == ["10%", "10%", "40%", "32.0", "32.0", "128.0"]


def test_without_a_reference_there_is_no_column_of_it() -> None:
    found = report.with_ratios(list(rows(reference=False)), "cpu_s")
    assert not any("ref" in header for header in report.table(found, by_phase=True)[0])
    assert found[3]["ratio"]["all"] == pytest.approx(16) and "ref_log_prob" not in found[3]["ratio"]


def test_the_picture_has_a_line_of_panels_for_each_value_of_the_shorter_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    report.plot(report.with_ratios(list(rows()), "cpu_s"), tmp_path / "sweep.png")
    monkeypatch.undo()
    (figure,) = drawn
    assert len(figure.axes) == 2 * 3  # two group sizes (prompt length goes across), three panels
    assert [panel.get_title(loc="left") for panel in figure.axes[::3]] == [
        "group size 8, batch 2",
        "group size 32, batch 2",
    ]
    measured = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    dotted = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    for lines in (measured, dotted):  # three arms beside stock, two lengths each
        assert [list(line.get_xdata()) for line in lines] == [[64, 256]] * 3
        assert [list(line.get_ydata()) for line in lines] == [[4, 4], [8, 8], [16, 16]]
    plt.close(figure)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
