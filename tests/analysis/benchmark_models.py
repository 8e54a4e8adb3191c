"""Models so small that a benchmark of them, compiled too, takes no time; registered with timm as any other."""

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn


class Probe(nn.Module):
    """A convolution, a mean, a classifier; as much dropout as a default of some model might have."""

    def __init__(self, width=8, num_classes=10, in_chans=3, img_size=None):
        super().__init__()
        self.num_classes = num_classes
        self.conv = nn.Conv2d(in_chans, width, 4, 4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.drop(self.conv(x).mean((2, 3))))


class Greedy(Probe):
    """Asks for more memory than any machine has, as soon as it is called."""

    def forward(self, x):
        return super().forward(x) + torch.empty(1 << 50, device=x.device).sum()


default_cfgs = generate_default_cfgs(
    {
        name: {"num_classes": 10, "input_size": (3, 32, 32), "first_conv": "conv", "classifier": "fc"}
        for name in ("bench_probe.none", "bench_wide.none", "bench_greedy.none")
    }
)


@register_model
def bench_probe(pretrained=False, **kwargs):
    return build_model_with_cfg(Probe, "bench_probe", pretrained, **kwargs)


@register_model
def bench_wide(pretrained=False, **kwargs):
    return build_model_with_cfg(Probe, "bench_wide", pretrained, **{"width": 16, **kwargs})


@register_model
def bench_greedy(pretrained=False, **kwargs):
    return build_model_with_cfg(Greedy, "bench_greedy", pretrained, **kwargs)
