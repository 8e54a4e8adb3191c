"""The call that is timed: a forward, or a training step, of a model with random weights on random images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vmamba.analysis.benchmark.jobs import Job
from vmamba.training.model_factory import ModelRequest, create, default_cfg

Run = Callable[[], object]


@dataclass(frozen=True)
class Precision:
    """What a name in :data:`vmamba.analysis.benchmark.jobs.DTYPES` means."""

    stored: torch.dtype
    autocast: torch.dtype | None = None
    tf32: bool = True


PRECISIONS = {
    "float32": Precision(torch.float32, tf32=False),
    "tf32": Precision(torch.float32),
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
    "amp-bf16": Precision(torch.float32, torch.bfloat16),
    "amp-fp16": Precision(torch.float32, torch.float16),
}


@dataclass(frozen=True)
class Step:
    """One call of :attr:`run` is what the figures are of.

    Attributes:
        run: Runs it; on a GPU without waiting for it.
        model: The model.
        kept: Tensors that stay between calls beside the model's: images, labels, the optimiser's state.
    """

    run: Run
    model: nn.Module
    kept: Callable[[], list[Tensor]]

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def resident_bytes(self) -> int:
        """What is allocated between two calls."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.kept()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def make_step(job: Job, device: torch.device) -> Step:
    """Builds the model and its inputs on the device.

    Raises:
        UserError: No such model, or it takes no such image.
    """
    precision = PRECISIONS[job.dtype]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision.tf32
    torch.manual_seed(0)
    model = build_model(job, device).to(dtype=precision.stored).train(job.task == "training")
    images = torch.randn(job.batch, job.in_chans, job.size, job.size, device=device, dtype=precision.stored)
    if job.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    forward: Callable[[Tensor], Tensor] = model
    if job.compiled:
        forward = torch.compile(model, fullgraph=True, dynamic=False)
    autocast = torch.autocast(device.type, precision.autocast, enabled=precision.autocast is not None)

    if job.task == "inference":

        def infer() -> Tensor:
            with torch.inference_mode(), autocast:
                return forward(images)

        return Step(infer, model, lambda: [images])

    labels = torch.randint(0, _classes(model), (job.batch,), device=device)
    optimizer = _make_optimizer(job, model, device)
    # As optimisers forget gradients: a walk through all modules takes the host as long as hundreds of kernels.
    parameters = list(model.parameters())

    def train() -> None:
        with autocast:
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    def kept() -> list[Tensor]:
        state = optimizer.state.values() if optimizer is not None else ()
        return [images, labels, *(value for values in state for value in values.values() if torch.is_tensor(value))]

    return Step(train, model, kept)


def build_model(job: Job, device: torch.device) -> nn.Module:
    """The model of a job on a device, for images of the job's size, without stochastic depth and dropout.

    They would cost some models something and others nothing, by defaults that say nothing of the architecture.
    """
    with device:  # made there, which is faster than moved there
        model = create(ModelRequest(job.model, img_size=job.size, kwargs={"in_chans": job.in_chans}))
        cfg = default_cfg(job.model)
        resize = getattr(model, "set_input_size", None)
        if resize is not None and not cfg.fixed_input_size and job.size != cfg.input_size[-1]:
            resize(img_size=job.size)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.to(device)


def _classes(model: nn.Module) -> int:
    classes = getattr(model, "num_classes", 0)
    return classes if isinstance(classes, int) and classes > 0 else 1000


def _make_optimizer(job: Job, model: nn.Module, device: torch.device) -> torch.optim.Optimizer | None:
    if job.optimizer == "none":
        return None
    on_gpu = device.type == "cuda"
    # So small a rate that the weights stay what they were, and with them whatever depends on their values.
    return torch.optim.AdamW(model.parameters(), lr=1e-8, fused=True, capturable=on_gpu and job.graph)
