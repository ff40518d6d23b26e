"""With ten trials on binary cells, does evolution or TPE find a better network than random search?

    python studies/bats_strategies.py            # 3 strategies, 5 seeds, 10 trials each: some 6 minutes on one core
    python studies/bats_strategies.py --smoke    # a minute's version, which the tests run

Every arm gets the same number of trained candidates, the same seeds and the same recipe. The figure of merit is the
test accuracy of the network that has the best validation accuracy, so that picking by noise does not count. The
interval is Student's, of the differences to random search seed by seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy import stats

from nasplat import Strategy, Study, Task, maximise
from search_spaces import Bats
from strategies import OptunaSearch, RandomSearch, RegularizedEvolution


def main() -> None:
    """Run every arm, or read it where it is done, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bats-strategies"))
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    trials, seeds = (3, 2) if arguments.smoke else (arguments.trials, arguments.seeds)
    task = Task.fashion_mnist(epochs=2, size=16, limit=1000)
    if arguments.smoke:
        task = Task.fashion_mnist(epochs=1, size=8, limit=100)

    # A third of the trials fill the population or start the sampler: otherwise both would only draw at random.
    arms: dict[str, Strategy] = {
        "random search": RandomSearch(),
        "regularised evolution": RegularizedEvolution(population=max(2, trials // 3), sample=3),
        "TPE": OptunaSearch("tpe", {"n_startup_trials": max(2, trials // 3)}),
    }
    picked: dict[str, list[float]] = {}
    for name, strategy in arms.items():
        for seed in range(seeds):
            study = Study(
                space=Bats.small(),
                strategy=strategy,
                task=task,
                objectives=[maximise("val_accuracy")],
                seed=seed,
                folder=arguments.folder / f"{name.replace(' ', '-')}-{seed}",
                tracker=None,
                progress=False,
            )
            best = study.run(max_trials=trials).best
            picked.setdefault(name, []).append(best.test()["test_accuracy"])
            print(f"{name}, seed {seed}: validation {best.metrics['val_accuracy']:.3f}, test {picked[name][-1]:.3f}")

    print(f"\nTest accuracy of the pick after {trials} trials, {seeds} seeds: mean ± standard deviation")
    baseline = np.array(picked["random search"])
    for name, values in picked.items():
        line = f"{name:<22} {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
        if name != "random search":
            difference = np.array(values) - baseline
            half = stats.t.ppf(0.975, seeds - 1) * difference.std(ddof=1) / np.sqrt(seeds)
            low, high = difference.mean() - half, difference.mean() + half
            verdict = "no difference can be shown" if low <= 0 <= high else "better" if low > 0 else "worse"
            line += f"   against random {difference.mean():+.4f}, 95% interval {low:+.4f} to {high:+.4f}: {verdict}"
        print(line)


if __name__ == "__main__":
    main()
