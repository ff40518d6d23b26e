"""Search strategies. Each is a plug-in of its own; none knows another."""

from strategies.bats_search import BatsSearch
from strategies.darts import Darts
from strategies.greedy_growth import GreedyGrowth
from strategies.one_shot import OneShot
from strategies.optuna_search import OptunaSearch
from strategies.random_search import RandomSearch
from strategies.regularized_evolution import RegularizedEvolution

__all__ = ["BatsSearch", "Darts", "GreedyGrowth", "OneShot", "OptunaSearch", "RandomSearch", "RegularizedEvolution"]
