"""Layers that several search spaces share."""

from nasplat.nn.binary import BinaryBlock, BinaryConv2d, BinaryFactorisedReduce, set_binarisation, sign

__all__ = ["BinaryBlock", "BinaryConv2d", "BinaryFactorisedReduce", "set_binarisation", "sign"]
