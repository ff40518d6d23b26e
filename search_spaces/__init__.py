"""The search spaces that come with nasplat, one file each, and the table of one of them."""

from search_spaces.bats import Bats
from search_spaces.binary_growth import BinaryGrowth
from search_spaces.darts_cell import DartsCell
from search_spaces.meta_kernel import MetaKernel
from search_spaces.nasbench201 import NasBench201
from search_spaces.nasbench201_table import NasBench201Table
from search_spaces.sandglass import Sandglass

__all__ = ["Bats", "BinaryGrowth", "DartsCell", "MetaKernel", "NasBench201", "NasBench201Table", "Sandglass"]
