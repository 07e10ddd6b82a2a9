"""What ``bench serve`` found on this project's machines, as a table and pictures."""

import json
from pathlib import Path

import pytest
from loraplex.core.errors import BadConfig
from loraplex_deployments.bench_pictures import cpu_chart, read_serve_results, serve_chart, serve_table

RESULT = Path(__file__).parents[2] / "notebooks/results/platform_cpu.json"


def test_they_say_what_the_file_says(tmp_path: Path) -> None:
    without = json.loads(RESULT.read_bytes())
    without["summary"]["http_over_engine"] = without["summary"]["engine_tokens_per_s"] = None
    (tmp_path / "running.json").write_text(json.dumps(without))
    results = read_serve_results([RESULT, tmp_path / "running.json"])
    found = results["platform_cpu"].summary
    assert found.http_over_engine is not None
    assert f"HTTP, platform_cpu 16 streams, 0 adapters: {found.http_over_engine:.3g}" in serve_chart(results)
    assert "HTTP, running" not in serve_chart(results)
    assert f"gateway, running 16 streams, 0 adapters: {found.cpu['gateway'].ms_per_token:.3g}" in cpu_chart(results)
    table = serve_table(results)
    assert f"{found.http_tokens_per_s:.4g}" in table
    assert table.count("<tr>") == 3
    (tmp_path / "running.json").write_text("[]")
    with pytest.raises(BadConfig, match=r"running\.json: not a result"):
        read_serve_results([tmp_path / "running.json"])
