"""How well zero-cost scores rank networks, and what they cost.

    python benchmarks/zero_cost.py --table nasbench201_cifar10.npz --data cifar10_jpeg.npz   # both parts
    python benchmarks/zero_cost.py --part trained                                            # needs no files

Parts:
    nasbench201  random networks of NAS-Bench-201: scores of the untrained networks beside their tabulated test accuracy
                 on CIFAR-10 (200 epochs, mean over seeds).
    trained      random networks of ``Bats.small``, trained shortly on the embedded Fashion-MNIST: a binary space, and
                 networks far from converged.

Printed are Kendall's tau with a 95 % bootstrap interval over networks, tau among the better half of the networks only,
which is where a search ends, and the time of a score per network as a ratio to the time of one training epoch of the
same network (the median of three networks, measured in the same run). Parameters and operations stand beside the
scores: one that does not beat them tells nothing that counting would not. A network for which a score is undefined
ranks last.

``--table`` is a NumPy archive with ``code`` ``(n, 6)``, the operations on edges 0-1, 0-2, 1-2, 0-3, 1-3, 2-3 (0 none, 1
skip, 2 and 3 convolutions 1x1 and 3x3, 4 pool), and ``cifar10_test200_mean`` ``(n,)``. ``--data`` is one with ``jpeg``
(bytes), ``offsets`` ``(n + 1,)`` and ``labels``; without it, inputs and labels are random.
"""

from __future__ import annotations

import argparse
import io
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":  # the script beside this one must not hide the package strategies
    sys.path[0] = str(Path(__file__).parents[1])

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from nasplat import Study, Task, maximise
from nasplat.cost import Bench, Count, ZeroCost
from nasplat.cost.machine import processor
from nasplat.cost.zero_cost import SCORES
from nasplat.errors import NasplatError
from nasplat.task import cross_entropy
from nasplat.train import lay_out, place
from search_spaces.bats import Bats
from search_spaces.nasbench201 import NasBench201
from strategies import RandomSearch

COUNTED = ("params", "flops")
EPOCH_IMAGES = 25_000
"""Images of a training epoch of NAS-Bench-201: half of CIFAR-10's training images."""

TIMED = 3
"""Networks of NAS-Bench-201 of which a training step is timed too; it takes longer than the scores."""


def cifar(path: Path, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random images ``(count, 3, 32, 32)``, each channel of mean 0 and deviation 1, and their classes."""
    from PIL import Image

    with np.load(path, allow_pickle=False) as held:
        jpeg, offsets, labels = bytes(held["jpeg"]), held["offsets"], held["labels"]
    rows = np.random.default_rng(seed).choice(len(labels), count, replace=False)
    images = [np.asarray(Image.open(io.BytesIO(jpeg[offsets[row] : offsets[row + 1]]))) for row in rows]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    x = (x - x.mean(dim=(0, 2, 3), keepdim=True)) / x.std(dim=(0, 2, 3), keepdim=True)
    return x, torch.from_numpy(labels[rows].astype(np.int64))


def epoch_seconds(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Seconds of one epoch of ``EPOCH_IMAGES``, from the second of two steps with this batch."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        begin = time.perf_counter()
        optimiser.zero_grad()
        cross_entropy(model.train()(x), y).backward()
        optimiser.step()
    return (time.perf_counter() - begin) * EPOCH_IMAGES / len(x)


def agreement(values: Sequence[float], accuracy: Sequence[float]) -> tuple[float, float, float]:
    """Kendall's tau-b and its 95 % percentile bootstrap interval over networks."""
    pairs = (np.asarray(values), np.asarray(accuracy))

    def tau(a: np.ndarray, b: np.ndarray) -> float:
        return float(stats.kendalltau(a, b).statistic)

    found = stats.bootstrap(pairs, tau, paired=True, vectorized=False, n_resamples=999, method="percentile", rng=0)
    return tau(*pairs), float(found.confidence_interval.low), float(found.confidence_interval.high)


def show(scores: Mapping[str, Sequence[float]], accuracy: Sequence[float], ratios: Mapping[str, float]) -> None:
    """A table: a row a score, the best first."""
    good = np.asarray(accuracy) >= np.median(accuracy)
    rows = []
    for name, values in scores.items():
        tau, low, high = agreement(values, accuracy)
        among_good = float(stats.kendalltau(np.asarray(values)[good], np.asarray(accuracy)[good]).statistic)
        undefined = int(np.isneginf(values).sum())
        rows.append((tau, name, low, high, among_good, undefined))
    print(f"{'score':12}{'tau':>7}{'95 % interval':>18}{'better half':>13}{'undefined':>11}{'time / epoch':>14}")
    for tau, name, low, high, among_good, undefined in sorted(rows, reverse=True):
        interval = f"{low:+.2f} .. {high:+.2f}"
        ratio = f"{ratios[name]:.5f}" if name in ratios else ""
        print(f"{name:12}{tau:>+7.2f}{interval:>18}{among_good:>+13.2f}{undefined:>11}{ratio:>14}")
    print()


def tabulated(table: Path, data: Path | None, networks: int, batch: int, seed: int, seconds_at_most: float) -> None:
    """Scores beside the accuracies of NAS-Bench-201."""
    with np.load(table, allow_pickle=False) as held:
        codes, accuracies = held["code"], held["cifar10_test200_mean"]
    space = NasBench201()
    names, options = list(space.choices), list(space.choices.values())
    if data is None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, 3, 32, 32, generator=generator)
        y = torch.randint(10, (batch,), generator=generator)
    else:
        x, y = cifar(data, batch, seed)
    x = place(x, torch.device("cpu"))
    bench = Bench()
    scores: dict[str, list[float]] = {name: [] for name in (*COUNTED, *SCORES)}
    seconds: dict[str, list[float]] = {name: [] for name in SCORES}
    accuracy: list[float] = []
    start = time.monotonic()
    for row in np.random.default_rng(seed).choice(len(codes), networks, replace=False):
        if time.monotonic() - start > seconds_at_most:
            break
        genes = {name: of[code] for name, of, code in zip(names, options, codes[row], strict=True)}
        torch.manual_seed(seed)
        model = lay_out(space.build(space.architecture(genes)))
        accuracy.append(float(accuracies[row]))
        counted = Count().measure(model, x[:1], bench).values
        for name in COUNTED:
            scores[name].append(counted[name])
        taken: dict[str, float] = {}
        for name in SCORES:
            begin = time.perf_counter()
            try:
                value = ZeroCost(name).measure_batch(model, x, y, cross_entropy, bench).values[name]
            except NasplatError:
                value = -np.inf
            scores[name].append(value)
            taken[name] = time.perf_counter() - begin
        if len(accuracy) <= TIMED:
            epoch = epoch_seconds(model, x, y)
            for name in SCORES:
                seconds[name].append(taken[name] / epoch)
    inputs = "random inputs and labels" if data is None else f"images of {data.name}"
    print(f"NAS-Bench-201, {len(accuracy)} random networks, {batch} {inputs}; an epoch is {EPOCH_IMAGES} images")
    show(scores, accuracy, {name: float(np.median(values)) for name, values in seconds.items()})


def trained(networks: int, epochs: int, images: int, batch: int, seed: int, seconds_at_most: float) -> None:
    """Scores beside the accuracy after a short training, through a study."""
    task = Task.fashion_mnist(epochs=epochs, size=16, limit=images)
    meters = [Count(), ZeroCost(*SCORES, batch_size=batch)]
    with tempfile.TemporaryDirectory() as folder:
        study = Study(
            Bats.small(),
            RandomSearch(),
            task,
            [maximise("val_accuracy")],
            seed=seed,
            folder=Path(folder) / "study",
            meters=meters,
            tracker=None,
            progress=False,
        )
        trials = [
            trial for trial in study.run(networks, max_hours=seconds_at_most / 3600).trials if trial.state == "complete"
        ]
    accuracy = [trial.metrics["val_accuracy"] for trial in trials]
    scores = {name: [trial.metrics[name] for trial in trials] for name in (*COUNTED, *SCORES)}
    epoch = np.median([trial.metrics["train_seconds"] for trial in trials]) / epochs
    whole = float(np.median([trial.metrics["measure_seconds"] for trial in trials]) / epoch)
    print(
        f"Bats.small, {len(trials)} random networks, {epochs} epochs of {images} images, accuracy {min(accuracy):.3f} "
        f"to {max(accuracy):.3f}; all meters of a network together take {whole:.2f} of such an epoch"
    )
    show(scores, accuracy, {})


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["nasbench201", "trained", "all"], default="all")
    parser.add_argument("--table", type=Path, help="NAS-Bench-201 accuracies; without it that part is left out")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as JPEG; random inputs without it")
    parser.add_argument("--networks", type=int, default=200, help="of NAS-Bench-201")
    parser.add_argument("--trained", type=int, default=30, help="networks to train")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600.0, help="a part takes no further network after so long")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}, Python {platform.python_version()}, torch {torch.__version__}, one thread\n")
    if given.part != "trained" and given.table is not None:
        tabulated(given.table, given.data, given.networks, given.batch, given.seed, given.seconds)
    elif given.part == "nasbench201":
        parser.error("the part nasbench201 needs --table")
    if given.part != "nasbench201":
        trained(given.trained, given.epochs, given.images, given.batch, given.seed, given.seconds)


if __name__ == "__main__":
    main()
