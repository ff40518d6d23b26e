"""Strategies compared honestly: the same terms, seeds and budget, random search always among them.

``nasplat.compare(...)`` runs and compares; ``Comparison.from_results`` compares what was run already;
:mod:`~nasplat.compare.statistics`, :mod:`~nasplat.compare.curves` and :mod:`~nasplat.compare.verdict` do the same for
plain arrays of any origin.
"""

from nasplat.compare.budget import Budget, charged, evaluations, hours
from nasplat.compare.comparison import Comparison
from nasplat.compare.run import compare

__all__ = ["Budget", "Comparison", "charged", "compare", "evaluations", "hours"]
