"""Layers that several search spaces share."""

from nasplat.nn.binary import BinaryBlock, BinaryConv2d, BinaryFactorisedReduce, set_binarisation, sign
from nasplat.nn.expert import ExpertBinaryConv2d, set_experts
from nasplat.nn.meta_kernel import MetaConv2d
from nasplat.nn.mobile import InvertedResidual, SandglassBlock

__all__ = [
    "BinaryBlock",
    "BinaryConv2d",
    "BinaryFactorisedReduce",
    "ExpertBinaryConv2d",
    "InvertedResidual",
    "MetaConv2d",
    "SandglassBlock",
    "set_binarisation",
    "set_experts",
    "sign",
]
