"""``model.onnx``: for onnxruntime and everything else that reads ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from nasplat.errors import ExportError
from nasplat.export.torch_export import quiet, trace

INPUT = "input"
OUTPUT = "logits"

_USAGE = """\
`model.onnx` has one input, `input`, and one output, `logits`, for any batch size. It needs onnxruntime and nothing
else:

```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(["logits"], {"input": x})
```

`x` is a float32 NumPy array.
"""


@dataclass(frozen=True)
class Onnx:
    """An ONNX file, compared with the model through onnxruntime as it is used by default, on one CPU thread.

    onnxruntime sums convolutions in another order than torch. The last bits therefore differ, and where an activation
    is as good as on the threshold of a sign, a bit of a binary network can flip. No setting avoids that:
    of 256 images in BATS networks of 8 cells and 36 channels, 15 had a flip, and 10 with graph optimisations off (all
    kept their class); of networks of 3 cells and 8 channels, about one image in 10,000.

    Attributes:
        opset: Version of the operator set, at least 18, the one that torch's exporter is written in.
    """

    opset: int = 18

    @property
    def name(self) -> str:
        """``onnx``."""
        return "onnx"

    @property
    def file(self) -> str:
        """``model.onnx``."""
        return "model.onnx"

    @property
    def usage(self) -> str:
        """How to run it with onnxruntime alone."""
        return _USAGE

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Trace the model and translate the program, weights included.

        Raises:
            ExportError: The exporter returned nothing.
        """
        with quiet():
            program = torch.onnx.export(
                trace(model, example),
                dynamo=True,
                verbose=False,
                opset_version=self.opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: "batch"},),
            )
            if program is None:
                raise ExportError("torch.onnx.export returned no program")
            program.save(path, external_data=False)

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """A session of onnxruntime."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def run(inputs: Tensor) -> Tensor:
            (logits,) = session.run([OUTPUT], {INPUT: inputs.contiguous().numpy()})
            return torch.from_numpy(logits)

        return run

    def facts(self) -> Mapping[str, str | int]:
        """The opset, and the versions of torch, onnx, onnxscript and onnxruntime."""
        packages = ("onnx", "onnxscript", "onnxruntime")
        return {"opset": self.opset, "torch": torch.__version__, **{name: version(name) for name in packages}}
