"""The search spaces that come with nasplat, one file each."""

from search_spaces.bats import Bats
from search_spaces.binary_growth import BinaryGrowth
from search_spaces.darts_cell import DartsCell
from search_spaces.meta_kernel import MetaKernel
from search_spaces.sandglass import Sandglass

__all__ = ["Bats", "BinaryGrowth", "DartsCell", "MetaKernel", "Sandglass"]
