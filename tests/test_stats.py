"""Statistics as snapshots: percentages, sums over layers, differences."""

from __future__ import annotations

import numpy as np

from pyllm.stats import LayerStats, Stats

LONG = [8, 2, 800, 300, 4000, 1000, 40, 10]
LOCAL = [8, 8, 800, 0, 4000, 0, 0, 0]


def counts(*layers: list[int]) -> np.ndarray:
    return np.array(layers, np.uint64)


def test_percentages_per_layer_and_in_total() -> None:
    stats = Stats(counts(LONG, LOCAL), {})
    assert stats.layers == [LayerStats(25.0, 37.5, 25.0, 25.0), LayerStats(100.0, 0.0, 0.0, None)]
    assert stats.total == LayerStats(62.5, 18.75, 12.5, 25.0)
    parts = (stats.heads_local, stats.bulk_work, stats.bulk_read, stats.pages_read)
    assert LayerStats(*parts) == stats.total


def test_nothing_is_no_percentage() -> None:
    stats = Stats(np.zeros((2, 8), np.uint64), {})
    assert stats.total == LayerStats(None, None, None, None)


def test_what_happened_between_two_snapshots() -> None:
    before = Stats(counts(LOCAL), {"dense": 3, "window:64": 1}, 4, 1.0, 0, 0.0)
    after = Stats(counts(LONG) + counts(LOCAL), {"dense": 5, "window:64": 1, "oracle": 2}, 6, 2.5, 2, 0.5)
    between = after - before
    assert between.total == Stats(counts(LONG), {}).total
    assert between.evaluated == {"dense": 2, "oracle": 2}
    assert (between.prefill_per_second, between.decode_per_second) == (2 / 1.5, 4.0)


def test_what_answers_carry() -> None:
    assert Stats(counts(LONG), {"dense": 9}).attention() == {
        "heads_local": 25.0,
        "bulk_work": 37.5,
        "bulk_read": 25.0,
        "pages_read": 25.0,
        "evaluated": {"dense": 9},
    }


def test_printed_it_is_one_line_for_people() -> None:
    assert str(Stats(counts(LONG), {"dense": 9}, 1200, 2.0)) == (
        "heads local 25.0 %, bulk work 37.5 %, bulk read 25.0 %, pages read 25.0 %, "
        "prefill 1,200 tokens at 600 t/s, decode 0 tokens"
    )
    assert str(Stats(counts(LOCAL), {})).startswith("heads local 100.0 %, bulk work 0.0 %")
    assert "pages read –" in str(Stats(counts(LOCAL), {}))
