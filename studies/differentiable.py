"""What do the differentiable searches find in the DARTS cell, beside random search and beside each other?

    python studies/differentiable.py            # 10 arms, 3 seeds: an hour or so on one core; a kill loses little
    python studies/differentiable.py --smoke    # seconds, which the tests run

Every arm ends with one network, trained from scratch with the same recipe: the one that the search found, or a random
one. The figure of merit is its test accuracy. All searches take as many passes over the same halves of the training
data, with the same batch size. These are hundreds of times fewer steps than the papers take, so the learning rates of
the architecture parameters are ten times the published ones; the other values are each member's own, but that PC-DARTS
and DrNAS have DARTS' learning rate, as theirs goes with more passes or larger batches.

The random arm costs no search. Skips are counted among the edges that are on, in both cells together: searches that go
wrong collapse to them. Nothing that a table of a few short searches shows is a claim about the methods.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nasplat import Architecture, Explore, Strategy, Study, Task, maximise
from nasplat.compare.statistics import compare_arms
from nasplat.compare.verdict import verdict
from nasplat.weight_sharing.bilevel import Bilevel, Stage
from nasplat.weight_sharing.eigenvalue import EigenvalueStop
from search_spaces import DartsCell
from strategies import BatsSearch, Darts, DartsMinus, DrNas, FairDarts, Gdas, OneShot, PcDarts, RandomSearch

BASELINE = "random search"


def explorers(epochs: int) -> Mapping[str, Bilevel]:
    """Every member of the family, with ``epochs`` passes in all, for a space of 8 channels."""
    halves: Any = {"epochs": max(epochs // 2, 1), "warmup": epochs // 6, "batch_size": 32}
    rate: Any = {"lr": 0.025, "lr_min": 0.001}
    given: Mapping[str, Bilevel] = {
        "DARTS": Darts(),
        "DARTS, second order": Darts(order="second"),
        "DARTS, early stop": Darts(early_stop=EigenvalueStop(every=1, window=1, lag=1, not_before=2)),
        "BATS": BatsSearch(**halves, stages=(Stage(), Stage(options=4))),
        "PC-DARTS": PcDarts(**rate, warmup=epochs // 3, epochs=epochs),
        "GDAS": Gdas(),
        "DrNAS": DrNas(**halves, **rate, stages=(Stage(partial=4), Stage(options=4, partial=2))),
        "Fair DARTS": FairDarts(),
        "DARTS-": DartsMinus(),
    }
    return {
        name: replace(
            explorer,
            epochs=explorer.epochs if explorer.stages else epochs,
            batch_size=32,
            alpha_lr=10 * explorer.alpha_lr,
        )
        for name, explorer in given.items()
    }


def skips(architecture: Architecture) -> float:
    """Share of skip connections among the edges that are on."""
    on = [option for option in architecture.genes.values() if option != "none"]
    return on.count("skip_connect") / len(on)


def main() -> None:
    """Run every arm, or read it where it is done, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/differentiable"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6, help="of each search; each is half of the training data")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    space, seeds, epochs = DartsCell.small(), arguments.seeds, arguments.epochs
    task = Task.fashion_mnist(epochs=3, size=16, limit=1000)
    if arguments.smoke:
        # One cell, a normal one.
        space, seeds, epochs = DartsCell.small(cells=1), 1, 1
        task = Task.fashion_mnist(epochs=1, size=8, limit=64, batch_size=32)

    arms: dict[str, Strategy] = {BASELINE: RandomSearch()}
    arms |= {name: OneShot(explorer) for name, explorer in explorers(epochs).items()}
    accuracies: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    # Seed by seed, so that what slows the machine down slows all arms.
    for seed in range(seeds):
        for name, strategy in arms.items():
            study = Study(
                space=space,
                strategy=strategy,
                task=task,
                objectives=[maximise("val_accuracy")],
                seed=seed,
                folder=arguments.folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}",
                tracker=None,
                progress=False,
            )
            result = study.run(max_trials=1 if name == BASELINE else 2)
            accuracies.setdefault(name, []).append(result.best.test()["test_accuracy"])
            shares.setdefault(name, []).append(skips(result.best.architecture))
            searched = [trial for trial in result.trials if isinstance(trial.proposal, Explore)]
            spent = sum((trial.finished or 0.0) - trial.started for trial in searched)
            seconds.setdefault(name, []).append(spent)
            print(f"seed {seed}, {name}: test accuracy {accuracies[name][-1]:.3f}, {spent:.1f} s", flush=True)

    statistics = compare_arms(accuracies, baseline=BASELINE, pairs="baseline", metric="test_accuracy")
    print(f"\n{'search':<22}{'test accuracy (95%)':<28}{'skips':>7}{'search s':>10}")
    for name, arm in statistics.arms.items():
        interval = f"{arm.centre:.3f} ({arm.interval.low:.3f} to {arm.interval.high:.3f})"
        print(f"{name:<22}{interval:<28}{np.mean(shares[name]):>7.2f}{np.mean(seconds[name]):>10.1f}")
    print(f"\n{verdict(statistics)}")


if __name__ == "__main__":
    main()
