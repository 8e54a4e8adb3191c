"""Selective scans of every kind the operator can be asked for, as seeded inputs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vmamba.ops import selective_scan

ACTIVATIONS = ("u", "dt", "B", "C")
"""The inputs that come in the activation dtype; the others are float32 parameters."""


@dataclass(frozen=True)
class Case:
    """One scan. Sizes are the operator's: L positions, T steps, K directions, D channels, N states, R dt rank."""

    name: str
    batch: int = 2
    L: int = 12
    D: int = 5
    K: int = 4
    N: int = 2
    R: int = 3
    T: int | None = None
    u_per_direction: bool = False
    shared_params: bool = False
    full_dt: bool = False
    decay_only_steps: bool = False
    param_route: bool = False
    route_per_image: bool = False
    reset: bool = False
    bias: bool = True
    skip: bool = True
    softplus: bool = True
    result: str = "merged"

    def inputs(self) -> dict[str, Tensor]:
        """The differentiable inputs, float64, fresh but the same on every call."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        batch, L, D, K, N, R = self.batch, self.L, self.D, self.K, self.N, self.R
        P = 1 if self.shared_params else K
        made = {
            "u": randn(batch, K, L, D) if self.u_per_direction else randn(batch, L, D),
            "dt": randn(batch, L, P, D if self.full_dt else R),
            "A": -randn(P, D, N).exp(),
            "B": randn(batch, L, P, N),
        }
        if self.result != "states":
            made["C"] = randn(batch, L, P, N)
            if self.skip:
                made["D"] = randn(P, D)
        if not self.full_dt:
            made["dt_weight"] = 0.5 * randn(P, D, R)
        if self.bias:
            made["dt_bias"] = randn(P, D) - 1
        if not self.softplus:
            for key in ("dt", "dt_weight", "dt_bias"):
                if key in made:
                    made[key] = 0.3 * made[key].abs()
        return made

    def tables(self) -> dict[str, Tensor]:
        """The route and what goes with it: random visits, so that some positions come twice and some never."""
        generator = torch.Generator().manual_seed(1 + sum(map(ord, self.name)))
        shape = (self.K, self.L if self.T is None else self.T)
        if self.route_per_image:
            shape = (self.batch, *shape)
        low = -1 if self.decay_only_steps else 0

        def visits() -> Tensor:
            return torch.randint(low, self.L, shape, generator=generator, dtype=torch.int32)

        tables = {"route": visits()}
        if self.param_route:
            tables["param_route"] = visits()
        if self.reset:
            tables["reset"] = torch.rand(shape, generator=generator) < 0.2
        return tables

    def run(self, inputs: dict[str, Tensor], **kwargs) -> Tensor:
        """The scan of these inputs along this case's route."""
        tables = {key: table.to(inputs["u"].device) for key, table in self.tables().items()}
        return selective_scan(**inputs, **tables, dt_softplus=self.softplus, result=self.result, **kwargs)


PLAIN = Case("plain")
CASES = [
    PLAIN,
    Case("one_step", L=1, T=1),
    Case("one_channel", D=1, N=1),
    Case("one_direction", K=1, L=100),
    Case("two_directions", K=2, N=1, D=17),
    Case("three_directions_rank_48", K=3, L=70, D=64, N=1, R=48),
    Case("vmamba_stage", L=56, D=96, N=1, R=6),
    Case("vanilla_stage", L=49, D=48, N=16, R=3),
    Case("odd_length_beyond_a_block", L=131, D=33, N=1, R=7),
    Case("long", L=1000, D=16, K=1, N=1),
    Case("many_images", batch=9, D=70, L=21),
    Case("u_per_direction", u_per_direction=True, K=2, D=19, N=16),
    Case("shared_parameters", shared_params=True),
    Case("full_dt", full_dt=True, L=30, D=40),
    Case("full_dt_shared", full_dt=True, shared_params=True, D=18),
    Case("more_steps_than_positions", T=50),
    Case("fewer_steps_than_positions", T=5, D=35),
    Case("decay_only_steps", decay_only_steps=True, T=40, D=20),
    Case("param_route", param_route=True, shared_params=True, N=16, D=24),
    Case("route_per_image", route_per_image=True, batch=3),
    Case("reset", reset=True, T=90, L=30, D=33),
    Case("everything_at_once", batch=5, T=100, L=40, D=70, reset=True, decay_only_steps=True, param_route=True,
         route_per_image=True, u_per_direction=True),
    Case("no_bias_no_skip", bias=False, skip=False),
    Case("no_softplus", softplus=False),
    Case("steps", result="steps", T=30, D=21),
    Case("steps_decay_only", result="steps", T=30, decay_only_steps=True),
    Case("states", result="states", N=3, D=20, L=70),
    Case("states_one", result="states", N=1, K=1, D=33, L=65, decay_only_steps=True, reset=True),
    Case("empty_batch", batch=0),
    Case("no_steps", T=0),
]  # fmt: skip


def named(name: str, **changes) -> Case:
    """The case of this name, with changes."""
    (case,) = [case for case in CASES if case.name == name]
    return replace(case, **changes)


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, infinite if anything is not finite."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, f"{tuple(got.shape)} != {tuple(want.shape)}"
    if not got.isfinite().all():
        return float("inf")
    return float((got - want).norm() / want.norm().clamp(min=1e-30)) if want.norm() > 0 else float(got.norm())


def results_and_gradients(case: Case, inputs: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
    """The scan's result under "result", and the gradient of a fixed random projection of it for each input."""
    leaves = {key: x.detach().clone().requires_grad_() for key, x in inputs.items()}
    result = case.run(leaves, **kwargs)
    generator = torch.Generator().manual_seed(7)
    projection = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)
    gradients = torch.autograd.grad(result, list(leaves.values()), projection, materialize_grads=True)
    return {"result": result, **dict(zip(leaves, gradients, strict=True))}
