"""What a network costs: counted (``count``, ``counter``), measured (``latency``), and where to measure (``bench``)."""

from nasplat.cost.bench import Bench
from nasplat.cost.counter import Count
from nasplat.cost.latency import Latency
from nasplat.cost.meter import CostMeter, Measurement

__all__ = ["Bench", "CostMeter", "Count", "Latency", "Measurement"]
