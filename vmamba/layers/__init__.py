"""Parts that two or more model families share. Maps are channels last: (batch, height, width, channels)."""

from vmamba.layers.block import BlockSequence, PositionalBlock, PreNormBlock, run_blocks
from vmamba.layers.conv import Conv2dNHWC, ConvNormAct, DepthwiseConv2d
from vmamba.layers.downsample import ConvDownsample, InvertedDownsample, PatchMerging
from vmamba.layers.init import init_weights
from vmamba.layers.mlp import Mlp
from vmamba.layers.norm import BranchNorm, LayerNorm, ScanNorm
from vmamba.layers.ss2d import SS2D, GatedSS2D
from vmamba.layers.ssm import SelectiveSSM, dt_rank
from vmamba.layers.stem import ConvStem, PatchStem, ResidualConvStem

__all__ = [
    "SS2D",
    "BlockSequence",
    "BranchNorm",
    "Conv2dNHWC",
    "ConvDownsample",
    "ConvNormAct",
    "ConvStem",
    "DepthwiseConv2d",
    "GatedSS2D",
    "InvertedDownsample",
    "LayerNorm",
    "Mlp",
    "PatchMerging",
    "PatchStem",
    "PositionalBlock",
    "PreNormBlock",
    "ResidualConvStem",
    "ScanNorm",
    "SelectiveSSM",
    "dt_rank",
    "init_weights",
    "run_blocks",
]
