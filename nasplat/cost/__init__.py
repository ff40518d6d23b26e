"""What a network costs, and where that is found out.

Counted: ``count``, ``counter``. Measured: ``latency``, ``throughput``, ``memory``, ``energy``; by part: ``breakdown``.
Where measuring is exclusive: ``bench``. ``zero_cost`` scores a network before it is trained. ``table`` looks costs up
and gives the expected cost of a relaxed architecture, which ``resource`` puts into a loss; ``steps`` adds up the
measured steps of packed programs; ``predicted`` is the meter that predicts from either.
"""

from nasplat.cost.accuracy import Accuracy
from nasplat.cost.bench import Bench
from nasplat.cost.counter import Count
from nasplat.cost.energy import Energy
from nasplat.cost.latency import Latency
from nasplat.cost.memory import PeakMemory
from nasplat.cost.meter import ArchitectureMeter, BatchMeter, CostMeter, Measurement, Meter
from nasplat.cost.predicted import Predicted, load_table, prediction_quality
from nasplat.cost.resource import Resource
from nasplat.cost.steps import StepTable
from nasplat.cost.table import CostTable
from nasplat.cost.throughput import Throughput
from nasplat.cost.zero_cost import ZeroCost

__all__ = [
    "Accuracy",
    "ArchitectureMeter",
    "BatchMeter",
    "Bench",
    "CostMeter",
    "CostTable",
    "Count",
    "Energy",
    "Latency",
    "Measurement",
    "Meter",
    "PeakMemory",
    "Predicted",
    "Resource",
    "StepTable",
    "Throughput",
    "ZeroCost",
    "load_table",
    "prediction_quality",
]
