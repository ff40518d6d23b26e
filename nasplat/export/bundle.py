"""The exported folder: one model in several formats, each run again and compared, and the report of it."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import platform
import shutil
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.errors import (
    ArchitectureError,
    ExportError,
    FolderError,
    InvalidInputError,
    NasplatWarning,
    UnsupportedError,
)
from nasplat.export.compare import MAX_ERROR, MIN_AGREEMENT, ROUNDING, Comparison, Verdict, compare
from nasplat.export.onnx import Onnx
from nasplat.export.packed import Packed
from nasplat.export.target import Target
from nasplat.export.torch_export import TorchExport
from nasplat.export.weights import ARCHITECTURE_FILE, Weights
from nasplat.nn.binary import is_binary
from nasplat.packed import pack
from nasplat.space import SearchSpace

REPORT_FILE = "report.json"
README_FILE = "README.md"

SCHEMA_VERSION = 1
"""Version of ``report.json``."""

_MARK = "nasplat_export"
"""Key of the schema version in ``report.json``, by which a folder is known as an earlier export."""

Outcome: TypeAlias = Verdict | Literal["failed"]


@dataclass(frozen=True)
class FileReport:
    """One format of an export.

    Attributes:
        name: The target's.
        file: Name inside the folder.
        seconds: Time to write it, wall clock.
        facts: Versions and settings of the target.
        bytes: Size; None where nothing was written.
        sha256: Of the file's content; None where nothing was written.
        comparison: With the model; None where writing or running failed.
        error: Why it failed; None where it did not.
    """

    name: str
    file: str
    seconds: float
    facts: Mapping[str, str | int]
    bytes: int | None = None
    sha256: str | None = None
    comparison: Comparison | None = None
    error: str | None = None

    @property
    def verdict(self) -> Outcome:
        """``equal``, ``close`` or ``different``; ``failed`` where the file could not be written or run."""
        return "failed" if self.comparison is None else self.comparison.verdict

    @property
    def good(self) -> bool:
        """Whether the file computes what the model computes."""
        return self.verdict in ("equal", "close")

    def explain(self) -> str:
        """One line for a person."""
        if self.comparison is None:
            return f"{self.file} failed: {self.error}"
        c = self.comparison
        line = (
            f"{self.file} is {c.verdict}: {c.argmax_agreement:.2%} of {c.rows} rows keep their class, largest "
            f"difference {c.relative_difference:.2g}, rms {c.relative_rms:.2g} of the logits' standard deviation"
        )
        if c.verdict == "close" and c.rows_beyond_rounding:
            line += (
                f"; in {c.rows_beyond_rounding} rows rounding next to a threshold (the sign of a binary layer, for "
                "instance) tipped it"
            )
        return line


@dataclass(frozen=True)
class ExportReport:
    """What lies in an exported folder, and how it compares with the model.

    Attributes:
        folder: Where.
        architecture: The exported one.
        input_shape: Shape of the batch that was compared, ``(n, ...)``; its first row was also run alone.
        files: One entry per format.
        metrics: As given to :func:`export`.
        facts: As given to :func:`export`.
    """

    folder: Path
    architecture: Architecture
    input_shape: tuple[int, ...]
    files: tuple[FileReport, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bad(self) -> tuple[FileReport, ...]:
        """The files that do not compute what the model computes."""
        return tuple(file for file in self.files if not file.good)

    def to_json(self) -> str:
        """The content of ``report.json``. A number that is not finite becomes null."""
        files = {}
        for report in self.files:
            entry = asdict(report)
            name = entry.pop("name")
            comparison = entry.pop("comparison") or {}
            files[name] = {**entry, **comparison, "verdict": report.verdict, "summary": report.explain()}
        record = {
            _MARK: SCHEMA_VERSION,
            "architecture": self.architecture.id,
            "space": self.architecture.space,
            "metrics": dict(self.metrics),
            "facts": dict(self.facts),
            "compared": {
                "input_shape": list(self.input_shape),
                "batches": [self.input_shape[0], 1],
                "rounding": ROUNDING,
                "min_argmax_agreement": MIN_AGREEMENT,
                "max_relative_rms": MAX_ERROR,
            },
            "versions": {
                "nasplat": _nasplat_version(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "machine": platform.machine(),
            },
            "files": files,
        }
        return json.dumps(_finite(record), indent=2, allow_nan=False) + "\n"


def export(
    space: SearchSpace,
    architecture: Architecture,
    model: nn.Module,
    inputs: Tensor,
    folder: str | Path,
    *,
    targets: Sequence[Target] | None = None,
    metrics: Mapping[str, float] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write a trained model in every format, run each file again, and report how its logits compare.

    The folder gets ``architecture.json``, ``weights.safetensors``, a file per target, ``report.json`` and a
    ``README.md`` that shows how to run each. It appears as a whole or not at all.

    Args:
        space: Builds the architecture.
        architecture: Of the model.
        model: Trained; on any device. It is copied, and left as it was.
        inputs: Real inputs to compare on, ``(n, ...)``, float32, on the CPU, ``n >= 2``; a few hundred make the share
            of equal classes mean something. They are not stored.
        folder: Made, or replaced where it holds an earlier export and nothing else.
        targets: Formats beside architecture and weights; None is torch.export and ONNX, and for a model with binary
            layers the packed program (a warning says so where one has an operation that it cannot have).
        metrics: For the report, e.g. ``{"test_accuracy": 0.91}``.
        facts: Anything else for the report, as JSON values.

    Returns:
        The content of ``report.json``.

    Raises:
        InvalidInputError: The inputs are not as above, the model's output is not ``(n, classes)``, or two targets
            share a name or file.
        ArchitectureError: The architecture is not of this space.
        FolderError: The folder holds something other than an earlier export.
        ExportError: The model's own logits are not finite (nothing is written); or a file could not be written or
            computes something else (the folder is kept, with the report).
    """
    folder = Path(folder).absolute()
    if not space.owns(architecture):
        raise ArchitectureError(f"the architecture is of the space {architecture.space}, not of {space.identity}")
    architecture = space.architecture(architecture.genes)
    _check_free(folder)
    frozen = copy.deepcopy(model).cpu().eval()
    reference = _reference(frozen, inputs)
    chosen = (Weights(space), *(_default_targets(frozen, inputs[:2]) if targets is None else targets))
    _check_names(chosen)

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        (partial / ARCHITECTURE_FILE).write_text(architecture.to_json() + "\n", encoding="utf-8")
        files = tuple(_write_and_compare(target, frozen, inputs, reference, partial) for target in chosen)
        report = ExportReport(folder, architecture, tuple(inputs.shape), files, dict(metrics or {}), dict(facts or {}))
        (partial / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        (partial / README_FILE).write_text(_readme(report, chosen), encoding="utf-8")
        _publish(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if report.bad:
        raise ExportError(
            f"{len(report.bad)} of {len(files)} exported files do not compute what the model computes (needed: "
            f"{MIN_AGREEMENT:.0%} of the rows keep their class, and rms at most {MAX_ERROR:g}). "
            + "; ".join(file.explain() for file in report.bad)
            + f". Files and {REPORT_FILE} are kept in {folder}"
        )
    return report


def _default_targets(model: nn.Module, example: Tensor) -> tuple[Target, ...]:
    usual = (TorchExport(), Onnx())
    if not is_binary(model):
        return usual
    try:
        pack(model, example)
    except (InvalidInputError, UnsupportedError) as error:
        warnings.warn(f"no {Packed().file} is written for this binary network: {error}", NasplatWarning, stacklevel=3)
        return usual
    return (*usual, Packed())


def _check_names(targets: Sequence[Target]) -> None:
    names = [target.name for target in targets]
    files = [ARCHITECTURE_FILE, REPORT_FILE, README_FILE, *(target.file for target in targets)]
    if len(set(names)) < len(names) or len(set(files)) < len(files):
        raise InvalidInputError(
            f"targets need names and files of their own; got the names {', '.join(names)} and the files "
            f"{', '.join(files)} (the bundle's own included)"
        )


def _check_free(folder: Path) -> None:
    """Refuse a folder in which anything but an earlier export lies."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FolderError(f"{folder} is a file; an export needs a folder")
    found = {path.name for path in folder.iterdir()}
    if not found:
        return
    try:
        earlier = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        files = {entry["file"] for entry in earlier["files"].values()} if _MARK in earlier else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        files = set()
    foreign = sorted(found - {ARCHITECTURE_FILE, REPORT_FILE, README_FILE} - files) if files else sorted(found)
    if foreign:
        raise FolderError(
            f"{folder} holds what no earlier export put there ({', '.join(foreign[:5])}); export to a new or empty "
            "folder, or to one that holds just an earlier export"
        )


def _reference(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits ``(n + 1, classes)``: of the batch, then of its first row alone."""
    if inputs.dtype != torch.float32 or inputs.device.type != "cpu" or inputs.ndim < 2 or len(inputs) < 2:
        raise InvalidInputError(
            f"inputs must be a float32 batch (n, ...) of at least 2 on the CPU; got {inputs.dtype} "
            f"{tuple(inputs.shape)} on {inputs.device}"
        )
    with torch.no_grad():
        whole, first = model(inputs), model(inputs[:1])
    for logits, rows in ((whole, len(inputs)), (first, 1)):
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != rows:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InvalidInputError(f"the model must return logits (n, classes); for {rows} inputs it returned {got}")
    reference = torch.cat([whole, first])
    if not bool(torch.isfinite(reference).all()):
        raise ExportError("the model's own logits hold NaN or infinity, so no file can be compared with it")
    return reference


def _write_and_compare(target: Target, model: nn.Module, inputs: Tensor, reference: Tensor, folder: Path) -> FileReport:
    path = folder / target.file
    size, digest, comparison, error = None, None, None, None
    start = time.perf_counter()
    seconds = None
    try:
        target.write(model, inputs[:2], path)
        seconds = time.perf_counter() - start
        content = path.read_bytes()
        size, digest = len(content), hashlib.sha256(content).hexdigest()
        run = target.load(path)
        with torch.no_grad():
            comparison = compare(torch.cat([run(inputs), run(inputs[:1])]), reference)
    except Exception as failure:  # of any kind: a format's failure must not cost the other formats
        error = f"{type(failure).__name__}: {failure}"
        if digest is None:  # half written at best
            path.unlink(missing_ok=True)
    seconds = time.perf_counter() - start if seconds is None else seconds
    return FileReport(target.name, target.file, seconds, target.facts(), size, digest, comparison, error)


def _publish(partial: Path, folder: Path) -> None:
    """Put the finished folder in its place. An earlier export leaves only once the new one is there."""
    if not folder.exists():
        partial.rename(folder)
        return
    earlier = partial.with_suffix(".earlier")
    folder.rename(earlier)
    try:
        partial.rename(folder)
    except BaseException:
        earlier.rename(folder)
        raise
    shutil.rmtree(earlier)


def _readme(report: ExportReport, targets: Sequence[Target]) -> str:
    shape = ", ".join(["n", *map(str, report.input_shape[1:])])
    lines = [
        f"# Architecture {report.architecture.id}",
        "",
        f"A trained network of the space `{report.architecture.space}`, exported by nasplat. It takes float32 inputs "
        f"`({shape})`, prepared as they were in training, and returns logits.",
        "",
        *(f"- {name}: {value:g}" for name, value in report.metrics.items()),
        *([""] if report.metrics else []),
        "Each file was loaded again and compared with the model on real inputs; `report.json` has the figures, sizes "
        "and checksums:",
        "",
        *(f"- {file.explain()}" for file in report.files),
    ]
    for target in targets:
        lines += ["", f"## {target.file}", "", target.usage.rstrip()]
    return "\n".join(lines) + "\n"


def _finite(value: Any) -> Any:
    """The value with None for every float that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nasplat_version() -> str | None:
    try:
        return version("nasplat")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return None
