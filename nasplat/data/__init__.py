"""Data: where examples come from, kept apart as train, validation and test."""

from nasplat.data.sources import (
    DatasetData,
    EmbeddedData,
    LoaderData,
    Source,
    Splits,
    TensorData,
    TensorSource,
)

__all__ = ["DatasetData", "EmbeddedData", "LoaderData", "Source", "Splits", "TensorData", "TensorSource"]
