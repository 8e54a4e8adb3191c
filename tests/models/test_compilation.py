"""The models under torch.compile, torch.export and torch.jit.trace."""

import pytest
import torch
from torch.export import Dim, export

from tests.models.common import SMALL, image, seeded


@pytest.mark.parametrize("name", SMALL)
def test_compiles_into_one_graph(name):
    model, compiled = seeded(name).train(), seeded(name).train()
    x = image(2, 3, 64, 48)
    expected = model(x)
    expected.square().mean().backward()

    y = torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)
    y.square().mean().backward()

    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for (key, a), b in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", SMALL)
def test_everything_is_made_where_the_image_is(name):
    def check(graph, _):
        tensors = [node.meta.get("example_value") for node in graph.graph.nodes]
        made = {tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)}
        assert made == {"meta"}  # a table made on the CPU would be copied to the GPU at every call
        return graph.forward

    model = seeded(name).to("meta")
    torch.compile(model, fullgraph=True, backend=check)(image(2, 3, 64, 48).to("meta"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_compiles_with_inductor(name):
    model = seeded(name)
    x = image(2, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()  # as for inference: the states a backward pass would need are then no part of the program
def test_exports_for_any_batch_and_size(name):
    model = seeded(name)
    sizes = {0: Dim("batch", min=1, max=64), 2: Dim.AUTO, 3: Dim.AUTO}
    program = export(model, (image(2, 3, 96, 130),), dynamic_shapes={"x": sizes}).module()
    for size in ((2, 96, 130), (5, 72, 224), (1, 104, 72)):
        x = image(size[0], 3, *size[1:])
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_traces(name):
    model = seeded(name)
    x = image(2, 3, 64, 48)
    traced = torch.jit.trace(model, x)
    other = image(2, 3, 64, 48, seed=2)
    assert torch.equal(traced(other), model(other))
