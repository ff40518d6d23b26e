"""Runtimes compute what networks of the search spaces compute, on other inputs than those that were exported with."""

import logging

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import nasplat.runtimes.onnx_runtime as exporters
from nasplat import SearchSpace
from nasplat.cost.breakdown import breakdown
from nasplat.errors import UnsupportedError
from nasplat.export.compare import compare
from nasplat.nn.binary import set_binarisation
from nasplat.nn.expert import ExpertBinaryConv2d
from nasplat.runtimes import Cuda, OnnxRuntime, OnnxRuntimeInt8, TorchCompiled, TorchEager, TorchExported
from nasplat.testing.runtime_contract import images, network
from search_spaces import Bats, BinaryGrowth, DartsCell, MetaKernel, NasBench201, Sandglass

SPACES = [
    pytest.param(Bats.small(), id="bats"),
    pytest.param(BinaryGrowth.small(), id="binary_growth"),
    pytest.param(DartsCell.small(), id="darts_cell"),
    pytest.param(MetaKernel.small(), id="meta_kernel"),
    pytest.param(NasBench201(), id="nasbench201"),
    pytest.param(Sandglass.small(), id="sandglass"),
]


def candidate(space: SearchSpace, channels: int = 1) -> nn.Module:
    """A network of the space that has been in training, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = space.build(space.sample(np.random.default_rng(0)))
        model(torch.randn(4, channels, 16, 16))
    return model.eval().requires_grad_(False)


def inputs(n: int, seed: int, channels: int = 1) -> torch.Tensor:
    return torch.randn(n, channels, 16, 16, generator=torch.Generator().manual_seed(seed))


def channels_of(space: SearchSpace) -> int:
    return 3 if isinstance(space, NasBench201) else 1


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_traced_file_computes_the_network_for_any_values(space: SearchSpace, batch: int) -> None:
    """What an example decides, the expert that it picks, say, is decided in the file, not when it is written."""
    channels = channels_of(space)
    model = candidate(space, channels)
    file = OnnxRuntime().export(model, inputs(batch, 1, channels))
    nodes = {node.op_type for node in onnx.load_from_string(file).graph.node}
    assert not nodes & {"Dropout", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "If"}
    found, expected = [], []
    for seed in range(2, 4):
        x = inputs(batch, seed, channels)
        session = OnnxRuntime().load(file, x, 1)
        session.run()
        found.append(session.output())
        expected.append(model(x))
    assert compare(torch.cat(found), torch.cat(expected)).verdict in ("equal", "close")


def test_a_network_without_a_way_from_input_to_output_runs() -> None:
    """NAS-Bench-201 has some: every way through a cell is cut. The optimised file then has no input any more."""
    space = NasBench201()
    x = torch.randn(1, 3, 16, 16)
    model = space.build(space.architecture(dict.fromkeys(space.choices, "none"))).eval()
    file = OnnxRuntime().export(model, x)
    session = OnnxRuntime().load(file, x, 1)
    session.run()
    torch.testing.assert_close(session.output(), model(x))
    assert breakdown(model, x, "onnxruntime").ms > 0
    with pytest.raises(UnsupportedError, match="does not depend on its input, so there is nothing to quantise"):
        OnnxRuntimeInt8().export(model, x)


@pytest.mark.parametrize("batch", [1, 5])
def test_traced_file_picks_experts_by_its_input(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(exporters, "_exported")  # it must not be needed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ExpertBinaryConv2d(8, 6, 3, padding=1, groups=2, experts=4).eval().requires_grad_(False)
    seen = set()
    file = OnnxRuntime().export(model, torch.randn(batch, 8, 6, 6, generator=torch.Generator().manual_seed(0)))
    for seed in range(1, 6):
        x = 3 * torch.randn(batch, 8, 6, 6, generator=torch.Generator().manual_seed(seed))
        seen |= set(model.gate(x.mean((2, 3))).argmax(1).tolist())
        session = OnnxRuntime().load(file, x, 1)
        session.run()
        torch.testing.assert_close(session.output(), model(x), rtol=1e-5, atol=1e-5)
    assert len(seen) > 1


def test_normalisations_do_not_train_in_the_file() -> None:
    file = OnnxRuntime().export(network(), images())
    for node in onnx.load_from_string(file).graph.node:
        if node.op_type == "BatchNormalization":
            assert {a.name: a.i for a in node.attribute}.get("training_mode", 0) == 0


@pytest.mark.parametrize("space", SPACES)
def test_int8_is_roughly_float(space: SearchSpace) -> None:
    """Of the network with real weights and activations: where one rounds, a sign turns."""
    channels = channels_of(space)
    model = candidate(space, channels)
    set_binarisation(model, weights=False, activations=False)
    x = inputs(4, 1, channels)
    session = OnnxRuntimeInt8().load(OnnxRuntimeInt8().export(model, x), x, 1)
    session.run()
    error = session.output() - model(x)
    assert 0 < float(error.square().mean().sqrt() / model(x).std()) < 0.05


def test_int8_file_is_quantised_throughout() -> None:
    file = OnnxRuntimeInt8().export(network(), images())
    graph = onnx.load_from_string(file).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    read = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.input[:1]}
    eights = [weights[name] for name in read if name in weights and weights[name].data_type == onnx.TensorProto.INT8]
    assert len(eights) == 4  # three convolutions and one product
    # Seven bits: sums of two products fit into 16 bits on processors without VNNI.
    assert max(int(np.abs(onnx.numpy_helper.to_array(held).astype(int)).max()) for held in eights) <= 64


def test_quantising_leaves_logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its advice would otherwise give the root logger a handler that prints all that others log."""
    monkeypatch.setattr(logging.root, "handlers", [])
    OnnxRuntimeInt8().export(network(), images())
    assert logging.root.handlers == []
    assert logging.root.filters == []


def test_other_exporter_steps_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no TorchScript exporter any more, or it does not know an operator."""
    taken = []

    def instead(model: nn.Module, example: torch.Tensor) -> bytes:
        taken.append(type(model))
        return b"written by the other exporter"

    def gone(*_: object) -> bytes:
        raise TypeError("export() got an unexpected keyword argument 'dynamo'")

    monkeypatch.setattr(exporters, "_traced", gone)
    monkeypatch.setattr(exporters, "_exported", instead)
    assert OnnxRuntime().export(network(), images()) == b"written by the other exporter"
    assert taken == [nn.Sequential]
    monkeypatch.setattr(exporters, "_exported", gone)
    with pytest.raises(UnsupportedError, match="Sequential cannot be written as ONNX: export"):
        OnnxRuntime().export(network(), images())


@pytest.mark.slow
def test_both_exporters_write_the_same_network() -> None:
    model, x = network(), images()
    for write in (exporters._traced, exporters._exported):
        session = OnnxRuntime().load(write(model, x), x, 1)
        session.run()
        assert compare(session.output(), model(x)).verdict in ("equal", "close")


def test_file_that_cannot_run_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"ONNX Runtime .* cannot run the file"):
        OnnxRuntime().load(b"no model", images(), 1)


def test_facts_name_the_path_that_instructions_take() -> None:
    facts = OnnxRuntimeInt8().facts()
    assert facts["providers"] == "CPUExecutionProvider"
    assert facts["dot_product"]
    assert {"onnxruntime", "instructions"} <= set(OnnxRuntime().facts())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    runtime = Cuda()
    model = network()
    file = runtime.export(model, images())
    assert file == TorchEager().export(model, images())
    with pytest.raises(UnsupportedError, match=r"needs a GPU.*sees none.*onnxruntime"):
        runtime.load(file, images(), 1)
    assert runtime.facts()["gpu"] == "none"
    assert Cuda(graphs=False) != runtime


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    runtime = TorchCompiled()
    assert runtime.facts()["compiler"] == "none"
    with pytest.raises(UnsupportedError, match=r"no no-such-compiler on PATH.*Install one, or set CXX"):
        runtime.load(runtime.export(network(), images()), images(), 1)


@pytest.mark.slow
def test_any_number_of_networks_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch compiles a function a limited number of times, then runs it as it is."""
    import torch._dynamo.config

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    for width in (2, 3, 4):
        model = nn.Sequential(nn.Linear(4, width), nn.ReLU()).eval()
        x = torch.randn(2, 4)
        session = TorchCompiled().load(TorchCompiled().export(model, x), x, 1)
        session.run()
        torch.testing.assert_close(session.output(), model(x))


@pytest.mark.slow
def test_exported_program_serves_a_batch_of_one() -> None:
    model = candidate(Bats.small())
    for batch in (1, 3):
        x = inputs(batch, 1)
        session = TorchExported().load(TorchExported().export(model, x), x, 1)
        session.run()
        assert compare(session.output(), model(x)).verdict in ("equal", "close")
