"""Command line of `python -m hvp.benchmarks`."""

import json

from hvp.benchmarks.__main__ import command_line


def test_rescue_names_the_method_that_has_no_benchmark(hvp):
    ran = hvp("rescue", "simsiam", main=command_line)
    assert ran.code == 2
    assert "simsiam: the step with Rescue is not measured. Methods that are: simclr, mocov3, dinov2" in ran.err


def test_a_benchmark_writes_its_rows(hvp, tmp_path):
    assert hvp("loader", "--rounds", "1", "--json", "rows.json", main=command_line).code == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 3
    assert {"benchmark", "case", "ratio", "target", "ok", "memory_mb"} <= set(rows[0])
