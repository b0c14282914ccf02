"""The regression benchmarks' own rules, and that what they compare is the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts import one another by name, as from the command line."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield


def figure(ratio: float) -> dict[str, object]:
    return {"ratio": ratio, "ratio_range": [ratio, ratio]}


def test_a_ratio_falls_when_it_is_more_than_a_tenth_below_the_stored_one() -> None:
    import bench

    stored = {"a": figure(10.0), "b": figure(10.0), "c": figure(10.0)}
    found = {"a": figure(8.9), "b": figure(9.1), "c": figure(30.0), "d": figure(0.1)}
    assert bench.fallen(found, stored) == ["a"]  # d is new: there is nothing that it could fall below


def test_a_suite_that_fell_runs_once_more_and_its_better_figures_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import bench

    turns = {
        "noisy": [{"a": figure(5.0), "b": figure(10.0)}, {"a": figure(9.5), "b": figure(7.0)}],
        "steady": [{"c": figure(2.0)}],
    }
    suites = {name: partial(each.pop, 0) for name, each in turns.items()}
    monkeypatch.setattr(bench, "SUITES", suites)
    stored = {"a": figure(10.0), "b": figure(10.0), "c": figure(2.1)}
    found = bench.measure(["noisy", "steady"], stored)
    assert {name: row["ratio"] for name, row in found.items()} == {"a": 9.5, "b": 10.0, "c": 2.0}
    assert turns == {"noisy": [], "steady": []}  # two runs of the one, one of the other


def test_pandas_makes_the_same_dataset() -> None:
    """An independent reference for events, targets and histories: `measure` compares every row."""
    import prepare_data

    seconds = prepare_data.measure(1, num_events=20_000)
    assert {name: len(found) for name, found in seconds.items()} == {"recast": 1, "pandas": 1}


def test_a_dictionary_allows_the_same_codes() -> None:
    import trie_masks

    seconds, _ = trie_masks.measure(64, 1, num_items=5_000)  # compares the masks
    assert set(seconds) == {"build", "masks"}


def test_bytes_of_a_full_trie_of_four_codes() -> None:
    """64 items: 2 + 5 + 17 pointers of 4 bytes and 4 + 16 + 64 codes of one make 180; an id has 4."""
    import trie_masks

    _, memory = trie_masks.measure(4, 1, num_items=64)
    assert memory == {"masks": 180 / 64, "item_ids": 4.0}


def test_masks_that_differ_stop_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    import trie_masks

    everything = [torch.ones((trie_masks.NUM_ROWS, 64), dtype=torch.bool)] * 3
    monkeypatch.setattr(trie_masks, "dictionary_masks", lambda *_: everything)
    with pytest.raises(AssertionError):
        trie_masks.measure(64, 1, num_items=5_000)


def test_bare_faiss_finds_the_same_codes() -> None:
    import kmeans

    seconds = kmeans.measure(1, num_items=3_000)
    assert set(seconds) == {"recast", "faiss"}


def test_ratios_of_medians_and_of_turns() -> None:
    import timing

    rows = timing.compared({"recast": [1.0, 2.0, 4.0], "other": [3.0, 5.0, 8.0]})
    assert rows["other"]["ratio"] == 2.5  # 5 / 2
    assert rows["other"]["ratio_range"] == [2.0, 3.0]  # 3/1, 5/2, 8/4
    assert (rows["other"]["min_s"], rows["other"]["max_s"], rows["recast"]["ratio"]) == (3.0, 8.0, 1.0)


@pytest.mark.parametrize("page", ["README.md", "docs/concepts/cost.md"])
def test_the_tables_of_the_pages_are_those_of_the_results(page: str) -> None:
    import tables

    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.replaced(page, text) == text, "python benchmarks/tables.py"


def test_a_page_without_marks_is_refused() -> None:
    import tables

    with pytest.raises(ValueError, match=r"README\.md lacks <!-- performance:begin -->"):
        tables.replaced("README.md", "# recast\n")


def test_a_cell_says_the_ratio_and_its_turns() -> None:
    import tables

    assert tables.times(12.34, [11.96, 12.55]) == "12.3x (12.0-12.6)"
    assert tables.times(134.6) == "135x"
