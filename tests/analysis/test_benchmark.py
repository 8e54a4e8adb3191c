"""The benchmark engine on a CPU: what is run, timed, weighed and written."""

import csv
import json
import math
import time
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import tests.analysis.benchmark_models  # noqa: F401  (registers bench_*)
from vmamba.analysis.benchmark.comparison import compare
from vmamba.analysis.benchmark.jobs import DTYPES, LARGEST, Job, Sweep
from vmamba.analysis.benchmark.meters import CpuMeter
from vmamba.analysis.benchmark.peers import PEERS, published_top1, resolve
from vmamba.analysis.benchmark.plots import draw
from vmamba.analysis.benchmark.results import Book, Failure, Figures, Result, read
from vmamba.analysis.benchmark.steps import PRECISIONS, Step, make_step
from vmamba.analysis.benchmark.turns import Effort, measure, measure_largest_batch, search_largest
from vmamba.errors import UserError

CPU = torch.device("cpu")
QUICK = Effort(budget=0.02, rounds=3)
ENVIRONMENT = {"device": "cpu", "hardware": "a processor", "torch": "2", "vmamba": "1", "commit": "a", "date": "today"}
FIGURES = Figures(100.0, 10.0, 9.0, 11.0, 10.0, 12.0, 0.5, 1.0, 3.0)


# What is run


def test_a_sweep_is_all_combinations():
    sweep = Sweep(
        ("a", "b"), ("inference", "training"), ("eager", "compiled"), ("bf16",), (1, 8), (32, 64), optimizer="adamw"
    )
    cells = sweep.cells()
    assert len(cells) == 2 * 2 * 2 * 2
    assert len({job for cell in cells for job in cell}) == 2 * len(cells)
    for cell in cells:
        assert [job.model for job in cell] == ["a", "b"]
        assert len({job.settings for job in cell}) == 1
        assert {job.optimizer for job in cell} == {"adamw" if cell[0].task == "training" else "none"}


def test_precisions():
    assert PRECISIONS.keys() == DTYPES.keys()
    results = {dtype: make_step(Job("bench_probe", size=32, dtype=dtype), CPU).run().dtype for dtype in DTYPES}
    expected = dict.fromkeys(("float32", "tf32"), torch.float32)
    expected |= dict.fromkeys(("bf16", "amp-bf16"), torch.bfloat16) | dict.fromkeys(("fp16", "amp-fp16"), torch.float16)
    assert results == expected


def test_a_training_step_leaves_nothing_behind():
    step = make_step(Job("bench_probe", "training", batch=4, size=32), CPU)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step.run()
    assert step.model.training
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())


def test_the_optimiser_keeps_two_moments():
    plain = make_step(Job("bench_probe", "training", batch=4, size=32), CPU)
    step = make_step(Job("bench_probe", "training", batch=4, size=32, optimizer="adamw"), CPU)
    step.run()
    counters = 4 * len(list(step.model.parameters()))
    assert step.resident_bytes() == plain.resident_bytes() + 2 * 4 * step.params + counters


def test_dropout_and_stochastic_depth_are_off():
    step = make_step(Job("vmamba_nano_32", "training", batch=2, size=32), CPU)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(step.model(image), step.model(image))
    probe = make_step(Job("bench_probe", "training", size=32), CPU).model
    assert torch.equal(probe(image), probe(image))


@pytest.mark.parametrize("model", ["swin_tiny_patch4_window7_224", "vim_tiny_patch16_224", "convnext_tiny"])
def test_models_are_built_for_the_size(model):
    """On the meta device, which stands in for any but the CPU."""
    from vmamba.analysis.benchmark.steps import build_model

    built = build_model(Job(model, size=256, in_chans=4), torch.device("meta"))
    assert built(torch.empty(1, 4, 256, 256, device="meta")).shape == (1, 1000)
    if hasattr(built, "pos_embed"):
        assert built.pos_embed.shape[1:3] == (16, 16)


# How it is measured


def test_peak_memory_is_the_allocators():
    def run():
        first = torch.empty(1 << 20)  # 4 MiB
        second = torch.empty(1 << 19)  # 2 MiB
        del first
        return second + torch.empty(1 << 18).sum()  # 1 MiB, and 2 MiB of the sum

    step = Step(run, nn.Linear(255, 1024, bias=False), lambda: [torch.empty(1 << 18)])
    kept = 4 * 255 * 1024 + (1 << 20)
    _, peak = CpuMeter(CPU).peak(step, graph=False)
    assert peak == pytest.approx(kept + (6 << 20), abs=64)


def test_models_take_turns():
    said = []
    jobs = [Job(model, size=32) for model in ("bench_probe", "bench_wide")]
    results = list(measure(jobs, CpuMeter(CPU), QUICK, said.append))
    rounds = [line.split(" (")[0] for line in said if line.startswith("round")]
    assert rounds == [f"round {n}: {model}" for n in (1, 2, 3) for model in ("bench_probe", "bench_wide")]
    assert [result.job for result in results] == jobs
    for result in results:
        figures = result.outcome
        assert figures.ms_q1 <= figures.ms <= figures.ms_q3
        assert figures.images_per_s == pytest.approx(1e3 / figures.ms)
        assert 0 < figures.latency_ms <= figures.latency_p95_ms
        assert figures.peak_gib > 0
    assert results[1].outcome.params_m == pytest.approx((16 * 48 + 16 + 170) / 1e6)


def test_time_is_that_of_the_calls():
    turn = CpuMeter(CPU).turn(lambda: time.sleep(0.01), 3)
    assert len(turn.latencies) == 3
    assert 10 <= min(turn.latencies) <= turn.ms <= max(turn.latencies)


def test_memory_grows_with_the_batch():
    small, large = (
        next(measure([Job("bench_wide", batch=b, size=256)], CpuMeter(CPU), QUICK)).outcome.peak_gib for b in (1, 16)
    )
    assert 10 < large / small <= 16


def test_a_failure_is_a_result_and_the_others_go_on():
    jobs = [Job(model, size=8) for model in ("bench_greedy", "test_vit", "bench_probe")]
    results = {result.job.model: result.outcome for result in measure(jobs, CpuMeter(CPU), QUICK)}
    assert "RuntimeError" in results["bench_greedy"].reason
    assert "\n" not in results["test_vit"].reason
    assert isinstance(results["test_vit"], Failure)
    assert isinstance(results["bench_probe"], Figures)


@pytest.mark.slow
def test_compiled():
    eager, compiled = (
        next(measure([Job("bench_probe", task, mode, size=32)], CpuMeter(CPU), QUICK)).outcome
        for task, mode in (("inference", "eager"), ("inference", "compiled"))
    )
    assert isinstance(compiled, Figures), compiled
    assert compiled.first_call_s > 10 * eager.first_call_s


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 100, 1000, 12345])
def test_search(most):
    found = search_largest(lambda batch: batch <= most)
    assert found <= most <= found + max(1, found // 16)


def test_search_without_an_answer():
    with pytest.raises(UserError, match="not even one image fits"):
        search_largest(lambda batch: False)


def test_the_largest_batch_respects_the_limit():
    job, meter = Job("bench_wide", size=64), CpuMeter(CPU)
    one = next(measure([job], meter, QUICK)).outcome.peak_gib * 2**30
    limit = int(12 * one)
    result = next(iter(measure_largest_batch(job, meter, QUICK, limit)))
    assert result.outcome.peak_gib * 2**30 <= limit
    more = next(measure([replace(job, batch=result.job.batch + max(2, result.job.batch // 8))], meter, QUICK))
    assert more.outcome.peak_gib * 2**30 > limit
    failed = next(iter(measure_largest_batch(job, meter, QUICK, 1000)))
    assert "not even one image fits" in failed.outcome.reason


# What is written


def test_the_files_hold_every_result(tmp_path):
    stem = tmp_path / "new" / "x"
    book = Book(stem, ENVIRONMENT)
    good, bad = Result(Job("a"), FIGURES), Result(Job("b"), Failure("out of | memory", True))
    for result in (good, bad):
        book.add(result)
        environment, results = read(book.json_path)
        assert environment == ENVIRONMENT
        assert results[-1].job == result.job
    assert results[0] == good
    assert results[1].outcome.reason == "out of | memory"
    with open(stem.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["a", "b"]
    assert rows[0]["hardware"] == "a processor"
    assert rows[1]["error"] == "out of | memory"
    assert rows[1]["ms"] == ""
    table = [line for line in stem.with_suffix(".md").read_text().splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in table}) == 1
    assert {path.name for path in stem.parent.iterdir()} == {"x.json", "x.csv", "x.md"}


def test_a_book_is_not_overwritten_but_continued(tmp_path):
    Book(tmp_path / "x", ENVIRONMENT).add(Result(Job("a"), Failure("no")))
    with pytest.raises(UserError, match=r"x.json exists; choose another --output, or go on with it by --add"):
        Book(tmp_path / "x", ENVIRONMENT)
    with pytest.raises(UserError, match=r"cannot add to .* hardware a processor and another"):
        Book(tmp_path / "x", {**ENVIRONMENT, "hardware": "another"}, add=True)
    book = Book(tmp_path / "x", {**ENVIRONMENT, "date": "tomorrow"}, add=True)
    assert not book.has(Job("a"))
    book.add(Result(Job("a"), FIGURES))
    assert book.has(Job("a"))
    assert not book.has(Job("a", batch=2))
    assert len(read(book.json_path)[1]) == 1


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("end", [".csv", ".md", "-accuracy.png", "-resolution.png"])
def test_files_of_no_book_are_not_overwritten(end, add, tmp_path):
    (tmp_path / f"x{end}").touch()
    with pytest.raises(UserError, match=f"x{end} exists, and belongs to no x.json; choose another --output"):
        Book(tmp_path / "x", ENVIRONMENT, add)


def test_a_batch_that_was_found_is_not_one_that_was_asked_for(tmp_path):
    book = Book(tmp_path / "x", ENVIRONMENT)
    largest = Job("a", batch=LARGEST)
    book.add(Result(Job("a", batch=7), FIGURES))
    book.add(Result(largest, Failure("no"), batch_found=True))
    assert not book.has(largest)
    book.add(Result(Job("a", batch=7), FIGURES, batch_found=True))
    book = Book(tmp_path / "x", ENVIRONMENT, add=True)
    assert book.has(largest)
    assert book.has(Job("a", batch=7))
    assert len(book.results) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', '{"format": "vmamba-benchmark-1"}'])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match="is no JSON file of vmamba benchmark"):
        read(path)
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path / "y.json")


def written(folder, name, *results, **facts):
    book = Book(folder / name, {**ENVIRONMENT, **facts})
    for result in results:
        book.add(result)
    return book.json_path


def test_comparison(tmp_path):
    faster = replace(FIGURES, images_per_s=200.0, ms=5.0, ms_q1=4.9, ms_q3=5.1)
    a = written(tmp_path, "a", Result(Job("m"), FIGURES), Result(Job("n"), FIGURES))
    b = written(
        tmp_path, "b", Result(Job("m"), faster), Result(Job("n"), FIGURES), Result(Job("o"), FIGURES), commit="b"
    )
    lines = compare(a, b).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[5].strip() for line in lines if line.startswith("| ")}
    assert cells["m"] == "2.00"
    assert cells["n"] == "~1.00"
    assert "o" not in cells
    assert lines[-1] == "left out: 1 results that only one of them has"


def test_what_differs_is_not_compared(tmp_path):
    a = written(tmp_path, "a", Result(Job("m"), FIGURES))
    other_hardware = written(tmp_path, "b", Result(Job("m"), FIGURES), hardware="another")
    with pytest.raises(UserError, match="cannot be compared, only vmamba itself may differ: hardware a processor and"):
        compare(a, other_hardware)
    other_batch = written(tmp_path, "c", Result(Job("m", batch=8), FIGURES))
    with pytest.raises(UserError, match="batch is 1 in one and 8 in the other"):
        compare(a, other_batch)
    failed = written(tmp_path, "d", Result(Job("m"), Failure("no")))
    with pytest.raises(UserError, match="cannot be compared"):
        compare(a, failed)


def test_pictures(tmp_path):
    one = [Result(Job("vmamba_tiny"), FIGURES)]
    assert draw(one, ENVIRONMENT, tmp_path / "x") == []
    peers = [Result(Job("convnext_tiny"), replace(FIGURES, images_per_s=120.0)), Result(Job("m"), FIGURES)]
    assert draw(one + peers, ENVIRONMENT, tmp_path / "x") == [tmp_path / "x-accuracy.png"]
    larger = [Result(Job("vmamba_tiny", size=448), FIGURES), Result(Job("convnext_tiny", size=448), Failure("no"))]
    assert draw(one + peers + larger, ENVIRONMENT, tmp_path / "x") == [
        tmp_path / "x-accuracy.png",
        tmp_path / "x-resolution.png",
    ]


NEIGHBOURS = {"vmamba_tiny": 100.0, "convnext_tiny": 100.5, "vmamba_tiny_s2l5": 99.5, "msvmamba_tiny": 100.0}
CROWD = {
    "vmamba_tiny": 2480.0,
    "vmamba_tiny_s2l5": 2470.0,
    "msvmamba_tiny": 2030.0,
    "convnext_tiny": 2040.0,
    "swin_tiny_patch4_window7_224": 2420.0,
    "vim_tiny_patch16_224": 1000.0,
}
"""Here one label has to make room for another that is placed after it."""


@pytest.mark.parametrize("rates", [NEIGHBOURS, CROWD], ids=["neighbours", "crowd"])
def test_labels_of_neighbours_are_apart(tmp_path, monkeypatch, rates):
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw(
        [Result(Job(model), replace(FIGURES, images_per_s=rate)) for model, rate in rates.items()],
        ENVIRONMENT,
        tmp_path / "x",
    )
    (ax,) = figures[0].axes
    boxes = [label.get_window_extent() for label in ax.texts]
    assert len(boxes) == len(rates)
    assert [box.count_overlaps(boxes) for box in boxes] == [1] * len(boxes)  # itself
    assert all(ax.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


# Names


def test_peers_are_models_of_timm():
    import timm

    known = set(timm.list_models())
    assert {peer.name for peer in PEERS.values()} <= known
    assert all(resolve(short) == [peer.name] for short, peer in PEERS.items())


def test_names():
    assert resolve("vmamba_tiny") == ["vmamba_tiny"]
    assert set(resolve("plainmamba_l?")) == {"plainmamba_l1", "plainmamba_l2", "plainmamba_l3"}
    with pytest.raises(UserError, match="unknown model 'swin_tinny'; did you mean swin_tiny"):
        resolve("swin_tinny")
    assert published_top1("vmamba_tiny") == published_top1("vmamba_tiny_s1l8") == 82.6
    assert published_top1("swin_tiny_patch4_window7_224") == 81.3
    assert published_top1("resnet18") is None


def test_json_holds_no_numbers_that_are_none(tmp_path):
    """Whoever reads the file with another JSON parser than Python's."""
    path = written(tmp_path, "a", Result(Job("m"), FIGURES), Result(Job("n"), Failure("no")))
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert all(value is None or not math.isnan(value) for row in content["results"] for value in [row["ms"]])
