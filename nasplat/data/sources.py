"""Where examples come from.

A *data* object (``EmbeddedData``, ``TensorData``, ``DatasetData``, ``LoaderData``) is a small description that travels
to workers and names itself for identity; ``load()`` gives its :class:`Splits`, each a :class:`Source` of batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.identity import content_hash

SPLIT_SEED = 0
"""Seed of the split into train and validation: one split per data set, whatever the study's seed."""


class Source(ABC):
    """Examples of one split."""

    @abstractmethod
    def batches(self, size: int, shuffle: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the examples.

        Args:
            size: Examples a batch; the last batch may be smaller. A loader of the user's keeps its own size.
            shuffle: Generator of the order; None keeps the order.

        Yields:
            Inputs ``(b, ...)`` and targets ``(b, ...)``, on the CPU.
        """

    @abstractmethod
    def split(self, share: float, seed: int) -> tuple[Source, Source]:
        """Two sources with ``share`` and the rest of the examples, drawn with ``seed``.

        Raises:
            UnsupportedError: The source cannot be indexed (a loader).
        """

    def first(self, count: int) -> Tensor:
        """The inputs of the first ``count`` examples (fewer where there are fewer): ``(count, ...)``."""
        found: list[Tensor] = []
        total = 0
        for x, _ in self.batches(count):
            found.append(x[: count - total])
            total += len(found[-1])
            if total >= count:
                break
        return torch.cat(found)


class TensorSource(Source):
    """Examples held in memory: ``x (n, ...)`` float32 and ``y (n, ...)``."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x = x
        self.y = y

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int, shuffle: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the examples."""
        order = None if shuffle is None else torch.randperm(len(self.x), generator=shuffle)
        for start in range(0, len(self.x), size):
            rows: Any = slice(start, start + size) if order is None else order[start : start + size]
            yield self.x[rows], self.y[rows]

    def split(self, share: float, seed: int) -> tuple[TensorSource, TensorSource]:
        """Two sources; of a classification, each class is split in the same share."""
        first = _stratified(self.y, share, seed)
        mask = torch.zeros(len(self.y), dtype=torch.bool)
        mask[first] = True
        return TensorSource(self.x[mask], self.y[mask]), TensorSource(self.x[~mask], self.y[~mask])


class DatasetSource(Source):
    """A ``torch.utils.data.Dataset`` of (input, target) pairs with a length."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        if not isinstance(dataset, Sized):
            raise InvalidInputError("a dataset needs a length; pass an iterable one as a loader: Task.from_loaders")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, size: int, shuffle: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the examples, loaded in this process."""
        loader = DataLoader(self.dataset, batch_size=size, shuffle=shuffle is not None, generator=shuffle)
        yield from loader

    def split(self, share: float, seed: int) -> tuple[DatasetSource, DatasetSource]:
        """Two sources over random rows."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        cut = round(share * len(order))
        return (
            DatasetSource(Subset(self.dataset, sorted(order[:cut]))),
            DatasetSource(Subset(self.dataset, sorted(order[cut:]))),
        )


class LoaderSource(Source):
    """A loader of the user's: anything that yields (input, target) batches each time it is iterated."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def batches(self, size: int, shuffle: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass; batch size and order are the loader's own, its randomness torch's global generator."""
        yield from self.loader

    def split(self, share: float, seed: int) -> tuple[Source, Source]:
        """A loader cannot be split."""
        raise UnsupportedError(
            "a loader cannot be split in two; give both parts as loaders, or use Task.from_datasets or from_tensors"
        )


@dataclass(frozen=True)
class Splits:
    """Train, validation and test. A search sees the first two only."""

    train: Source
    validation: Source
    test: Source | None = None


class Data(Protocol):
    """A description of a data set that travels to workers, known by its fields or by a ``describe()`` of its own."""

    def load(self) -> Splits:
        """The examples. Repeated calls in one process may give the same object."""
        ...


@dataclass(frozen=True)
class EmbeddedData:
    """A small real data set inside the package.

    Attributes:
        name: ``fashion-mnist`` (5,000 + 1,000 grey images, 28x28, 10 classes) or ``digits`` (scikit-learn's 1,797
            grey images, 8x8).
        size: Height and width in pixels; images are resized (antialiased bilinear). None keeps the original.
        limit: Use only so many training examples, for quick tries; None is all.
    """

    name: str
    size: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.name not in ("fashion-mnist", "digits"):
            raise InvalidInputError(f"no embedded data set {self.name!r}; there are: fashion-mnist, digits")
        if self.size is not None and not 4 <= self.size <= 256:
            raise InvalidInputError(f"size is {self.size}; legal: 4 to 256 pixels, or None for the original")
        if self.limit is not None and self.limit < 20:
            raise InvalidInputError(f"limit is {self.limit}; at least 20 training examples are needed")

    def load(self) -> Splits:
        """Read, split and resize, once a process."""
        return _load_embedded(self)


@lru_cache(maxsize=4)
def _load_embedded(data: EmbeddedData) -> Splits:
    if data.name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        whole = TensorSource(_images(digits.images / 16.0, data.size), torch.from_numpy(digits.target).long())
        rest, test = whole.split(0.8, SPLIT_SEED)
    else:
        file = resources.files("nasplat.data") / "fashion_mnist_6k.npz"
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            rest, test = (
                TensorSource(
                    _images(arrays[f"x_{split}"] / 255.0, data.size), torch.from_numpy(arrays[f"y_{split}"]).long()
                )
                for split in ("train", "test")
            )
    train, validation = rest.split(0.8, SPLIT_SEED)
    if data.limit is not None and data.limit < len(train):
        train, _ = train.split(data.limit / len(train), SPLIT_SEED)
    # Statistics of the training images only: nothing of validation or test leaks into the input.
    mean, std = train.x.mean(), train.x.std()
    return Splits(*(TensorSource((part.x - mean) / std, part.y) for part in (train, validation, test)))


def _images(pixels: np.ndarray[Any, Any], size: int | None) -> Tensor:
    x = torch.from_numpy(pixels.astype(np.float32))[:, None]
    if size is not None and x.shape[-1] != size:
        x = functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return x


def _stratified(y: Tensor, share: float, seed: int) -> Tensor:
    """Rows of the first part of a split, class by class where ``y`` is a vector of integer classes."""
    generator = torch.Generator().manual_seed(seed)
    if y.ndim == 1 and not y.is_floating_point():
        rows = [torch.nonzero(y == c).flatten() for c in torch.unique(y)]
    else:
        rows = [torch.arange(len(y))]
    return torch.cat([r[torch.randperm(len(r), generator=generator)[: round(share * len(r))]] for r in rows])


@dataclass(frozen=True, eq=False)
class TensorData:
    """Tensors of the user's, known by a hash of their content."""

    x_train: Tensor
    y_train: Tensor
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor | None = None
    y_test: Tensor | None = None

    def load(self) -> Splits:
        """The tensors as they are."""
        test = None
        if self.x_test is not None and self.y_test is not None:
            test = TensorSource(self.x_test, self.y_test)
        return Splits(
            TensorSource(self.x_train, self.y_train), TensorSource(self.x_validation, self.y_validation), test
        )

    def describe(self) -> Any:
        """The content's hashes."""
        tensors = (self.x_train, self.y_train, self.x_validation, self.y_validation, self.x_test, self.y_test)
        return {"tensor": [None if tensor is None else content_hash(tensor) for tensor in tensors]}


@dataclass(frozen=True, eq=False)
class DatasetData:
    """Datasets of the user's, known by the name given."""

    name: str
    train: Dataset[Any] = field(repr=False)
    validation: Dataset[Any] = field(repr=False)
    test: Dataset[Any] | None = field(default=None, repr=False)

    def load(self) -> Splits:
        """The datasets as sources."""
        test = None if self.test is None else DatasetSource(self.test)
        return Splits(DatasetSource(self.train), DatasetSource(self.validation), test)

    def describe(self) -> Any:
        """The name."""
        return {"loader": self.name}


@dataclass(frozen=True, eq=False)
class LoaderData:
    """Loaders of the user's, known by the name given."""

    name: str
    train: Iterable[Any] = field(repr=False)
    validation: Iterable[Any] = field(repr=False)
    test: Iterable[Any] | None = field(default=None, repr=False)

    def load(self) -> Splits:
        """The loaders as sources."""
        test = None if self.test is None else LoaderSource(self.test)
        return Splits(LoaderSource(self.train), LoaderSource(self.validation), test)

    def describe(self) -> Any:
        """The name."""
        return {"loader": self.name}
