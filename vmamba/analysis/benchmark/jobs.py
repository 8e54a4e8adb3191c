"""What a benchmark measures: a model under one set of settings, and the sweep of many."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

TASKS = ("inference", "training")
MODES = ("eager", "compiled", "graph", "compiled-graph")
DTYPES = {
    "float32": "float32 throughout, TF32 off",
    "tf32": "float32 tensors, TF32 matrix products and convolutions",
    "bf16": "bfloat16 weights and activations",
    "fp16": "float16 weights and activations",
    "amp-bf16": "bfloat16 autocast over float32 weights",
    "amp-fp16": "float16 autocast over float32 weights, no loss scaling",
}
"""Names of the precisions; TF32 is on in all but the first for what stays float32."""

LARGEST = 0
"""As a batch: the most images that fit."""


@dataclass(frozen=True)
class Job:
    """One measurement. Results may be compared where all but the model is the same.

    Attributes:
        model: timm name.
        task: ``"inference"`` (eval mode, inference mode) or ``"training"`` (forward, cross-entropy, backward, and the
            optimiser's step where there is one).
        mode: ``"eager"``; ``"compiled"``, by torch.compile; ``"graph"``, replayed as a CUDA graph;
            ``"compiled-graph"``, both.
        dtype: A key of :data:`DTYPES`.
        batch: Images a call, or :data:`LARGEST` before that is found.
        size: Side of the square images in pixels.
        in_chans: Channels of the images.
        channels_last: Whether images and weights are in channels_last memory.
        optimizer: ``"none"`` or ``"adamw"``; of training only.
    """

    model: str
    task: str = "inference"
    mode: str = "eager"
    dtype: str = "float32"
    batch: int = 1
    size: int = 224
    in_chans: int = 3
    channels_last: bool = True
    optimizer: str = "none"

    @property
    def compiled(self) -> bool:
        return self.mode.startswith("compiled")

    @property
    def graph(self) -> bool:
        return self.mode.endswith("graph")

    @property
    def settings(self) -> str:
        """All but the model, for a reader."""
        batch = "largest batch" if self.batch == LARGEST else f"batch {self.batch}"
        parts = [self.task, self.mode, self.dtype, f"{batch} at {self.size}"]
        if self.in_chans != 3:
            parts.append(f"{self.in_chans} channels")
        if not self.channels_last:
            parts.append("channels first")
        if self.optimizer != "none":
            parts.append(f"with {self.optimizer}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Sweep:
    """Models, and the settings they are measured under: all combinations."""

    models: Sequence[str]
    tasks: Sequence[str] = ("inference",)
    modes: Sequence[str] = ("eager",)
    dtypes: Sequence[str] = ("float32",)
    batches: Sequence[int] = (1,)
    sizes: Sequence[int] = (224,)
    in_chans: int = 3
    channels_last: bool = True
    optimizer: str = "none"

    def cells(self) -> list[list[Job]]:
        """The jobs, those of the same settings together: they take turns."""
        points = itertools.product(self.modes, self.tasks, self.dtypes, self.sizes, self.batches)
        return [
            [self._job(model, mode, task, dtype, size, batch) for model in self.models]
            for mode, task, dtype, size, batch in points
        ]

    def _job(self, model: str, mode: str, task: str, dtype: str, size: int, batch: int) -> Job:
        optimizer = self.optimizer if task == "training" else "none"
        return Job(model, task, mode, dtype, batch, size, self.in_chans, self.channels_last, optimizer)
