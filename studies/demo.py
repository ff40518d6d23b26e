"""The main job, end to end: binary cells searched on real images, on Ray, recorded in MLflow, the best one exported.

python studies/demo.py              # or: make demo
python studies/demo.py --fresh      # from the beginning; the old folder is moved aside
python studies/demo.py --trials 40  # go on to 40 trials
python studies/demo.py --smoke      # a minute's version, which the tests run
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from nasplat import SearchInterrupted, Study, Task, at_most, maximise, minimise
from nasplat.errors import FolderError
from nasplat.report import exported, front, leaderboard
from search_spaces import Bats
from strategies import RegularizedEvolution


def main() -> int:
    """Search, show, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="move the old folder aside and begin anew")
    parser.add_argument("--smoke", action="store_true", help="one epoch on few images, in this process")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if arguments.fresh and folder.exists():
        aside = folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"The old study is in {aside}.")

    task = Task.fashion_mnist(epochs=3, size=16)
    if arguments.smoke:
        task = Task.fashion_mnist(epochs=1, size=8, limit=200)
    study = Study(
        space=Bats.small(),
        strategy=RegularizedEvolution(population=8, sample=4),
        task=task,
        objectives=[maximise("val_accuracy"), minimise("latency_ms")],
        constraints=[at_most("params", 1e5)],
        seed=0,
        folder=folder,
    )
    try:
        result = study.result()
        complete = bool(result.over) and result.worked >= arguments.trials
    except FolderError:
        complete = False
    if complete:
        print(f"The study in {folder} is complete: {result.over}.")
    else:
        print(f"Searching BATS binary cells on Fashion-MNIST: {arguments.trials} trials, {arguments.workers} workers.")
        try:
            result = study.run(max_trials=arguments.trials, workers=0 if arguments.smoke else arguments.workers)
        except SearchInterrupted as interrupt:
            print(interrupt, file=sys.stderr)
            return 130

    print("\nLeaderboard (validation accuracy; costs of the built network)")
    print(leaderboard(result, limit=10))
    print("\nPareto front: no other candidate is both more accurate and faster")
    print(front(result))
    best = folder / "best"
    print(f"\nThe best network, trial {result.best.trial.number}, exported and compared:")
    print(exported(result.best.export(best)))
    print(f"\n{study.where()}")
    print(f"\nTo go on:        python studies/demo.py --trials {2 * arguments.trials}")
    print("To start afresh: make demo-fresh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
