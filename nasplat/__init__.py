"""nasplat: neural architecture search with pluggable spaces and strategies, and measured hardware cost.

The names below are stable. ``import nasplat`` loads neither Ray nor MLflow nor ONNX.
"""

from importlib.metadata import PackageNotFoundError, version

from nasplat.architecture import Architecture
from nasplat.cost import Count, Latency
from nasplat.errors import NasplatError, NasplatWarning, SearchInterrupted
from nasplat.mlflow_tracker import MlflowTracker
from nasplat.objectives import at_least, at_most, maximise, minimise
from nasplat.phases import Phase
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
    "Count",
    "Evaluate",
    "Explore",
    "Group",
    "History",
    "Latency",
    "MlflowTracker",
    "NasplatError",
    "NasplatWarning",
    "Phase",
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
    "Trial",
    "at_least",
    "at_most",
    "load",
    "maximise",
    "minimise",
    "space_from",
]
