"""Whole models on a GPU under torch.compile, captured in CUDA graphs."""

import pytest
import torch

from tests.models.common import SMALL, image, seeded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_a_compiled_model_can_be_captured(name):
    torch.compiler.reset()
    model, x = seeded(name).cuda(), image(2, 3, 64, 96).cuda()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cuda", torch.bfloat16):
        expected = model(x)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            compiled(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            y = compiled(x)
    graph.replay()
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
