"""Results of NAS-Bench-201 looked up instead of trained: searches that take seconds, for trying and comparing them.

The benchmark (Dong, Yang 2020, arXiv:2001.00326) trained each of the 15,625 cells of
:class:`~search_spaces.nasbench201.NasBench201` several times. A table is an ``.npz`` file with a row per cell::

    code                        (rows, 6) integers, the operations of the edges 0-1, 0-2, 1-2, 0-3, 1-3, 2-3 as numbers
                                of ``OPERATIONS``
    <dataset>_val200_s0, _s1..  (rows,) validation accuracy in percent of each training of 200 epochs, NaN where missing
    <dataset>_train_time200_s   (rows,) seconds of such a training
    <dataset>_params_M          (rows,) millions of parameters
    <dataset>_test200_mean      (rows,) mean test accuracy in percent; may be absent
    <dataset>_val12, _test12    (rows,) accuracies in percent after a training of 12 epochs; may be absent
    lat_ms_<device>             (rows,) measured latency in ms; any number of devices (HW-NAS-Bench, arXiv:2103.10584)

``scripts/make_nasbench201_table.py`` makes one.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasplat.architecture import Architecture
from nasplat.errors import InvalidInputError
from nasplat.task import Task
from search_spaces.nasbench201 import EDGES, OPERATIONS, NasBench201, edge_name

FULL_EPOCHS = 200
"""Epochs of a training at budget 1."""

SHORT_EPOCHS = 12
"""Epochs of the benchmark's short training, with a learning rate that falls to 0 within them."""

SHORT_BUDGET = SHORT_EPOCHS / FULL_EPOCHS
"""The budget of the short training, 0.06."""

_PLACES = len(OPERATIONS) ** np.arange(len(EDGES))


@dataclass(frozen=True)
class NasBench201Table:
    """A table of results as the function of a task: ``Task.from_function(table, metrics=table.metrics)``.

    A study knows the table by the file's content, wherever it lies.

    What a trial gets (:attr:`metrics`):

    * ``val_accuracy``: a share, in [0, 1], of *one* training, as a search would see it: that of the table's seed number
      ``seed % n`` where the file has n seeds for every cell (two of the published three).
    * ``test_accuracy``: a share, the mean over all seeds. Held out: to report what was found, never to search with.
    * ``train_seconds``: the table's training time, not the time of looking it up.
    * ``params``: number of parameters, the table's. For 150 cells it differs from that of the cell's own network, by
      one convolution in each of them.
    * ``latency_ms_<device>``: measured by others on a device.
    * ``connected``: 1 where a path leads from the cell's input to its output, else 0. Compilers throw the 341 others
      away, so some devices report nearly no time for most of them (Raspi4, Pixel3). As a constraint,
      ``at_least("connected", 1)`` keeps a search for low latency away from them.

    Budgets: 1 is 200 epochs, and 0 is the costs alone. 0.06, and any other that a worker would round to 12 of 200
    epochs (1/16, 1/17), is the benchmark's training of 12 epochs, charged 12/200 of the time. It is a training of its
    own, with its own schedule: strategies that go on from it must train anew (``carry=False``).

    The architecture's cell is all that counts: macro parameters of its space are not looked at.

    Attributes:
        path: The file. Read when first used; never unpickled.
        dataset: Which of the file's data sets; the only one where empty.
        content: A hash of the file, in place of its path. Made from the file; not given.

    Raises:
        InvalidInputError: There is no such file, or it is no such table, or ``dataset`` is not in it; the message says
            what was found and what is needed.
    """

    path: Path | str = field(compare=False)
    dataset: str = ""
    content: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        try:
            data = Path(self.path).read_bytes()
        except OSError as error:
            raise InvalidInputError(f"the table {self.path} cannot be read: {error.strerror or error}") from error
        object.__setattr__(self, "content", hashlib.sha256(data).hexdigest()[:16])
        found = self._datasets()
        if not self.dataset and len(found) == 1:
            object.__setattr__(self, "dataset", found[0])
        if self.dataset not in found:
            raise InvalidInputError(
                f"dataset is {self.dataset!r}; {self.path} has "
                + (
                    ", ".join(map(repr, found))
                    or f"none, so it is no table of NAS-Bench-201: no column is called <dataset>_val200_s0 "
                    f"among {self._names()}"
                )
            )
        self._check()

    def describe(self) -> Any:
        """What a study's folder says of it: the content, not the path."""
        return {"function": f"{type(self).__module__}:{type(self).__qualname__}", "dataset": self.dataset,
                "content": self.content}  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        # Another process reads the file itself.
        return {name: value for name, value in vars(self).items() if name in ("path", "dataset", "content")}

    # The file.

    @cached_property
    def _file(self) -> dict[str, NDArray[Any]]:
        data = Path(self.path).read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] != self.content:
            raise InvalidInputError(f"the table {self.path} is not the file that it was: its content has changed")
        try:
            with np.load(self.path, allow_pickle=False) as held:
                return {name: held[name] for name in held.files}
        except (ValueError, OSError, zipfile.BadZipFile, AttributeError, TypeError) as error:
            raise InvalidInputError(
                f"{self.path} is no table of NAS-Bench-201: an .npz file of plain arrays is needed ({error})"
            ) from error

    def _datasets(self) -> list[str]:
        return sorted({found[1] for name in self._file if (found := re.fullmatch(r"(\w+)_val200_s\d+", name))})

    def _names(self) -> str:
        return ", ".join(list(self._file)[:12]) + (", ..." if len(self._file) > 12 else "")

    def _column(self, name: str) -> NDArray[np.float64]:
        return self._file[f"{self.dataset}_{name}"].astype(np.float64)

    def _has(self, name: str) -> bool:
        return f"{self.dataset}_{name}" in self._file

    def _check(self) -> None:
        needed = ["code", *(f"{self.dataset}_{name}" for name in ("val200_s0", "train_time200_s", "params_M"))]
        missing = [name for name in needed if name not in self._file]
        if missing:
            raise InvalidInputError(
                f"{self.path} lacks {', '.join(missing)}; a table of {self.dataset} needs {', '.join(needed)}, "
                f"and the file has {self._names()}"
            )
        code = self._file["code"]
        if code.ndim != 2 or code.shape[1] != len(EDGES) or code.dtype.kind not in "iu" or not len(code):
            raise InvalidInputError(
                f"{self.path}: code is {code.dtype} of shape {code.shape}; integers (rows, {len(EDGES)}) are needed"
            )
        if code.min() < 0 or code.max() >= len(OPERATIONS):
            raise InvalidInputError(
                f"{self.path}: code is in {code.min()}..{code.max()}; legal: 0 to {len(OPERATIONS) - 1}, "
                f"for {', '.join(OPERATIONS)}"
            )
        if len(np.unique(code.astype(np.int64) @ _PLACES)) != len(code):
            raise InvalidInputError(f"{self.path}: code lists a cell twice; a row per cell is needed")
        columns = [name for name in self._file if name.startswith((f"{self.dataset}_", "lat_ms_")) and name != "code"]
        wrong = [name for name in columns if self._file[name].shape != (len(code),)]
        if wrong:
            raise InvalidInputError(
                f"{self.path}: {wrong[0]} has shape {self._file[wrong[0]].shape}; legal: ({len(code)},), a row per code"
            )
        if not self._values["seeds"].size:
            raise InvalidInputError(f"{self.path}: no column {self.dataset}_val200_s0, _s1, ... is without NaN")

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """Row by number of the cell; -1 where the table lacks it."""
        rows = np.full(len(OPERATIONS) ** len(EDGES), -1, dtype=np.int64)
        rows[self._file["code"].astype(np.int64) @ _PLACES] = np.arange(len(self._file["code"]))
        return rows

    @cached_property
    def _values(self) -> dict[str, NDArray[np.float64]]:
        names = sorted(
            (name for name in self._file if re.fullmatch(rf"{re.escape(self.dataset)}_val200_s\d+", name)),
            key=lambda name: int(name.rpartition("_s")[2]),
        )
        seeds = [self._file[name].astype(np.float64) / 100 for name in names]
        whole = [seed for seed in seeds if np.isfinite(seed).all()]
        return {"seeds": np.stack(whole, axis=1) if whole else np.empty((0, 0))}

    @cached_property
    def _costs(self) -> dict[str, NDArray[np.float64]]:
        costs = {"params": np.round(self._column("params_M") * 1e6)}
        costs |= {f"latency_ms_{device}": self._file[f"lat_ms_{device}"].astype(np.float64) for device in self.devices}
        alive = self._file["code"] != 0
        reached: dict[int, NDArray[np.bool_]] = {0: np.ones(len(alive), dtype=bool)}
        for node in (1, 2, 3):
            edges = [(index, source) for index, (source, to) in enumerate(EDGES) if to == node]
            reached[node] = np.any([alive[:, index] & reached[source] for index, source in edges], axis=0)
        return {**costs, "connected": reached[3].astype(np.float64)}

    # What is in it.

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices whose latency the file has: ``pixel2`` for ``latency_ms_pixel2``."""
        return tuple(name.removeprefix("lat_ms_") for name in self._file if name.startswith("lat_ms_"))

    @property
    def seeds(self) -> int:
        """Trainings per cell that every cell has."""
        return int(self._values["seeds"].shape[1])

    @property
    def budgets(self) -> tuple[float, ...]:
        """Legal budgets, ascending: 0, 0.06 where the file has the short training, and 1."""
        return (0.0, SHORT_BUDGET, 1.0) if self._has("val12") else (0.0, 1.0)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values of a full training."""
        test = ("test_accuracy",) if self._has("test200_mean") else ()
        return ("val_accuracy", *test, "train_seconds", *self._costs)

    @property
    def mean_train_seconds(self) -> float:
        """Mean over the cells of the seconds of a full training."""
        return float(self._column("train_time200_s").mean())

    def __len__(self) -> int:
        """Number of cells in the file."""
        return len(self._file["code"])

    def architectures(self, space: NasBench201 | None = None) -> Iterator[Architecture]:
        """The cells of the file, in its order.

        Args:
            space: Whose architectures they are; the paper's where None.
        """
        space = space or NasBench201()
        for code in self._file["code"].tolist():
            options = (OPERATIONS[number] for number in code)
            yield space.architecture({edge_name(*edge): option for edge, option in zip(EDGES, options, strict=True)})

    def row(self, architecture: Architecture) -> int:
        """The row of an architecture's cell in the file.

        Raises:
            InvalidInputError: It is no cell of NAS-Bench-201, or the file lacks it.
        """
        number = 0
        for (source, node), place in zip(EDGES, _PLACES.tolist(), strict=True):
            option = architecture.genes.get(edge_name(source, node))
            if option not in OPERATIONS:
                raise InvalidInputError(
                    f"the table of NAS-Bench-201 takes architectures of NasBench201; {edge_name(source, node)} is "
                    f"{option!r}; legal: {', '.join(OPERATIONS)}"
                )
            number += OPERATIONS.index(option) * place
        row = int(self._rows[number])
        if row < 0:
            raise InvalidInputError(
                f"{self.path} has {len(self._file['code'])} of {len(self._rows)} cells, and {dict(architecture.genes)} "
                "is not among them"
            )
        return row

    def __call__(self, architecture: Architecture, budget: float, seed: int) -> Mapping[str, float]:
        """What training and measuring this architecture would give.

        Args:
            architecture: Of :class:`~search_spaces.nasbench201.NasBench201`.
            budget: One of :attr:`budgets`.
            seed: Chooses one of the table's trainings.

        Returns:
            Metrics by name; at budget 0 without accuracies and training time.

        Raises:
            InvalidInputError: The table has no such budget or no such cell.
        """
        row = self.row(architecture)
        metrics = {name: float(values[row]) for name, values in self._costs.items()}
        epochs = round(budget * FULL_EPOCHS)
        legal = [round(step * FULL_EPOCHS) for step in self.budgets]
        if epochs not in legal or (epochs == 0 and budget > 0):
            raise InvalidInputError(
                f"budget is {budget:g}, {epochs} epochs; this table has {', '.join(f'{b:g}' for b in self.budgets)}: "
                f"{', '.join(map(str, legal))} of {FULL_EPOCHS} epochs, 0 being the costs alone"
            )
        if epochs == 0:
            return metrics
        metrics["train_seconds"] = epochs / FULL_EPOCHS * float(self._file[f"{self.dataset}_train_time200_s"][row])
        if epochs == FULL_EPOCHS:
            metrics["val_accuracy"] = float(self._values["seeds"][row, seed % self.seeds])
            test = "test200_mean"
        else:
            metrics["val_accuracy"] = float(self._file[f"{self.dataset}_val12"][row]) / 100
            test = "test12"
        if self._has(test):
            metrics["test_accuracy"] = float(self._file[f"{self.dataset}_{test}"][row]) / 100
        return metrics

    def test_accuracy(self, architecture: Architecture) -> float:
        """Mean test accuracy, a share, of full trainings: for reporting what a search found.

        Raises:
            InvalidInputError: The file has no test accuracies, or lacks the cell.
        """
        if not self._has("test200_mean"):
            raise InvalidInputError(f"{self.path} has no {self.dataset}_test200_mean")
        return float(self._file[f"{self.dataset}_test200_mean"][self.row(architecture)]) / 100

    def mean_val_accuracy(self, architecture: Architecture) -> float:
        """Mean validation accuracy, a share, over all full trainings of the cell: with less noise than one of them.

        Raises:
            InvalidInputError: The file lacks the cell.
        """
        row = self.row(architecture)
        return float(np.nanmean([values[row] for values in self._trainings])) / 100

    @cached_property
    def _trainings(self) -> list[NDArray[Any]]:
        return [values for name, values in self._file.items() if re.fullmatch(rf"{self.dataset}_val200_s\d+", name)]

    def task(self) -> Task:
        """The task that looks results up here: ``Study(space=NasBench201(), task=NasBench201Table(path).task())``."""
        return Task.from_function(self, name=f"nas-bench-201 {self.dataset}", metrics=self.metrics)
