"""Weight initialisation."""

from timm.layers import trunc_normal_
from torch import nn

from vmamba.layers.ssm import SelectiveSSM


def init_weights(module: nn.Module, name: str = "") -> None:
    """What the families share: linear layers normal (std 0.02) with zero bias; all else as its layer makes it.

    Apply children first (timm's ``named_apply`` does): a scan then takes back its own initialisation.
    """
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SelectiveSSM):
        module.reset_parameters()
