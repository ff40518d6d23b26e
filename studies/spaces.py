"""Is every space searched end to end by every kind of strategy, and how do short searches of them compare?

    python studies/spaces.py            # 6 trials an arm on Fashion-MNIST at 16x16: about 20 minutes on one core
    python studies/spaces.py --smoke    # two or three trials an arm on 8x8 digits, which the tests run

Each space comes at its size for one CPU core. The arms of one space get the same task and as many trained networks;
DARTS trains a supernet first and then one network, so its cost is shown in seconds beside the others'. One seed an arm:
the table shows that everything works together, not which strategy is better.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from nasplat import SearchSpace, Strategy, Study, Task, maximise
from search_spaces import Bats, BinaryGrowth, DartsCell, MetaKernel, Sandglass
from strategies import Darts, GreedyGrowth, OneShot, OptunaSearch, RandomSearch, RegularizedEvolution


def main() -> None:
    """Run every arm, or read it where it is done, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/spaces"))
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    task = Task.fashion_mnist(epochs=2, size=16, limit=1000)
    epochs, trials = 3, arguments.trials
    if arguments.smoke:
        task = Task.digits(epochs=1, limit=64, batch_size=32)
        epochs, trials = 1, 3

    spaces: dict[str, SearchSpace] = {
        "BATS": Bats.small(),
        "DARTS cell": DartsCell.small(),
        "DARTS cell with sandglass": DartsCell.small(sandglass="added"),
        "meta kernels": MetaKernel.small(),
        "sandglass": Sandglass.small(),
        "binary growth": BinaryGrowth.small(),
    }
    arms: dict[str, tuple[Strategy, int]] = {
        "random search": (RandomSearch(), trials),
        "regularised evolution": (RegularizedEvolution(population=2, sample=2), trials),
        "TPE": (OptunaSearch("tpe", {"n_startup_trials": 2}), trials),
        "DARTS": (OneShot(Darts(epochs=epochs, batch_size=32, alpha_lr=3e-3)), 2),
    }
    print(f"{'space':<26}{'strategy':<24}{'networks':>9}{'val. accuracy':>15}{'OPs':>12}{'seconds':>9}")
    for space_name, space in spaces.items():
        own = dict(arms)
        if isinstance(space, BinaryGrowth):
            own["greedy growth"] = (GreedyGrowth(budget=1.0), trials)
        for name, (strategy, limit) in own.items():
            study = Study(
                space=space,
                strategy=strategy,
                task=task,
                objectives=[maximise("val_accuracy")],
                folder=arguments.folder / f"{space_name}-{name}".replace(" ", "-"),
                tracker=None,
                progress=False,
            )
            begin = time.monotonic()
            best = study.run(max_trials=limit).best
            print(
                f"{space_name:<26}{name:<24}{limit if name != 'DARTS' else limit - 1:>9}"
                f"{best.metrics['val_accuracy']:>15.3f}{best.metrics['ops']:>12,.0f}{time.monotonic() - begin:>9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
