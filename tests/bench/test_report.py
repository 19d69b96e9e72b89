"""The table of bench/peers.py: medians, the better variant, ratios that point the right way."""

from __future__ import annotations

import runpy
from pathlib import Path

REPORT = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "peer" / "report.py"))
SAMPLES = {
    "ours": {"": {"decode 0": [10.0, 60.0, 50.0], "load": [2.0]}},
    "llama.cpp": {"fa": {"decode 0": [20.0, 20.0, 90.0], "load": [1.0]}, "nofa": {"decode 0": [25.0, 25.0, 1.0]}},
    "openvino": {"": {"decode 0": [40.0], "load": [4.0]}},
}


def test_the_better_variant_counts_by_its_median() -> None:
    assert REPORT["medians"](SAMPLES) == {
        "ours": {"decode 0": 50.0, "load": 2.0},
        "llama.cpp": {"decode 0": 25.0, "load": 1.0},
        "openvino": {"decode 0": 40.0, "load": 4.0},
    }


def test_ratios_are_above_one_where_ours_is_better() -> None:
    lines = REPORT["table"](REPORT["medians"](SAMPLES))
    assert lines[2:] == [
        "| decode at depth 0, tok/s | 50.0 | 25.0 | 40.0 | 2.00 | 1.25 |",
        "| load to first token, s | 2.00 | 1.00 | 4.00 | 0.50 | 0.50 |",
    ]


def test_a_measure_that_an_engine_lacks_is_left_blank() -> None:
    lines = REPORT["table"]({"ours": {"prefill 512": 8.0}, "llama.cpp": {}})
    assert lines[2] == "| prefill 512, tok/s | 8.0 |  |  |  |"
