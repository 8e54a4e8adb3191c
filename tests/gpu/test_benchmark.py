"""The benchmark engine on a GPU: graphs replay what they captured, memory is counted, what does not fit is told."""

import pytest
import torch

import tests.analysis.benchmark_models  # noqa: F401  (registers bench_*)
from vmamba.analysis.benchmark.jobs import Job
from vmamba.analysis.benchmark.results import Failure, Figures
from vmamba.analysis.benchmark.turns import Effort, measure

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

QUICK = Effort(budget=0.1, rounds=3)


@pytest.fixture(scope="module")
def meter():
    from vmamba.analysis.benchmark.meters import CudaMeter

    return CudaMeter(torch.device("cuda", 0))


@pytest.mark.parametrize("task", ["inference", "training"])
@pytest.mark.parametrize("optimizer", ["none", "adamw"])
def test_eager_and_graph(task, optimizer, meter):
    outcomes = {}
    for mode in ("eager", "graph"):
        job = Job("vmamba_nano_32", task, mode, "amp-bf16", batch=8, size=32, optimizer=optimizer)
        (result,) = measure([job], meter, QUICK)
        assert isinstance(result.outcome, Figures), result.outcome
        outcomes[mode] = result.outcome
    assert outcomes["graph"].ms < outcomes["eager"].ms
    # A graph has a workspace of its own for matrix products, tens of MiB.
    assert outcomes["graph"].peak_gib == pytest.approx(outcomes["eager"].peak_gib, rel=0.2, abs=0.125)


def test_compiled_and_compiled_graph(meter):
    for mode in ("compiled", "compiled-graph"):
        (result,) = measure([Job("bench_probe", "training", mode, size=32)], meter, QUICK)
        assert isinstance(result.outcome, Figures), result.outcome


def test_peak_memory_is_the_models_alone(meter):
    beside = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    (result,) = measure([Job("bench_wide", batch=64, size=256, dtype="float32")], meter, QUICK)
    images, maps = 64 * 3 * 256**2 * 4, 64 * 16 * 64**2 * 4
    assert images + maps <= result.outcome.peak_gib * 2**30 < images + maps + 2**27
    del beside


def test_what_does_not_fit_leaves_room_for_the_others(meter):
    jobs = [Job(model, size=32) for model in ("bench_probe", "bench_greedy", "bench_wide")]
    outcomes = {result.job.model: result.outcome for result in measure(jobs, meter, QUICK)}
    assert isinstance(outcomes["bench_greedy"], Failure)
    assert outcomes["bench_greedy"].out_of_memory
    assert isinstance(outcomes["bench_wide"], Figures)
    assert isinstance(outcomes["bench_probe"], Figures)
