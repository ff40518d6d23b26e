"""What a network costs: counted (``count``, ``counter``), measured (``latency``), and where to measure (``bench``).

``table`` looks costs up and gives the expected cost of a relaxed architecture, ``resource`` puts that into a loss.
"""

from nasplat.cost.bench import Bench
from nasplat.cost.counter import Count
from nasplat.cost.latency import Latency
from nasplat.cost.meter import CostMeter, Measurement
from nasplat.cost.resource import Resource
from nasplat.cost.table import CostTable

__all__ = ["Bench", "CostMeter", "CostTable", "Count", "Latency", "Measurement", "Resource"]
