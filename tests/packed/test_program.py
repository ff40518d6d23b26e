"""The packed program as a user has it: called, saved, loaded, profiled, and without Numba."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import images as batch_of
from networks import with_history
from programs import Build, graph, images
from torch import Tensor, nn

from nasplat.errors import FileFormatError, InvalidInputError, NasplatWarning, UnsupportedError
from nasplat.packed import PackedProgram, pack, profile, warm_up
from nasplat.packed.graph import INPUT, Affine, Program, Window
from nasplat.packed.interpreter import Interpreter
from nasplat.packed.kernels import isa as kernels_isa
from search_spaces import Bats

try:
    from nasplat.packed import compiled
except ImportError:
    compiled = None  # type: ignore[assignment]

needs_numba = pytest.mark.skipif(compiled is None, reason="needs Numba")


def drawn(seed: int = 0, **options: Any) -> tuple[nn.Module, Tensor]:
    """A small network with a history, and images."""
    space = Bats.small(**options)
    torch.manual_seed(seed)
    model = with_history(space.build(space.sample(np.random.default_rng(seed))), seed)
    return model, batch_of((space.in_channels, 16, 16), 6, seed)


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Tensor]:
    return drawn(in_channels=3)


@pytest.fixture(scope="module")
def packed(network: tuple[nn.Module, Tensor]) -> PackedProgram:
    if compiled is None:
        pytest.skip("needs Numba")
    return pack(network[0], network[1])


# The call.


@needs_numba
@pytest.mark.parametrize("seed", range(4))
def test_a_packed_network_gives_its_logits(seed: int) -> None:
    model, x = drawn(seed, in_channels=(1, 3)[seed % 2], classes=7)
    program = pack(model, x[:1])
    with torch.inference_mode():
        wanted = model(x)
    y = program(x)
    assert y.shape == (6, 7) and y.dtype == torch.float32
    # Of the real stem, the means and the classifier, sums are rounded in another order.
    assert torch.allclose(y, wanted, rtol=1e-4, atol=1e-4 * float(wanted.std()))
    assert not y.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@needs_numba
def test_a_batch_is_its_images(packed: PackedProgram, network: tuple[nn.Module, Tensor]) -> None:
    _, x = network
    alone = torch.cat([packed(image[None]) for image in x])
    assert all(torch.equal(packed(x, threads), alone) for threads in (1, 2, 3, 100))
    assert packed(x[:0]).shape == (0, alone.shape[1])
    assert torch.equal(packed(x.requires_grad_()), alone)
    assert torch.equal(packed(x.detach().to(memory_format=torch.channels_last)), alone)
    assert torch.equal(packed(x.detach()[:1].expand(3, -1, -1, -1)), alone[:1].expand(3, -1))
    assert torch.equal(packed(x.detach().flip(0)[::2]), alone.flip(0)[::2])


@needs_numba
def test_results_are_not_overwritten_by_later_calls(packed: PackedProgram, network: tuple[nn.Module, Tensor]) -> None:
    x = network[1].detach()
    y = packed(x)
    before = y.clone()
    packed(x.flip(0))
    assert torch.equal(y, before)
    y.zero_()
    assert torch.equal(packed(x), before)


@needs_numba
def test_a_feature_map_keeps_its_height_and_width() -> None:
    build = Build(np.random.default_rng(0), (4, 5, 6))
    build.binary_conv(INPUT, 1, 8, Window((3, 3), (5, 6), 1, 1, (1, 1)))
    program = build.program()
    x = torch.from_numpy(images(np.random.default_rng(1), (4, 5, 6), 3))
    y = PackedProgram(program)(x)
    assert torch.equal(y, torch.from_numpy(Interpreter(program).run(x.numpy())))
    vector = Build(np.random.default_rng(0), (4, 5, 6))
    vector.mean(INPUT)
    for flat, shape in ((True, (3, 4)), (False, (3, 4, 1, 1))):
        assert PackedProgram(vector.program()._replace(flat=flat))(x).shape == shape


@needs_numba
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (lambda x: x.double(), r"takes a dense float32 tensor on the CPU; got torch\.float64"),
        (lambda x: x.half(), r"got torch\.float16"),
        (lambda x: x.to("meta"), r"got torch\.float32.*on meta"),
        (lambda x: x.detach().numpy(), "got ndarray"),
        (lambda x: [1.0], "got list"),
        (lambda x: x.detach().to_sparse(), r"got torch\.float32, torch\.sparse_coo"),
        (
            lambda x: x[0],
            r"packed for images \(3, 16, 16\); got a tensor of shape \(3, 16, 16\); legal: \(n, 3, 16, 16\)",
        ),
        (lambda x: x[:, :2], r"got a tensor of shape \(6, 2, 16, 16\)"),
        (lambda x: x[..., :-1], r"got a tensor of shape \(6, 3, 16, 15\).*pack the network again"),
        (lambda x: x[..., None], r"got a tensor of shape \(6, 3, 16, 16, 1\)"),
        (lambda x: x.reshape(-1), r"got a tensor of shape \(4608,\)"),
    ],
)
def test_what_it_does_not_take(x: Any, message: str, packed: PackedProgram, network: tuple[nn.Module, Tensor]) -> None:
    with pytest.raises(InvalidInputError, match=message):
        packed(x(network[1]))


@needs_numba
@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_are_at_least_one(threads: Any, packed: PackedProgram, network: tuple[nn.Module, Tensor]) -> None:
    with pytest.raises(InvalidInputError, match=rf"threads is {threads}; legal: an integer from 1 up"):
        packed(network[1], threads)


def test_an_illegal_program_is_refused_at_once() -> None:
    with pytest.raises(InvalidInputError, match="nothing before it makes"):
        PackedProgram(Program((1, 1, 1), (Affine(name="y", x="z"),), "y"))


@needs_numba
def test_a_model_in_training_is_refused(network: tuple[nn.Module, Tensor]) -> None:
    model = copy.deepcopy(network[0]).train()
    with pytest.raises(UnsupportedError, match=r"training mode; legal: evaluation"):
        pack(model, network[1])


@needs_numba
def test_packing_leaves_the_model_alone(network: tuple[nn.Module, Tensor]) -> None:
    model, x = network
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pack(model, x)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module.training for module in model.modules())


# What it says of itself.


@needs_numba
def test_repr_and_sizes(packed: PackedProgram) -> None:
    kinds = [operation.KIND for operation in packed.program.operations]
    assert repr(packed) == (
        f"PackedProgram((3, 16, 16) -> (10,), {len(kinds)} operations, "
        f"{kinds.count('binary_conv')} of them binary convolutions)"
    )
    assert packed.input_shape == (3, 16, 16)
    build = Build(np.random.default_rng(0), (6, 8, 8))
    x = build.binary_conv(INPUT, 2, 4, Window((3, 3), (8, 8), 1, 1, (1, 1)))
    build.conv(x, 1, 4, Window((1, 1), (8, 8)))
    program = PackedProgram(build.program()._replace(flat=False))
    # 64 outputs of 4 channels, each of 9 taps of 3 channels; the real one does not count.
    assert program.bit_macs == 64 * 4 * 9 * 3
    assert repr(program) == "PackedProgram((6, 8, 8) -> (4, 8, 8), 2 operations, 1 of them binary convolutions)"


# Files.


@needs_numba
def test_a_saved_program_gives_the_same_logits(
    packed: PackedProgram, network: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    x = network[1].detach()
    packed.save(tmp_path / "best.packed")
    packed.save(str(tmp_path / "again.packed"))
    assert (tmp_path / "best.packed").read_bytes() == (tmp_path / "again.packed").read_bytes()
    loaded = PackedProgram.load(str(tmp_path / "best.packed"))
    assert isinstance(loaded, PackedProgram)
    assert torch.equal(loaded(x), packed(x))
    assert (repr(loaded), loaded.bit_macs) == (repr(packed), packed.bit_macs)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PackedProgram.load(tmp_path / "none.packed")
    (tmp_path / "bad.packed").write_bytes(b"not a program")
    with pytest.raises(FileFormatError, match=r"bad\.packed"):
        PackedProgram.load(tmp_path / "bad.packed")


@needs_numba
def test_copies_and_pickles_give_the_same_logits(packed: PackedProgram, network: tuple[nn.Module, Tensor]) -> None:
    """An engine that is already made stays behind: it is for one processor."""
    x = network[1].detach()
    wanted = packed(x)
    for other in (pickle.loads(pickle.dumps(packed)), copy.copy(packed), copy.deepcopy(packed)):
        assert other._engine is None
        assert torch.equal(other(x), wanted)
    assert len(pickle.dumps(packed)) < 2 * sum(
        array.nbytes
        for operation in packed.program.operations
        for array in (getattr(operation, name) for name in operation.ARRAYS)
        if array is not None
    ) + 1_000 * len(packed.program.operations)


# Without Numba.


@pytest.fixture
def no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("numba", "llvmlite")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    import nasplat.packed as package

    ours = ("nasplat.packed.compil", "nasplat.packed.kernels")
    for name in [name for name in sys.modules if name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("compiled", "compiling", "kernels"):
        if hasattr(package, name):
            monkeypatch.delattr(package, name)


def test_without_numba_it_runs_in_numpy_and_says_so(network: tuple[nn.Module, Tensor], no_numba: None) -> None:
    model, x = network
    x = x.detach()
    program = pack(model, x)
    with pytest.warns(NasplatWarning, match=r"Numba cannot be imported.*pip install 'nasplat\[packed\]'") as caught:
        y = program(x)
    assert len(caught) == 1
    # The warning is shown at the line of the user's call.
    assert caught[0].filename == __file__
    assert isinstance(program.engine, Interpreter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(program(x), y)
        assert torch.equal(program(x, threads=2), y)
    with torch.inference_mode():
        assert torch.allclose(y, model(x), rtol=1e-4, atol=1e-4)
    with pytest.warns(NasplatWarning):
        assert torch.equal(pack(model, x)(x), y)
    assert warm_up() is None
    with pytest.raises(UnsupportedError, match=r"profile measures the compiled engine.*nasplat\[packed\]"):
        profile(program)


@needs_numba
def test_both_engines_give_the_same_logits(network: tuple[nn.Module, Tensor], packed: PackedProgram) -> None:
    x = network[1].detach()
    y = torch.from_numpy(Interpreter(packed.program).run(x.numpy())).flatten(1)
    assert torch.allclose(packed(x), y, rtol=1e-4, atol=1e-4)


# Measurements.


@needs_numba
def test_a_profile_accounts_for_all_work(packed: PackedProgram) -> None:
    found = profile(packed, seconds=1e-4, passes=2)
    assert [step.name for step in found.steps] == [step.name for step in packed.engine.steps]
    assert found.bit_macs == packed.bit_macs == sum(step.bit_macs for step in found.steps)
    assert found.microseconds > 0
    assert found.popcount_peak > 0 and (found.lookup_peak is None or found.lookup_peak > 0)
    assert {step.kind for step in found.steps} >= {"pack", "binary_conv", "conv", "linear"}
    for step in found.steps:
        assert step.microseconds > 0
        assert (step.bit_macs > 0) == (step.kind == "binary_conv") == (step.share_of_peak > 0)
        wanted = step.bit_macs / (step.microseconds * 1e-6) / found.popcount_peak
        assert step.share_of_peak == pytest.approx(wanted)
        assert step.macs > 0 or step.kind not in ("conv", "linear")
    kinds = found.by_kind()
    assert sum(kinds.values()) == pytest.approx(sum(step.microseconds for step in found.steps))
    assert list(kinds.values()) == sorted(kinds.values(), reverse=True)
    assert found.arena_bytes == packed.engine.plan.arena_bytes  # type: ignore[attr-defined]
    json = found.to_json()
    assert json["steps"][0]["name"] == found.steps[0].name and json["bit_macs"] == found.bit_macs
    text = str(found)
    assert all(step.name in text for step in found.steps)
    assert found.isa in text and found.cpu in text


@needs_numba
def test_a_profile_of_other_work_than_bits() -> None:
    build = Build(np.random.default_rng(0), (3, 4, 4))
    build.pool(build.affine(INPUT))
    found = profile(PackedProgram(build.program()), seconds=1e-4, passes=1)
    assert found.bit_macs == 0
    assert [step.share_of_peak for step in found.steps] == [0.0, 0.0]
    assert "pool" in str(found)


@needs_numba
def test_warming_up_names_the_instruction_set() -> None:
    assert warm_up() == warm_up()
    assert warm_up() in {isa.name for isa in kernels_isa.ISAS}


# Several processes.

CHILD = """
import sys
import numpy as np
from programs import graph, images
from nasplat.packed.compiled import Compiled
from nasplat.packed.interpreter import Interpreter

rng = np.random.default_rng(int(sys.argv[1]))
for _ in range(5):
    program = graph(rng)
    x = images(rng, program.input_shape, 2)
    np.testing.assert_allclose(Compiled(program).run(x), Interpreter(program).run(x), rtol=1e-3, atol=1e-3)
print("right")
"""


@needs_numba
@pytest.mark.slow
def test_processes_that_start_at_the_same_time_share_one_compilation(tmp_path: Path) -> None:
    """Each finds no compiled code, one makes it, and all get right results."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(seed)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(2)
    ]
    results = [child.communicate(timeout=500) for child in children]
    assert [out for out, _ in results] == ["right\n"] * 2, results
    # What it is compiled from is in the cache once; a third process has nothing to compile.
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc"))
    assert before
    third = subprocess.run(
        [sys.executable, "-c", CHILD, "2"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert third.stdout == "right\n" and "compiling" not in third.stderr
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")) == before


@needs_numba
def test_random_programs_through_files(tmp_path: Path) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        program = PackedProgram(graph(rng))
        x = torch.from_numpy(images(rng, program.input_shape, 2))
        program.save(tmp_path / "program.packed")
        assert torch.equal(PackedProgram.load(tmp_path / "program.packed")(x), program(x))
