"""Convolution on channels-last maps."""

from torch import Tensor, nn


class Conv2dNHWC(nn.Conv2d):
    """A 2-d convolution of maps of shape (batch, height, width, channels).

    The permuted views it works on are what PyTorch calls ``channels_last``: where the backend keeps that memory format,
    nothing is copied on the way in or out. Same parameters as :class:`torch.nn.Conv2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
