"""Exported folders: what lies in them, what they refuse, and that their files run without nasplat."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import pickle
import random
import re
import subprocess
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nasplat.errors import (
    ArchitectureError,
    ExportError,
    FolderError,
    FolderMismatchError,
    InvalidInputError,
    NasplatWarning,
    UnsupportedError,
)
from nasplat.export import TorchExport, Weights, export, load_bundle
from nasplat.export.bundle import _default_targets
from nasplat.export.compare import compare
from nasplat.nn import ExpertBinaryConv2d, set_binarisation, set_experts
from nasplat.packed import PackedProgram
from nasplat.space import SearchSpace
from nasplat.task import Task
from search_spaces import Bats, BinaryGrowth


@dataclass(frozen=True)
class ConvNets(SearchSpace):
    classes: int = 10

    @property
    def choices(self):
        return {"width": (4, 8), "activation": ("relu", "gelu")}

    def build(self, architecture):
        width = architecture.genes["width"]
        activation = {"relu": nn.ReLU, "gelu": nn.GELU}[architecture.genes["activation"]]
        return nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            activation(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, self.classes),
        )


def images(size: int, count: int = 200) -> Tensor:
    return Task.fashion_mnist(size=size).load().validation.first(count)


def with_history(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """As if trained: fresh batch norms would hide a mistake in folding them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.3
                if layer.affine:
                    # Both signs: a negative factor turns a threshold round.
                    layer.weight.uniform_(-1.5, 1.5, generator=generator)
                    layer.bias.normal_(0, 0.5, generator=generator)
            if isinstance(layer, nn.PReLU):
                layer.weight.uniform_(0, 0.5, generator=generator)
            if isinstance(getattr(layer, "scale", None), nn.Parameter):
                layer.scale.uniform_(0.02, 0.2, generator=generator)
        model.train()
        for batch in x.split(50):
            model(batch)
    return model


def made(space: SearchSpace, x: Tensor, seed: int = 0):
    architecture = space.sample(np.random.default_rng(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return architecture, with_history(space.build(architecture), x, seed)


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


@dataclass(frozen=True)
class Exported:
    space: SearchSpace
    model: nn.Module
    x: Tensor
    report: object
    record: dict


def exported(space: SearchSpace, size: int, folder: Path, seed: int = 0) -> Exported:
    x = images(size)
    architecture, model = made(space, x, seed)
    report = export(
        space, architecture, model, x, folder, metrics={"test_accuracy": 0.5}, facts={"epochs": 3, "bad": float("nan")}
    )
    return Exported(space, model, x, report, json.loads((folder / "report.json").read_text()))


@pytest.fixture(scope="module")
def conv(tmp_path_factory) -> Exported:
    return exported(ConvNets(), 16, tmp_path_factory.mktemp("conv") / "best")


@pytest.fixture(scope="module")
def bats(tmp_path_factory) -> Exported:
    # 28 pixels are 14, 7 and 4 inside: the odd size takes the reduction's padding.
    return exported(Bats.small(), 28, tmp_path_factory.mktemp("bats") / "best", seed=3)


@pytest.fixture(scope="module", params=["conv", "bats"])
def bundle(request) -> Exported:
    return request.getfixturevalue(request.param)


def test_every_file_computes_the_models_logits(bundle):
    files = {file.name: file for file in bundle.report.files}
    binary = isinstance(bundle.space, Bats)
    assert list(files) == ["weights", "torch_export", "onnx", *(["packed"] if binary else [])]
    for file in bundle.report.files[3:]:
        assert file.comparison.verdict in ("equal", "close")
        assert file.comparison.argmax_agreement >= 0.995
    assert files["weights"].verdict == "equal"
    assert files["torch_export"].verdict == "equal"
    onnx = files["onnx"].comparison
    assert onnx.verdict in ("equal", "close")
    assert onnx.argmax_agreement >= 0.995
    assert onnx.rows_beyond_rounding <= 2
    assert onnx.rows == len(bundle.x) + 1


def test_a_packed_file_is_small_and_runs(bats):
    folder = bats.report.folder
    logits = PackedProgram.load(folder / "model.packed")(bats.x)
    assert torch.equal(logits.argmax(1), bats.model.eval()(bats.x).argmax(1))
    assert "PackedProgram.load" in (folder / "README.md").read_text()
    assert (folder / "model.packed").stat().st_size < (folder / "weights.safetensors").stat().st_size / 2


class Unpackable(Bats):
    """Its networks end in an operation that no packed program has."""

    def build(self, architecture):
        return nn.Sequential(super().build(architecture), nn.Softplus())


def test_what_cannot_be_packed_is_left_out_with_a_warning():
    x = images(16)
    _, model = made(Unpackable.small(cells=1), x, 0)
    with pytest.warns(NasplatWarning, match=r"no model\.packed is written.*Softplus"):
        targets = _default_targets(model.eval(), x[:2])
    assert [target.name for target in targets] == ["torch_export", "onnx"]


@pytest.mark.slow
def test_a_binary_network_that_cannot_be_packed_is_exported_with_a_warning(tmp_path):
    x = images(16)
    architecture, model = made(Unpackable.small(cells=1), x, 0)
    with pytest.warns(NasplatWarning, match=r"no model\.packed is written.*Softplus"):
        report = export(Unpackable.small(cells=1), architecture, model, x, tmp_path / "best")
    assert [file.name for file in report.files] == ["weights", "torch_export", "onnx"]


@pytest.mark.slow  # the README's study, which always runs, exports a network on such images
def test_bats_on_images_of_16_pixels(tmp_path):
    done = exported(Bats.small(cells=2), 16, tmp_path / "best", seed=5)
    assert not done.report.bad
    assert done.record["compared"]["input_shape"] == [200, 1, 16, 16]


def test_the_folder_holds_what_the_report_says(bundle):
    folder = bundle.report.folder
    record = bundle.record
    assert {path.name for path in folder.iterdir()} == {
        "architecture.json",
        "weights.safetensors",
        "model.pt2",
        "model.onnx",
        *(["model.packed"] if isinstance(bundle.space, Bats) else []),
        "report.json",
        "README.md",
    }
    assert record["architecture"] == bundle.report.architecture.id
    assert record["space"] == bundle.space.identity
    assert record["metrics"] == {"test_accuracy": 0.5}
    assert record["facts"] == {"epochs": 3, "bad": None}
    assert record["compared"]["batches"] == [200, 1]
    for entry in record["files"].values():
        content = (folder / entry["file"]).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["error"] is None
        assert {"max_difference", "relative_difference", "argmax_agreement", "verdict"} <= set(entry)
    assert record["files"]["onnx"]["facts"]["opset"] == 18
    assert record["files"]["torch_export"]["facts"]["torch"] == torch.__version__
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_the_onnx_file_names_its_ends_and_leaves_the_batch_open(bundle):
    import onnx

    model = onnx.load(bundle.report.folder / "model.onnx")
    onnx.checker.check_model(model)
    assert [(i.name, i.type.tensor_type.shape.dim[0].dim_param) for i in model.graph.input] == [("input", "batch")]
    assert [(o.name, o.type.tensor_type.shape.dim[0].dim_param) for o in model.graph.output] == [("logits", "batch")]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]


def test_neither_inputs_nor_source_paths_are_given_away(bundle):
    folder = bundle.report.folder
    here = str(Path(__file__).parent.parent.parent).encode()
    assert here not in (folder / "model.onnx").read_bytes()
    row = bundle.x[0].numpy().tobytes()
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert here not in content, name
            assert b"stack_trace" not in content, name
            assert row not in content, name


def code_blocks(readme: str) -> dict[str, str]:
    """The code in the README per heading."""
    return {
        section.splitlines()[0].strip(): match.group(1)
        for section in readme.split("\n## ")[1:]
        if (match := re.search(r"```python\n(.*?)```", section, re.S))
    }


@pytest.mark.parametrize("file", ["model.pt2", "model.onnx"])
def test_the_readmes_lines_run_where_nasplat_cannot_be_imported(bats, file, tmp_path):
    code = code_blocks((bats.report.folder / "README.md").read_text())[file]
    load, run = code.rstrip().rsplit("\n", 1)
    script = tmp_path / "run.py"
    script.write_text(
        f"""
import sys
import importlib.abc

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("nasplat", "search_spaces", "strategies"):
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, Refuse())
try:
    import nasplat
except ImportError:
    pass
else:
    sys.exit("the block does not work")

import os
import numpy as np

os.chdir(sys.argv[2])
batches = np.load(sys.argv[1])
if {file!r} == "model.pt2":
    import torch

    torch.set_num_threads(1)
    batches = torch.from_numpy(batches)
exec({load!r})
outputs = []
for x in (batches, batches[:1], batches[:7]):
    exec({run!r})
    outputs.append(np.asarray(logits.detach() if hasattr(logits, "detach") else logits))
np.save(sys.argv[3], np.concatenate(outputs))
"""
    )
    np.save(tmp_path / "x.npy", bats.x.numpy())
    command = [sys.executable, "-I", script, tmp_path / "x.npy", bats.report.folder, tmp_path / "logits.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    expected = torch.cat([logits_of(bats.model, x) for x in (bats.x, bats.x[:1], bats.x[:7])])
    assert compare(logits, expected).verdict in ("equal", "close")


def test_the_readmes_way_back_builds_the_model(bundle, monkeypatch):
    monkeypatch.chdir(bundle.report.folder)
    scope = {"space": bundle.space, "x": bundle.x}
    exec(code_blocks(Path("README.md").read_text())["weights.safetensors"], scope)
    assert torch.equal(scope["logits"], logits_of(bundle.model, bundle.x))
    assert not scope["model"].training


def test_a_bundle_is_refused_in_another_space(conv):
    with pytest.raises(FolderMismatchError, match=r'"classes":10.*"classes":11'):
        load_bundle(conv.report.folder, ConvNets(classes=11))


def weights_only(space, folder, x=None, **more):
    x = images(16) if x is None else x
    architecture, model = made(space, x)
    return export(space, architecture, model, x, folder, targets=(), **more)


def test_weights_that_are_a_pickle_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "went off",))

    weights_only(ConvNets(), tmp_path / "best")
    for content in (pickle.dumps(Bomb()), b"", b"\x08" + bytes(7) + b"{broken}"):
        (tmp_path / "best" / "weights.safetensors").write_bytes(content)
        with pytest.raises(FolderError, match="cannot be read as safetensors"):
            load_bundle(tmp_path / "best", ConvNets())
    assert not (tmp_path / "went off").exists()


def test_damaged_bundles_say_what_is_wrong(tmp_path):
    space = ConvNets()
    with pytest.raises(FolderError, match="no exported folder"):
        load_bundle(tmp_path, space)
    report = weights_only(space, tmp_path / "best")
    other = space.neighbours(report.architecture)
    wider = next(a for a in other if a.genes["width"] != report.architecture.genes["width"])
    (tmp_path / "best" / "architecture.json").write_text(wider.to_json())
    with pytest.raises(FolderError, match=f"does not hold the weights of architecture {wider.id}"):
        load_bundle(tmp_path / "best", space)
    genes = {**report.architecture.genes, "width": 5}
    text = json.dumps({"schema": 1, "space": space.identity, "genes": genes})
    (tmp_path / "best" / "architecture.json").write_text(text)
    with pytest.raises(ArchitectureError, match="width is 5; legal: 4, 8"):
        load_bundle(tmp_path / "best", space)
    (tmp_path / "best" / "weights.safetensors").unlink()
    (tmp_path / "best" / "architecture.json").write_text(report.architecture.to_json())
    with pytest.raises(FolderError, match="cannot be read as safetensors"):
        load_bundle(tmp_path / "best", space)


@pytest.mark.parametrize("how", [{"weights": False}, {"weights": False, "activations": "tanh"}, {"activations": False}])
def test_binary_layers_come_back_as_they_were_left(tmp_path, how):
    space = BinaryGrowth.small(widths=(8, 8), experts=(1, 4), in_channels=1)
    architecture = space.architecture({**space.start().genes, "experts": 4})
    x = images(8, 60)
    torch.manual_seed(0)
    model = with_history(space.build(architecture), x)
    set_binarisation(model, **how)
    set_experts(model, single=True)
    report = export(space, architecture, model, x, tmp_path / "best", targets=())
    assert [file.verdict for file in report.files] == ["equal"]
    back = load_bundle(tmp_path / "best", space)
    assert torch.equal(logits_of(back, x), logits_of(model, x))
    assert {m.single for m in back.modules() if isinstance(m, ExpertBinaryConv2d)} == {True}


@pytest.mark.parametrize(
    "switches",
    ["[]", "{", '{"nowhere": {"single": true}}', '{"first": {"__class__": true}}', '{"first": {"single": 1}}'],
)
def test_damaged_switches_are_refused(tmp_path, switches):
    space = BinaryGrowth.small(widths=(8, 8), in_channels=1)
    architecture, x = space.start(), images(8, 10)
    model = space.build(architecture)
    export(space, architecture, model, x, tmp_path / "best", targets=())
    first = next(name for name, layer in model.named_modules() if isinstance(layer, ExpertBinaryConv2d))
    path = tmp_path / "best" / "weights.safetensors"
    save_file(load_file(path), path, {"switches": switches.replace("first", first)})
    with pytest.raises(FolderError, match="switches"):
        load_bundle(tmp_path / "best", space)


@dataclass(frozen=True)
class Wrong(TorchExport):
    """Writes the model, computes something else."""

    how: str = "noise"

    def load(self, path):
        if self.how == "crash":
            raise RuntimeError("cannot be loaded")
        run = super().load(path)
        spoil = {
            "noise": lambda logits: torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)),
            "nan": lambda logits: logits * float("nan"),
            "doubled": lambda logits: logits * 2,
            "shape": lambda logits: logits[:, :3],
        }[self.how]
        return lambda inputs: spoil(run(inputs))


@pytest.mark.parametrize(
    ("how", "verdict", "why"),
    [
        ("noise", "different", "is different"),
        ("doubled", "different", "100.00% of 201 rows keep their class"),
        ("nan", "different", "is different"),
        ("shape", "failed", r"shape \(201, 3\); the model's have \(201, 10\)"),
        ("crash", "failed", "RuntimeError: cannot be loaded"),
    ],
)
def test_a_wrong_file_is_an_error_and_is_kept(tmp_path, how, verdict, why):
    x = images(16)
    architecture, model = made(ConvNets(), x)
    with pytest.raises(ExportError, match=rf"(?s)1 of 2 exported files.*{why}.*kept in {tmp_path / 'best'}"):
        export(ConvNets(), architecture, model, x, tmp_path / "best", targets=[Wrong(how)])
    assert (tmp_path / "best" / "model.pt2").is_file()
    record = json.loads((tmp_path / "best" / "report.json").read_text())
    assert record["files"]["torch_export"]["verdict"] == verdict
    assert record["files"]["weights"]["verdict"] == "equal"
    # It counts as an export, so the next try may replace it.
    assert not export(ConvNets(), architecture, model, x, tmp_path / "best", targets=()).bad
    assert not (tmp_path / "best" / "model.pt2").exists()


@dataclass(frozen=True)
class Failing(TorchExport):
    failure: type[BaseException] = RuntimeError

    def write(self, model, example, path):
        path.write_bytes(b"half")
        raise self.failure("stopped")


def test_a_format_that_cannot_be_written_does_not_cost_the_others(tmp_path):
    x = images(16)
    architecture, model = made(ConvNets(), x)
    with pytest.raises(ExportError, match=r"model.pt2 failed: RuntimeError: stopped"):
        export(ConvNets(), architecture, model, x, tmp_path / "best", targets=[Failing()])
    assert not (tmp_path / "best" / "model.pt2").exists()
    assert load_bundle(tmp_path / "best", ConvNets())
    entry = json.loads((tmp_path / "best" / "report.json").read_text())["files"]["torch_export"]
    assert (entry["verdict"], entry["bytes"], entry["error"]) == ("failed", None, "RuntimeError: stopped")


def test_an_interrupted_export_leaves_nothing_behind(tmp_path):
    x = images(16)
    architecture, model = made(ConvNets(), x)
    with pytest.raises(KeyboardInterrupt):
        export(ConvNets(), architecture, model, x, tmp_path / "best", targets=[Failing(KeyboardInterrupt)])
    assert list(tmp_path.iterdir()) == []
    export(ConvNets(), architecture, model, x, tmp_path / "best", targets=())
    before = {path.name: path.read_bytes() for path in (tmp_path / "best").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        export(ConvNets(), architecture, model, x, tmp_path / "best", targets=[Failing(KeyboardInterrupt)])
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "best").iterdir()} == before


def test_a_foreign_folder_is_refused(tmp_path):
    x = images(16, 4)
    for content in ("mine", "{}", '{"nasplat_export": 1}', '{"nasplat_export": 1, "files": {"a": 1}}', "[1]"):
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        (folder / "report.json").write_text(content)
        with pytest.raises(FolderError, match="no earlier export put there"):
            weights_only(ConvNets(), folder, x)
        assert (folder / "report.json").read_text() == content
    weights_only(ConvNets(), tmp_path / "best", x)
    (tmp_path / "best" / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"notes\.txt"):
        weights_only(ConvNets(), tmp_path / "best", x)
    with pytest.raises(FolderError, match="is a file"):
        weights_only(ConvNets(), tmp_path / "best" / "notes.txt", x)
    (tmp_path / "empty").mkdir()
    weights_only(ConvNets(), tmp_path / "empty", x)
    weights_only(ConvNets(), tmp_path / "a" / "new" / "one", x)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "best", "empty", "mine"]


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path):
    space, x = ConvNets(), images(16, 4)
    architecture, model = made(space, x)
    folder = tmp_path / "best"
    for inputs in (x[:1], x.double(), x[0, 0, 0], x.to("meta")):
        with pytest.raises(InvalidInputError, match="float32 batch"):
            export(space, architecture, model, inputs, folder)
    with pytest.raises(InvalidInputError, match="it returned"):
        export(space, architecture, nn.Flatten(0), x, folder)
    with pytest.raises(InvalidInputError, match="names and files of their own"):
        export(space, architecture, model, x, folder, targets=[TorchExport(), Wrong()])
    with pytest.raises(ArchitectureError, match="not of"):
        export(ConvNets(classes=11), architecture, model, x, folder)
    with torch.no_grad():
        model[-1].bias[0] = float("nan")
    with pytest.raises(ExportError, match="own logits"):
        export(space, architecture, model, x, folder)
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_silent_and_leaves_everything_as_it_was(conv, tmp_path, capfd, recwarn, caplog):
    # ``conv`` has imported torch.onnx already, which adds loggers and warning filters of its own.
    x = images(16, 20)
    architecture, model = made(ConvNets(), x)
    model.train()
    model[0].eval()
    model[1].weight.requires_grad_(False)

    def state():
        loggers = {
            name: (logger.level, logger.disabled, logger.propagate, list(logger.handlers))
            for name, logger in logging.root.manager.loggerDict.items()
            if isinstance(logger, logging.Logger) and name in ("torch", "torch.onnx", "torch.export")
        }
        return (
            [layer.training for layer in model.modules()],
            [(p.requires_grad, p.grad) for p in model.parameters()],
            (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()),
            (torch.is_inference_mode_enabled(), torch.get_default_device(), logging.root.manager.disable),
            # The legacy generator is one of those that must be left alone.
            (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()),  # noqa: NPY002
            (list(warnings.filters), loggers, Path.cwd()),
        )

    before, tensors = state(), {name: value.clone() for name, value in model.state_dict().items()}
    export(ConvNets(), architecture, model, x, tmp_path / "best")
    assert state() == before
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not recwarn.list


@pytest.mark.slow
def test_the_first_export_of_a_process_is_silent_too(tmp_path):
    code = f"""
import warnings
warnings.simplefilter("always")
import torch
from torch import nn
from nasplat.export import export
from nasplat.space import space_from

def build(genes):
    width = genes["width"]
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.LazyLinear(3))

space = space_from(build, {{"width": (2, 3)}})
architecture = space.architecture({{"width": 3}})
x = torch.randn(8, 1, 5, 5)
model = space.build(architecture)
model(x)
import sys
assert not any(name.split(".")[0] in ("onnx", "onnxruntime", "onnxscript", "ray", "mlflow") for name in sys.modules)
export(space, architecture, model, x, {str(tmp_path / "best")!r})
"""
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_tied_and_strided_weights_come_back(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    @dataclass(frozen=True)
    class Ties(SearchSpace):
        @property
        def choices(self):
            return {"only": (1,)}

        def build(self, architecture):
            return Tied()

    space = Ties()
    architecture = space.architecture({"only": 1})
    model = space.build(architecture)
    model.a.weight.data = model.a.weight.data.T
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    export(space, architecture, model, x, tmp_path / "best", targets=())
    # Other strides may sum in another order.
    assert torch.allclose(logits_of(load_bundle(tmp_path / "best", space), x), logits_of(model, x), atol=1e-6)


def test_verdicts():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1000, 10, generator=generator)
    assert compare(reference.clone(), reference).verdict == "equal"
    rounded = compare(reference + 1e-6, reference)
    assert (rounded.verdict, rounded.rows_beyond_rounding) == ("close", 0)
    flipped = reference.clone()
    flipped[:5] += torch.randn(5, 10, generator=generator)
    assert compare(flipped, reference).verdict == "close"
    assert compare(flipped, reference).rows_beyond_rounding == 5
    flipped[:100] += torch.randn(100, 10, generator=generator)
    assert compare(flipped, reference).verdict == "different"
    # A tie that rounding decides is no other class.
    assert compare(torch.tensor([[1.0, 1.0 + 1e-7, 0.0]]), torch.tensor([[1.0 + 1e-7, 1.0, 0.0]])).verdict == "close"
    assert compare(torch.zeros(3, 2), torch.zeros(3, 2)).verdict == "equal"
    with pytest.raises(InvalidInputError, match=r"\(3, 2\)"):
        compare(torch.zeros(3, 2), torch.zeros(3, 4))


def test_weights_refuse_a_state_that_is_not_tensors(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"code": "anything"}

        def set_extra_state(self, state):
            pass

    with pytest.raises(UnsupportedError, match="_extra_state"):
        Weights(ConvNets()).write(Odd(2, 2), torch.zeros(2, 2), tmp_path / "weights.safetensors")
