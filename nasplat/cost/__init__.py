"""What a network costs: counted (``count``, ``counter``), measured (``latency``), and where to measure (``bench``).

``zero_cost`` scores it before it is trained.
``table`` looks costs up and gives the expected cost of a relaxed architecture, ``resource`` puts that into a loss.
"""

from nasplat.cost.bench import Bench
from nasplat.cost.counter import Count
from nasplat.cost.latency import Latency
from nasplat.cost.meter import BatchMeter, CostMeter, Measurement, Meter
from nasplat.cost.resource import Resource
from nasplat.cost.table import CostTable
from nasplat.cost.zero_cost import ZeroCost

__all__ = [
    "BatchMeter",
    "Bench",
    "CostMeter",
    "CostTable",
    "Count",
    "Latency",
    "Measurement",
    "Meter",
    "Resource",
    "ZeroCost",
]
