"""The models under torch.compile, torch.export and torch.jit.trace."""

import contextlib
import re

import pytest
import torch
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch.export import Dim, export

from tests.models.common import HIERARCHICAL, SMALL, image, seeded
from tests.ops.standing_in import standing_in

TENSOR = re.compile(r"\((\d+), (\d+), (\d+), \d+\), \(\d+, (\d+), \d+, \d+\)")  # size and strides, in generated code


@pytest.fixture(autouse=True)
def compiler():
    """A compiler that has seen no other model: how often it compiles the same function is limited."""
    torch.compiler.reset()


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


def generated_code(step) -> list[str]:
    """What inductor generates for a training step, forward and backward; it is not compiled, nor run."""
    programs = []

    class Generated(Exception):
        """Instead of running the program."""

    def keep(graph):
        programs.append(graph.codegen()[0].value)
        return type("Program", (), {"call": stop})

    def stop(*args):
        raise Generated

    with (
        pytest.MonkeyPatch.context() as patch,
        inductor.patch(fx_graph_cache=False),
        functorch.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True),
        contextlib.suppress(Generated),
    ):
        patch.setattr("torch._inductor.graph.GraphLowering.compile_to_module", keep)
        step()
    return programs


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True], ids=["by torch", "by kernels"])
@pytest.mark.parametrize("name", [*HIERARCHICAL, "test_plainmamba"])
def test_no_map_is_transposed(name, kernels):
    batch, height, width = 2, 72, 104  # whose maps have no side that is also a number of channels
    # In the first stage, one block goes over into another.
    options = {"img_size": (height, width)} if name == "test_plainmamba" else {"depths": (2, 1, 1, 1)}
    model = seeded(name, drop_path_rate=0.1, **options).train()
    with contextlib.ExitStack() as stack:
        for module in ("layer_norm", "depthwise_conv", "gelu") if kernels else ():  # in the program, which never runs
            stack.enter_context(standing_in(module))
        programs = generated_code(lambda: torch.compile(model, fullgraph=True)(image(batch, 3, height, width)))
    assert len(programs) == 2
    sizes = {(-(-height // step), -(-width // step)) for step in (2, 4, 8, 16, 32)}
    tensors = [tuple(map(int, found)) for program in programs for found in TENSOR.findall(program)]
    maps = [(rows, columns, stride) for count, rows, columns, stride in tensors if count == batch]
    assert not [size for *size, stride in maps if tuple(size) in sizes and stride == 1], "a map with its rows innermost"


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
