"""What a candidate is judged on: data, recipe, loss, metrics; or a function of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from nasplat.architecture import Architecture
from nasplat.data.sources import Data, DatasetData, EmbeddedData, LoaderData, Splits, TensorData, TensorSource
from nasplat.errors import InvalidInputError
from nasplat.phases import Phase, PolicyName, Span, phases_of, spans
from nasplat.teacher import Teacher

Evaluation: TypeAlias = Callable[[Architecture, float, int], Mapping[str, float]]
"""``evaluate(architecture, budget, seed) -> metrics``."""

AUGMENTATIONS = ("flip", "shift", "cutout")


@dataclass(frozen=True)
class Recipe:
    """How a candidate is trained.

    Attributes:
        epochs: Passes over the training data at budget 1, at least 1.
        batch_size: Examples a step.
        optimiser: ``adam``, ``adamw`` or ``sgd`` (momentum 0.9).
        lr: Learning rate at the start.
        weight_decay: L2 coefficient; biases and normalisation included, as the papers' recipes do.
        schedule: ``cosine`` to 0 over the epochs, or ``constant``.
        clip: Greatest L2 norm of the gradient; None does not clip.
        label_smoothing: In [0, 1); cross-entropy only.
        augment: Any of ``flip`` (left-right), ``shift`` (up to an eighth of the side, zero padded), ``cutout`` (a
            square of half the side set to 0), on images ``(n, c, h, w)``.
        phases: What is binary, and which experts learn, for which share of the epochs: a sequence of
            :class:`nasplat.phases.Phase`, or the name of a published one (``nasplat.phases.POLICIES``). Each phase
            goes on from the weights of the one before, with optimiser and schedule begun anew. Empty: one phase that
            leaves the network as it was built.
        teacher: Teaches each phase by the network of the phase before; None is no teacher.
    """

    epochs: int = 3
    batch_size: int = 128
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float | None = None
    label_smoothing: float = 0.0
    augment: tuple[str, ...] = ()
    phases: PolicyName | tuple[Phase, ...] = ()
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "augment", tuple(self.augment))
        object.__setattr__(self, "phases", phases_of(self.phases))
        legal = {"optimiser": ("adam", "adamw", "sgd"), "schedule": ("cosine", "constant")}
        for name, options in legal.items():
            if getattr(self, name) not in options:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; legal: {', '.join(options)}")
        if self.epochs < 1:
            raise InvalidInputError(f"epochs is {self.epochs}; at least 1")
        several = len(self.spans) > 1  # asked in any case, since it refuses too few epochs
        if self.teacher is not None:
            if not isinstance(self.teacher, Teacher):
                raise InvalidInputError(f"teacher is {self.teacher!r}; a nasplat.Teacher, or None, is needed")
            if self.teacher.network is None and not several:
                raise InvalidInputError(
                    "teacher: there is no phase before the first to teach it; give two phases or more, or "
                    "Teacher(network=...)"
                )
        if self.batch_size < 2:
            raise InvalidInputError(f"batch_size is {self.batch_size}; batch norm needs at least 2 examples")
        if not self.lr > 0 or self.weight_decay < 0 or not 0 <= self.label_smoothing < 1:
            raise InvalidInputError(
                f"lr {self.lr} must be positive, weight_decay {self.weight_decay} at least 0, "
                f"label_smoothing {self.label_smoothing} in [0, 1)"
            )
        unknown = [name for name in self.augment if name not in AUGMENTATIONS]
        if unknown:
            raise InvalidInputError(f"augment has {', '.join(unknown)}; legal: {', '.join(AUGMENTATIONS)}")

    @property
    def spans(self) -> tuple[Span, ...]:
        """The epochs of each phase.

        Raises:
            InvalidInputError: There are fewer epochs than the phases need.
        """
        return spans(phases_of(self.phases), self.epochs)


def _recipe(given: Mapping[str, Any]) -> Recipe:
    legal = [f.name for f in fields(Recipe)]
    unknown = [name for name in given if name not in legal]
    if unknown:
        raise InvalidInputError(f"a recipe has no {', '.join(unknown)}; legal: {', '.join(legal)}")
    return Recipe(**given)


def _short_recipe(epochs: int, given: Mapping[str, Any]) -> Recipe:
    """For small data and few epochs: many steps at a high rate. Binary weights hardly move at the papers' 1e-3."""
    return _recipe({"epochs": epochs, "batch_size": 64, "lr": 5e-3, **given})


def cross_entropy(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits ``(n, classes)`` against classes ``(n,)``."""
    return functional.cross_entropy(outputs, targets, label_smoothing=label_smoothing)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of rows whose largest logit is the target's, in [0, 1]."""
    return float((outputs.argmax(dim=1) == targets).double().mean())


@dataclass(frozen=True)
class Task:
    """What a candidate is judged on.

    Made by one of ``fashion_mnist``, ``digits``, ``from_tensors``, ``from_datasets``, ``from_loaders``,
    ``from_function``.

    Attributes:
        name: In tables and records.
        data: The examples; None for a function.
        recipe: How a candidate is trained.
        loss: ``loss(outputs, targets) -> scalar``. Any loss but the default makes ``val_loss`` the only metric
            beside those in ``metrics``.
        metrics: Metrics of the user's own, ``metric(outputs, targets) -> float`` over the whole validation
            split; ``{"f1": f}`` is recorded as ``val_f1``.
        function: Replaces building and training altogether (``from_function``).
        provides: Names of the metrics that ``function`` returns, where known beforehand.
        given_example: One input ``(1, ...)`` for meters beside a function.
    """

    name: str
    data: Data | None = None
    recipe: Recipe = field(default_factory=Recipe)
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    metrics: Mapping[str, Callable[[Tensor, Tensor], float]] = field(default_factory=dict, hash=False)
    function: Evaluation | None = None
    provides: tuple[str, ...] = ()
    given_example: Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def fashion_mnist(cls, epochs: int = 3, size: int | None = None, limit: int | None = None, **recipe: Any) -> Task:
        """The embedded 6,000 images of Fashion-MNIST: 4,000 train, 1,000 validation, 1,000 test, 10 classes.

        Args:
            epochs: Passes over the training images.
            size: Height and width in pixels, 28 where None.
            limit: Use only so many training images.
            recipe: Any other field of :class:`Recipe`; batch size is 64 and learning rate 5e-3 where not given.
        """
        return cls("fashion-mnist", EmbeddedData("fashion-mnist", size, limit), _short_recipe(epochs, recipe))

    @classmethod
    def digits(cls, epochs: int = 3, size: int | None = None, limit: int | None = None, **recipe: Any) -> Task:
        """scikit-learn's 1,797 digits, 8x8 grey: 1,151 train, 287 validation, 359 test. For the quickest tries."""
        return cls("digits", EmbeddedData("digits", size, limit), _short_recipe(epochs, recipe))

    @classmethod
    def from_tensors(
        cls,
        x_train: Tensor,
        y_train: Tensor,
        x_validation: Tensor | None = None,
        y_validation: Tensor | None = None,
        x_test: Tensor | None = None,
        y_test: Tensor | None = None,
        *,
        validation: float = 0.2,
        name: str = "tensors",
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        metrics: Mapping[str, Callable[[Tensor, Tensor], float]] | None = None,
        **recipe: Any,
    ) -> Task:
        """Data in memory: inputs ``(n, ...)`` float, targets ``(n, ...)``.

        Args:
            x_train: Training inputs. NumPy arrays are taken too.
            y_train: Training targets.
            x_validation: Validation inputs; where None, a share of the training data is split off, class by class.
            y_validation: Validation targets.
            x_test: Test inputs, used once, for what is exported.
            y_test: Test targets.
            validation: The share split off, in (0, 1).
            name: In tables and records.
            loss: The training loss.
            metrics: Metrics of the user's own.
            recipe: Fields of :class:`Recipe`.
        """
        pairs = [(x_train, y_train), (x_validation, y_validation), (x_test, y_test)]
        tensors: list[tuple[Tensor, Tensor] | None] = []
        for label, (x, y) in zip(("train", "validation", "test"), pairs, strict=True):
            if (x is None) != (y is None):
                raise InvalidInputError(f"{label}: give both inputs and targets, or neither")
            if x is None or y is None:
                tensors.append(None)
                continue
            x, y = torch.as_tensor(x), torch.as_tensor(y)
            if len(x) != len(y) or len(x) == 0:
                raise InvalidInputError(f"{label}: {len(x)} inputs and {len(y)} targets; equal and more than 0 needed")
            # Classes come as any integer type; cross-entropy takes int64.
            integers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
            tensors.append((x.float(), y.long() if integers else y))
        train, val, test = tensors
        assert train is not None
        if val is None:
            if not 0 < validation < 1:
                raise InvalidInputError(f"validation is {validation}; a share in (0, 1), or give x_validation")
            kept, held = TensorSource(*train).split(1 - validation, seed=0)
            if not len(kept) or not len(held):
                raise InvalidInputError(
                    f"a share of {validation} of {len(kept) + len(held)} examples, class by class, leaves {len(kept)} "
                    f"to train and {len(held)} to validate with; give x_validation and y_validation"
                )
            train, val = (kept.x, kept.y), (held.x, held.y)
        return cls(name, TensorData(*train, *val, *(test or ())), _recipe(recipe), loss, metrics or {})

    @classmethod
    def from_datasets(
        cls,
        train: Dataset[Any],
        validation: Dataset[Any],
        test: Dataset[Any] | None = None,
        *,
        name: str,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        metrics: Mapping[str, Callable[[Tensor, Tensor], float]] | None = None,
        **recipe: Any,
    ) -> Task:
        """Torch datasets of (input, target) pairs. ``name`` is their identity: another content needs another name."""
        return cls(name, DatasetData(name, train, validation, test), _recipe(recipe), loss, metrics or {})

    @classmethod
    def from_loaders(
        cls,
        train: Iterable[Any],
        validation: Iterable[Any],
        test: Iterable[Any] | None = None,
        *,
        name: str,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        metrics: Mapping[str, Callable[[Tensor, Tensor], float]] | None = None,
        **recipe: Any,
    ) -> Task:
        """Loaders that yield (inputs, targets) batches. ``name`` is their identity; batch size is their own."""
        for label, loader in (("train", train), ("validation", validation), ("test", test)):
            if isinstance(loader, Iterator):
                raise InvalidInputError(
                    f"{label} is {loader!r}, which can be gone through only once; a DataLoader, a list of batches, or "
                    "anything else that starts anew each time it is iterated is needed"
                )
        return cls(name, LoaderData(name, train, validation, test), _recipe(recipe), loss, metrics or {})

    @classmethod
    def from_function(
        cls,
        evaluate: Evaluation,
        *,
        name: str | None = None,
        metrics: Iterable[str] = (),
        example: Tensor | None = None,
    ) -> Task:
        """Training code, or a table of results, of the user's own.

        Args:
            evaluate: ``evaluate(architecture, budget, seed) -> {"val_accuracy": 0.93, ...}``. Nothing is built or
                measured beside it unless the study names a meter.
            name: In tables and records; the function's name where None.
            metrics: Names it returns. Where given, an objective that is not among them is refused before the start.
            example: One input ``(1, ...)`` for the meters, where the study names any.
        """
        if not callable(evaluate):
            raise InvalidInputError(f"evaluate must be callable, got {evaluate!r}")
        label = name or str(getattr(evaluate, "__name__", type(evaluate).__name__))
        return cls(label, function=evaluate, provides=tuple(metrics), given_example=example)

    def __post_init__(self) -> None:
        if (self.data is None) == (self.function is None):
            raise InvalidInputError("a task needs data or a function: use Task.fashion_mnist, from_tensors, ...")

    def load(self) -> Splits:
        """The examples.

        Raises:
            InvalidInputError: The task is a function and has none.
        """
        if self.data is None:
            raise InvalidInputError(f"the task {self.name} is a function; it has no data of its own to load")
        return self.data.load()

    def example(self) -> Tensor:
        """One input: ``(1, ...)``, float32.

        Raises:
            InvalidInputError: The task is a function and was given no example.
        """
        if self.given_example is not None:
            return self.given_example
        if self.data is None:
            raise InvalidInputError(
                f"a meter needs an input to measure with: Task.from_function({self.name}, ..., example=tensor)"
            )
        return self.load().train.first(1)

    def compute_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The training loss, label smoothing included."""
        if self.loss is cross_entropy:
            return cross_entropy(outputs, targets, self.recipe.label_smoothing)
        return self.loss(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor, prefix: str) -> dict[str, float]:
        """Metrics of all outputs of one split, named ``<prefix>_<metric>``."""
        scores = {f"{prefix}_loss": float(self.loss(outputs, targets))}
        if self.loss is cross_entropy:
            scores[f"{prefix}_accuracy"] = accuracy(outputs, targets)
        for name, metric in self.metrics.items():
            scores[f"{prefix}_{name}"] = float(metric(outputs, targets))
        return scores

    @property
    def metric_names(self) -> tuple[str, ...] | None:
        """Names that a trial of this task records; None where a function does not say."""
        if self.function is not None:
            return self.provides or None
        names = ["val_loss", *(["val_accuracy"] if self.loss is cross_entropy else [])]
        return (*names, *(f"val_{name}" for name in self.metrics), "train_loss")
