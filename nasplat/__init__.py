"""nasplat: neural architecture search with pluggable spaces and strategies, and measured hardware cost.

The names below are stable. ``import nasplat`` loads neither Ray nor MLflow nor ONNX.
"""

from importlib.metadata import PackageNotFoundError, version

from nasplat.architecture import Architecture
from nasplat.compare import Comparison, charged, compare, evaluations, hours
from nasplat.cost import Count, Energy, Latency, PeakMemory, Predicted, Throughput, ZeroCost
from nasplat.errors import NasplatError, NasplatWarning, SearchInterrupted
from nasplat.joint_space import JointSpace
from nasplat.mlflow_tracker import MlflowTracker
from nasplat.objectives import at_least, at_most, maximise, minimise
from nasplat.phases import Phase
from nasplat.ranges import Float, Int
from nasplat.result import Candidate, Result, load
from nasplat.space import Group, SearchSpace, Supernet, space_from
from nasplat.strategy import Evaluate, Explore, History, Report, Strategy, Trial
from nasplat.study import Study
from nasplat.task import Recipe, Task
from nasplat.teacher import Teacher

try:
    __version__ = version("nasplat")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"

__all__ = [
    "Architecture",
    "Candidate",
    "Comparison",
    "Count",
    "Energy",
    "Evaluate",
    "Explore",
    "Float",
    "Group",
    "History",
    "Int",
    "JointSpace",
    "Latency",
    "MlflowTracker",
    "NasplatError",
    "NasplatWarning",
    "PeakMemory",
    "Phase",
    "Predicted",
    "Recipe",
    "Report",
    "Result",
    "SearchInterrupted",
    "SearchSpace",
    "Strategy",
    "Study",
    "Supernet",
    "Task",
    "Teacher",
    "Throughput",
    "Trial",
    "ZeroCost",
    "at_least",
    "at_most",
    "charged",
    "compare",
    "evaluations",
    "hours",
    "load",
    "maximise",
    "minimise",
    "space_from",
]
