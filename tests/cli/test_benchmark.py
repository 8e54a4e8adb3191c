import csv
import json

import tests.analysis.benchmark_models  # noqa: F401  (registers bench_*)
from tests.running import one_line, vmamba

QUICK = ("--device", "cpu", "--threads", 1, "--budget", 0.02, "--rounds", 3)


def benchmark(*arguments):
    return vmamba("benchmark", *QUICK, *arguments)


def test_sweep(tmp_path):
    stem = tmp_path / "x"
    result = benchmark(
        "bench_probe", "--peers", "bench_wide", "--size", "32,64", "--task", "inference,training", "--output", stem
    )
    assert result.status == 0, result.err
    assert result.out.startswith("device cpu, hardware ")
    with open(stem.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {(row["model"], row["task"], row["size"]) for row in rows} == {
        (model, task, size)
        for model in ("bench_probe", "bench_wide")
        for task in ("inference", "training")
        for size in ("32", "64")
    }
    assert all(float(row["images_per_s"]) > 0 and not row["error"] for row in rows)
    assert len([line for line in result.out.splitlines() if " img/s " in line]) == 8
    assert (tmp_path / "x-resolution.png").exists()

    assert "exists; choose another --output" in one_line(benchmark("bench_probe", "--size", 32, "--output", stem))
    again = benchmark("bench_probe", "--size", "32,96", "--output", stem, "--add", "--profile", 2)
    assert again.status == 0, again.err
    assert "1 results are there already" in again.out
    assert " ms a call:" in again.out
    assert len(json.loads(stem.with_suffix(".json").read_text())["results"]) == 9
    table = vmamba("benchmark", "--compare", stem.with_suffix(".json"), stem.with_suffix(".json"))
    assert table.out.count("~1.00") == 9


def test_what_fails_has_a_row_and_a_status(tmp_path):
    message = one_line(benchmark("bench_greedy", "bench_probe", "--size", 32, "--output", tmp_path / "x"))
    assert "1 of 2 measurements failed; their rows say why, the others stand" in message
    rows = json.loads((tmp_path / "x.json").read_text())["results"]
    assert {row["model"]: bool(row["error"]) for row in rows} == {"bench_greedy": True, "bench_probe": False}


def test_largest_batch(tmp_path):
    find = ("bench_wide", "--find-batch", "--size", 64, "--output", tmp_path / "x")
    assert "--find-batch on a CPU needs --memory-limit" in one_line(benchmark(*find))
    result = benchmark(*find, "--memory-limit", 0.002)
    assert result.status == 0, result.err
    (row,) = json.loads((tmp_path / "x.json").read_text())["results"]
    assert row["batch"] > 4
    assert row["peak_gib"] <= 0.002
    again = benchmark(*find, "--memory-limit", 0.002, "--add")
    assert "1 results are there already" in again.out
    assert json.loads((tmp_path / "x.json").read_text())["results"] == [row]


def test_mistakes(tmp_path):
    assert "which models?" in one_line(benchmark())
    assert "unknown model 'bench_prob'; did you mean bench_probe" in one_line(benchmark("bench_prob"))
    assert "CUDA graphs, which device 'cpu' has not" in one_line(benchmark("bench_probe", "--mode", "graph"))
    assert "'eagre' is none of eager, compiled" in one_line(benchmark("bench_probe", "--mode", "eagre"))
    assert "'1,x' is not a list of positive whole numbers" in one_line(benchmark("bench_probe", "--batch", "1,x"))
    assert "measures nothing" in one_line(benchmark("bench_probe", "--compare", "a.json", "b.json"))
    unwritable = benchmark("bench_probe", "--output", "/proc/x")
    assert "cannot write /proc/x.json: No such file" in one_line(unwritable)
    assert unwritable.out == "", "it was measured first"
    assert "cannot read a.json" in one_line(benchmark("--compare", "a.json", "b.json"))
