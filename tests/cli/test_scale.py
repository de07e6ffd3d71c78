"""thresher scale as a user calls it."""

import csv
import json

import pytest
from command_line import call, fails

HEAD = "query_id,query,choices,generation_length,trial,coverage,compute_cost,memory_cost,total_cost"


@pytest.fixture
def tables(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    for name, budget, factor in (("dense", None, 10), ("local0_topk128", 128, 1), ("local0_topk64", None, 10)):
        lines = [HEAD + (",budget" if budget else "")]
        for q, coverage in (("0", 0.5), ("1", 1.0)):
            for n, c in ((1, coverage), (2, 1.0)):
                cost = [n * factor * 5.0, n * factor * 50.0]
                lines.append(
                    f'{q},"a, b",7,"[100, 200]",{n},{c},{cost[0]},{cost[1]},{sum(cost)}' + (",128" if budget else "")
                )
        path = folder / f"aime24_qwen3-8b_{name}_numTrials_tradeoff.csv"
        path.write_text("\n".join(lines) + "\n")
    return folder


def parsed(*arguments):
    done = call(*arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_frontier_of_tables(tables):
    found = parsed("scale", "frontier", tables, "--costs", "50,60,600,2000")
    assert [(r["model"], r["method"]) for r in found["models"]] == [("qwen3-8b", "dense"), ("qwen3-8b", "topk128")]
    dense, sparse = found["models"]
    assert dense["pass_at_k"] == {"1": 0.75, "2": 1.0}
    assert dense["frontier"]["eflops"]["oracle"] == [0, 0, 0.75, 1.0]
    assert dense["frontier"]["flops"]["oracle"] == [0.75, 0.75, 1.0, 1.0]
    assert sparse["frontier"]["eflops"]["oracle"] == [0, 0.75, 1.0, 1.0]
    assert found["sparse"]["eflops"]["model"] == [None, "qwen3-8b", "qwen3-8b", "qwen3-8b"]
    assert found["dense"]["flops"]["accuracy"][0] == 0.75
    assert "none" in found["growth"]
    shown = call("scale", "frontier", tables, "--costs", "60,600")
    assert "costed as dense" in shown.stderr
    assert "0.750" in shown.stderr
    half = parsed("scale", "frontier", tables, "--device", "2812500:10000", "--costs", "350")  # half of 562.5
    assert half["models"][0]["frontier"]["eflops"]["oracle"] == [0.75]
    assert len(parsed("scale", "frontier", tables, "--all")["models"]) == 3


def test_a_run_its_frontier_and_its_report(tiny_folder, tmp_path):
    traces = tmp_path / "traces"
    command = ("scale", "run", "--out", traces, "--model", tiny_folder, "--weights", "float32", "--max-tokens", 8)
    command += ("--questions", 3, "--samples", 4, "--difficulty", 1, "--attention", "dense;streaming:sinks=1,window=9")
    found = parsed(*command)
    assert [(r["method"], r["samples"], r["of"]) for r in found["runs"]] == [
        ("dense", 12, 12),
        ("streaming:sinks=1,window=9", 12, 12),
    ]
    files = sorted(traces.iterdir())
    before = [f.read_bytes() for f in files]
    assert parsed(*command)["runs"] == found["runs"]
    assert [f.read_bytes() for f in files] == before
    frontier = parsed("scale", "frontier", traces)
    assert [r["method"] for r in frontier["models"]] == ["dense", "streaming:sinks=1,window=9"]
    first = frontier["models"][0]
    assert set(first["pass_at_k"]) == {"1", "2", "4"}
    assert first["cost_quantiles"]["0.05"] <= first["cost_quantiles"]["0.5"] <= first["cost_quantiles"]["0.95"]
    assert 0 <= first["unended"] <= 1
    page = tmp_path / "report.html"
    done = call("scale", "report", traces, "--out", page, "--stop", "verifier")
    assert done.returncode == 0, done.stderr
    assert "of the samples" in done.stderr
    text = page.read_text()
    assert "Plotly" in text
    assert "/*DATA*/" not in text
    assert "http-equiv" not in text
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert {r["method"] for r in rows} == {"dense", "streaming:sinks=1,window=9"}
    assert {r["cap"] for r in rows} == {"8", "4", "2", "1"}
    assert (tmp_path / "report.png").stat().st_size > 10_000
    fails(2, "other settings", *command, "--temperature", 0.7)


def test_report_of_tables(tables, tmp_path):
    done = call("scale", "report", tables, "--out", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.png").exists()


def test_what_cannot_be(tables, tiny_folder, tmp_path):
    model = ("--model", tiny_folder, "--out", tmp_path / "out")
    fails(2, "No such file", "scale", "run", "--task", "chess", *model)
    fails(2, "stopping by 'luck'", "scale", "run", "--stop", "luck", *model)
    fails(2, "did you mean 'dense'", "scale", "run", "--attention", "dence", *model)
    fails(2, "give one of them", "scale", "run", "--processes", 2, "--ray", "local", *model)
    fails(2, "no tables (.csv) and no traces", "scale", "frontier", tmp_path)
    fails(2, "--costs 0", "scale", "frontier", tables, "--costs", "0")
    fails(2, "give two above 0", "scale", "frontier", tables, "--from", 5, "--to", 4)
    fails(2, "the name does not say", "scale", "frontier", _copy(tables, tmp_path / "mine.csv"))
    for name in ("report.csv", "report.png", "report"):  # its CSV or PNG would replace the page
        fails(2, "ends with .html", "scale", "report", tables, "--out", tmp_path / name)
    fails(2, "--attention: nothing is given", "scale", "run", "--attention", ";", *model)
    fails(2, "stopping by 'luck'", "scale", "report", tables, "--out", tmp_path / "r.html", "--stop", "luck")


def _copy(tables, path):
    path.write_text(next(tables.iterdir()).read_text())
    return path
