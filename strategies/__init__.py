"""Search strategies and explorers. Each is a plug-in of its own; none knows another."""

from strategies.asha import AsyncSuccessiveHalving
from strategies.bats_search import BatsSearch
from strategies.darts import Darts
from strategies.darts_minus import DartsMinus
from strategies.dr_nas import DrNas
from strategies.fair_darts import FairDarts
from strategies.fair_paths import FairPaths
from strategies.filtered import Filtered
from strategies.gdas import Gdas
from strategies.greedy_growth import GreedyGrowth
from strategies.hyperband import Hyperband
from strategies.local_search import LocalSearch
from strategies.median_stopping import MedianStopping
from strategies.nsga2 import Nsga2
from strategies.one_shot import OneShot
from strategies.optuna_search import OptunaSearch
from strategies.pc_darts import PcDarts
from strategies.predictor_search import PredictorSearch
from strategies.random_search import RandomSearch
from strategies.ranking_fidelity import RankingFidelity
from strategies.regularized_evolution import RegularizedEvolution
from strategies.sandwich_paths import SandwichPaths
from strategies.screening import Screening
from strategies.successive_halving import SuccessiveHalving
from strategies.uniform_paths import UniformPaths

__all__ = [
    "AsyncSuccessiveHalving",
    "BatsSearch",
    "Darts",
    "DartsMinus",
    "DrNas",
    "FairDarts",
    "FairPaths",
    "Filtered",
    "Gdas",
    "GreedyGrowth",
    "Hyperband",
    "LocalSearch",
    "MedianStopping",
    "Nsga2",
    "OneShot",
    "OptunaSearch",
    "PcDarts",
    "PredictorSearch",
    "RandomSearch",
    "RankingFidelity",
    "RegularizedEvolution",
    "SandwichPaths",
    "Screening",
    "SuccessiveHalving",
    "UniformPaths",
]
