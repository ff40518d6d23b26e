"""Export: a trained architecture as files that run elsewhere, each compared with the model it came from."""

from nasplat.export.bundle import ExportReport, FileReport, export
from nasplat.export.compare import Comparison
from nasplat.export.onnx import Onnx
from nasplat.export.packed import Packed
from nasplat.export.target import Target
from nasplat.export.torch_export import TorchExport
from nasplat.export.weights import Weights, load_bundle

__all__ = [
    "Comparison",
    "ExportReport",
    "FileReport",
    "Onnx",
    "Packed",
    "Target",
    "TorchExport",
    "Weights",
    "export",
    "load_bundle",
]
