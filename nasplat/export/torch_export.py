"""``model.pt2``: the program of ``torch.export``, which torch runs without any of the model's own code."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

_USAGE = """\
`model.pt2` is a `torch.export` program for any batch size. It needs torch and nothing else:

```python
import torch

model = torch.export.load("model.pt2").module()
logits = model(x)
```

`x` is a float32 tensor. `torch.export.load` can unpickle parts of a file, and a forged file can run code that way:
load a `.pt2` only if you trust where it comes from.
"""


@dataclass(frozen=True)
class TorchExport:
    """A ``torch.export`` archive.

    ``torch.export.load`` reads weights as raw bytes, but falls back to full unpickling for example inputs and odd
    constants, and has no switch against it (torch 2.13). nasplat therefore loads such a file just once, in
    :meth:`load`, right after writing it.
    """

    @property
    def name(self) -> str:
        """``torch_export``."""
        return "torch_export"

    @property
    def file(self) -> str:
        """``model.pt2``."""
        return "model.pt2"

    @property
    def usage(self) -> str:
        """How to run it with torch alone."""
        return _USAGE

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Trace the model and save the program."""
        with quiet():
            torch.export.save(trace(model, example), path)

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Load the program. For files of one's own making only, see :class:`TorchExport`."""
        with quiet():
            return torch.export.load(path).module()

    def facts(self) -> Mapping[str, str | int]:
        """The version of torch."""
        return {"torch": torch.__version__}


def trace(model: nn.Module, example: Tensor) -> ExportedProgram:
    """The model as a program for any batch size from 1 up.

    Nothing of its maker is in it: no inputs, no paths or lines of source files.

    Args:
        model: On the CPU, in evaluation mode.
        example: ``(n, ...)``, ``n >= 2``: torch takes a batch of 1 for a constant.
    """
    # The program keeps its example, and of a slice the whole tensor behind it, so real inputs would be given away.
    program = torch.export.export(model, (torch.zeros_like(example),), dynamic_shapes=({0: Dim("batch", min=1)},))
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keep the warnings of torch's tools off the screen: what went wrong shows when the file is run. Errors pass.

    Args:
        names: Of the loggers; those of the exporters where none are given.
    """
    loggers = [logging.getLogger(name) for name in names or ("torch.export", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
