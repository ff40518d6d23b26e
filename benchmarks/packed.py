"""How fast binary networks run on packed bits, beside torch, torch.compile and ONNX Runtime in float32 and int8.

    python benchmarks/packed.py                                   # layers and networks
    python benchmarks/packed.py --layers --target haswell --target x86-64
    python benchmarks/packed.py --networks --experts 4
    python benchmarks/packed.py --quick                           # a look whether all is well, no measurement

Parts:
    layers    43 binary convolutions: dense, grouped, and those of BATS. The packed layer goes from float32 to float32:
              threshold, packing, convolution, scale, PReLU. What it is compared with computes the convolution alone,
              with real weights of the same shape, and int8 starts from 8 bits and ends there (but for ``QDQ``, which is
              float32 to float32). So ratios understate what a network gains. Checked before: the packed layer equals
              the trained one bit by bit, as each step of a network does (``nasplat.packed.verify``).
    networks  BATS (published cells, 8 cells of 36 channels in 12 groups, 32x32) and the published network of
              BinaryGrowth ``1262-2-4:8:8:16`` (224x224). Beside the packed program: the *training graph*, which
              multiplies +1 and -1 as floats, and the *float twin*, the same network without signs, which is what a
              library offers for real networks of this structure; the twin in int8, too.

A ratio is the time of another one over the packed program's, in the same run: 10 is ten times as long. Subjects take
turns; the fastest sample of each counts, and ``spread`` is by how much the median sample is slower. One thread is on
one processor, two threads on two. A call of the packed program is ``program(x)`` with everything around it. A call of
ONNX Runtime has its input and output bound beforehand. ``steps us`` is what the packed steps take without the call, by
``nasplat.packed.profile``, and ``of popcount`` and ``of lookup`` the convolution's share of what one core can do with
operands in registers: XOR and population count, or table lookup.

``--target`` (several times) lets Numba compile for an older processor, in a process of its own that takes its turn with
the others: ``packed@haswell`` is what AVX2 alone gives. The libraries go on using what this processor has.

torch.compile freezes weights and compiles for each shape anew, which takes a minute or two for a network. So it takes
part at batch 1 with one thread, and with ``--compile all`` everywhere. Of a single convolution it calls the same
library as eager torch does. torch's own int8 is in the layers, not in the networks.

Random inputs, random weights, normalisations with the statistics of a random batch. On two processors that do nothing
else, either part takes up to 10 minutes. Packed programs compile once per machine and target (Numba's cache).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # the script beside this one must not hide the package strategies
    # Before torch: it compiles here, and not in processes that could still be busy when time is taken.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numba
import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantFormat
from safetensors.torch import save
from torch import Tensor, nn

from benchmarks.packed_baselines import (
    Call,
    LayerBaselines,
    Session,
    compiled,
    convolution,
    eager,
    exported,
    quantised,
)
from benchmarks.packed_timing import (
    SPINNING_SECONDS,
    TARGETS,
    Here,
    OtherTarget,
    Subject,
    Timing,
    excerpt,
    measure,
    processors,
    steady,
    usable,
)
from nasplat.cost.machine import processor
from nasplat.nn import BinaryConv2d, set_binarisation
from nasplat.nn.prelu import PReLU
from nasplat.packed import PackedProgram, pack, profile, verify
from search_spaces.bats import Bats
from search_spaces.binary_growth import BinaryGrowth

SEED = 0


class Setting(NamedTuple):
    """How a subject is called."""

    batch: int
    threads: int

    def __str__(self) -> str:
        return f"{'one thread' if self.threads == 1 else f'{self.threads} threads'}, batch {self.batch}"


SETTINGS = (Setting(1, 1), Setting(16, 1), Setting(16, 2))


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: Samples of each subject.
        seconds: After so many seconds of one setting's rounds, three rounds are enough.
        compile: Where torch.compile takes part: nowhere, at batch 1 with one thread, or everywhere.
        targets: Processes with Numba for another processor.
    """

    rounds: int
    seconds: float
    compile: str
    targets: tuple[OtherTarget, ...] = ()

    def compiles(self, setting: Setting) -> bool:
        """Whether torch.compile takes part in this setting."""
        return self.compile == "all" or (self.compile == "single" and setting == (1, 1))


@dataclass(frozen=True)
class Layer:
    """A binary convolution that keeps height and width.

    Attributes:
        channels: In.
        out_channels: Out.
        side: Height and width, in pixels.
        kernel: Side of the kernel.
        dilation: Distance between the taps.
        groups: Of the convolution.
    """

    channels: int
    out_channels: int
    side: int
    kernel: int
    dilation: int
    groups: int

    def __str__(self) -> str:
        dilation, groups = (
            f" d{self.dilation}" if self.dilation > 1 else "",
            f" g{self.groups}" if self.groups > 1 else "",
        )
        return f"{self.channels}->{self.out_channels} {self.side}x{self.side} k{self.kernel}{dilation}{groups}"

    @property
    def family(self) -> str:
        """Layers of one family are averaged."""
        if self.groups == 12:
            return f"BATS {self.kernel}x{self.kernel}, 12 groups"
        return f"{'dense' if self.groups == 1 else 'grouped'} {self.kernel}x{self.kernel}"

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one example."""
        return self.side**2 * self.out_channels * self.kernel**2 * self.channels // self.groups

    def build(self) -> nn.Sequential:
        """Normalisation, convolution, PReLU, in evaluation mode; random, also with negative factors of the first."""
        padding = self.dilation * (self.kernel - 1) // 2
        model = nn.Sequential(
            nn.BatchNorm2d(self.channels),
            BinaryConv2d(
                self.channels, self.out_channels, self.kernel,
                padding=padding, dilation=self.dilation, groups=self.groups,
            ),
            PReLU(self.out_channels),
        )  # fmt: skip
        settle(model, torch.randn(4, self.channels, self.side, self.side))
        return model


def all_layers() -> tuple[Layer, ...]:
    """Those of the tables."""
    found = []
    for channels, side in ((64, 32), (128, 16), (256, 8), (128, 32), (256, 16), (64, 8)):
        found += [Layer(channels, channels, side, 1, 1, groups) for groups in (1, 4)]
        # A sixteenth of the channels: 16 channels a group. Of 64 channels that is 4 groups again.
        found += [Layer(channels, channels, side, 3, 1, groups) for groups in sorted({1, 4, channels // 16})]
    for channels, side in ((36, 32), (72, 16), (144, 8)):
        found += [Layer(channels, channels, side, kernel, dilation, 12) for kernel in (3, 5) for dilation in (1, 2)]
        found.append(Layer(4 * channels, channels, side, 1, 1, 1))
    return tuple(found)


def quick_layers() -> tuple[Layer, ...]:
    """The smallest of each family."""
    families = dict.fromkeys(layer.family for layer in all_layers())
    return tuple(min((x for x in all_layers() if x.family == family), key=lambda x: x.macs) for family in families)


DENSE = nn.Conv2d(128, 128, 3, padding=1, bias=False)
"""What libraries compute fastest; at 16x16 pixels its rate stands for what float32 can do."""

DENSE_MACS = Layer(128, 128, 16, 3, 1, 1).macs


@dataclass(frozen=True)
class Network:
    """A whole network.

    Attributes:
        name: For the tables.
        build: Makes it, untrained.
        shape: Of one input image.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]


def bats() -> nn.Module:
    """8 cells for CIFAR-10, the published ones."""
    space = Bats.cifar(cells=8)
    return space.build(space.paper_genes())


def growth(experts: int) -> nn.Module:
    """A published topology, with so many kernels in each binary convolution."""
    space = BinaryGrowth()
    return space.build(space.topology("1262-2-4:8:8:16", experts=experts))


def all_networks(experts: int) -> tuple[Network, ...]:
    """Those of the tables; with more experts than one, one more."""
    networks = [
        Network("BATS, 8 cells, 36 channels, 32x32", bats, (3, 32, 32)),
        Network("BinaryGrowth 1262-2-4:8:8:16, 224x224", lambda: growth(1), (3, 224, 224)),
    ]
    if experts > 1:
        named = f"BinaryGrowth 1262-2-4:8:8:16, {experts} experts, 224x224"
        networks.append(Network(named, lambda: growth(experts), (3, 224, 224)))
    return tuple(networks)


def settle(model: nn.Module, x: Tensor) -> None:
    """Random parameters and the statistics of one batch for the normalisations; evaluation mode, no gradients.

    Without it, an untrained network's features would grow or vanish, and numbers too small for the normal range would
    slow float arithmetic down.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.normal_()
                module.bias.normal_(0, 0.3)
            elif isinstance(module, nn.PReLU):
                module.weight.uniform_(0, 0.5)
            elif isinstance(module, BinaryConv2d):
                fan_in = module.in_channels // module.groups * math.prod(module.kernel_size)
                module.scale.uniform_(0.5, 1.5).mul_(fan_in**-0.5)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Row:
    """What was measured of one layer or network in one setting.

    Attributes:
        subject: The layer or network.
        setting: Batch and threads.
        timings: By name of the compared system; ``packed`` among them. A name's first word is its kind.
        facts: More that was found.
    """

    subject: str
    setting: Setting
    timings: Mapping[str, Timing]
    facts: Mapping[str, Any]

    def best(self, kind: str) -> float:
        """Seconds of the fastest of all whose names begin with this word."""
        return min(timing.best for name, timing in self.timings.items() if name.split()[0] == kind)

    def ratio(self, name: str) -> float:
        """Time of another one over that of the packed program."""
        return self.timings[name].best / self.timings["packed"].best

    def best_ratio(self, kind: str) -> float:
        """Time of the fastest of a kind over that of the packed program."""
        return self.best(kind) / self.timings["packed"].best

    def as_json(self) -> dict[str, Any]:
        """All of it, with every sample."""
        others = [name for name in self.timings if name != "packed"]
        return {
            "subject": self.subject,
            **self.setting._asdict(),
            **self.facts,
            "seconds": {name: list(timing.samples) for name, timing in self.timings.items()},
            "ratios": {name: self.ratio(name) for name in others},
        }


def time_packed(
    program: PackedProgram, path: Path, x: Tensor, setting: Setting, cpus: set[int], targets: Iterable[OtherTarget]
) -> dict[str, Subject]:
    """The packed program here, and in the processes for other targets."""
    subjects: dict[str, Subject] = {"packed": Here(lambda: program(x, threads=setting.threads))}
    for target in targets:
        y = target.load(path, x.shape, setting.threads, cpus)
        wanted = excerpt(program(torch.randn(x.shape, generator=torch.Generator().manual_seed(0))))
        if not torch.allclose(y, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max())):
            raise RuntimeError(f"target {target.name} computes something else")
        subjects[f"packed@{target.name}"] = target
    return subjects


def run(subjects: Mapping[str, Subject], setting: Setting, effort: Effort) -> dict[str, Timing]:
    """Time them in turn."""
    pause = SPINNING_SECONDS if setting.threads > 1 else 0.0
    return measure(subjects, effort.rounds, pause=pause, seconds=effort.seconds)


def steps_of_layer(program: PackedProgram) -> dict[str, float | None]:
    """What the profile says of a single layer."""
    found = profile(program)
    (conv,) = (step for step in found.steps if step.bit_macs)
    lookup = found.lookup_peak
    return {
        "steps_us": sum(step.microseconds for step in found.steps),
        "conv_us": conv.microseconds,
        "of_popcount_peak": conv.share_of_peak,
        "of_lookup_peak": None if lookup is None else conv.share_of_peak * found.popcount_peak / lookup,
    }


def time_layer(layer: Layer, settings: Iterable[Setting], effort: Effort) -> list[Row]:
    """One layer in each setting."""
    torch.manual_seed(SEED)
    model = layer.build()
    conv = model[1]
    assert isinstance(conv, BinaryConv2d)
    baselines = LayerBaselines(conv, layer.side, SEED)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.packed"
        program = pack(model, torch.randn(1, layer.channels, layer.side, layer.side))
        program.save(path)
        for setting in settings:
            cpus = processors(setting.threads)
            with steady(setting.threads, cpus):
                x = torch.randn(setting.batch, layer.channels, layer.side, layer.side)
                subjects = time_packed(program, path, x, setting, cpus, effort.targets)
                float32 = baselines.float32(x, setting.threads, compile=effort.compiles(setting))
                int8 = baselines.int8(x, setting.threads)
                _check_layer(layer, model, program, baselines, x, float32, int8)
                subjects |= {f"float32 {name}": Here(call) for name, call in float32.items()}
                subjects |= {f"int8 {name}": Here(call) for name, call in int8.items()}
                facts: dict[str, Any] = {"family": layer.family, "bit_macs": layer.macs}
                if setting == (1, 1):
                    facts |= steps_of_layer(program)
                rows.append(Row(str(layer), setting, run(subjects, setting, effort), facts))
    return rows


def _check_layer(
    layer: Layer,
    model: nn.Module,
    program: PackedProgram,
    baselines: LayerBaselines,
    x: Tensor,
    float32: Mapping[str, Call],
    int8: Mapping[str, Call],
) -> None:
    """Refuse to time what computes something else."""
    with torch.no_grad():
        if not torch.equal(program(x), model(x)):
            raise RuntimeError(f"{layer}: the packed layer differs from the trained one")
        wanted = nn.functional.conv2d(
            x, baselines.conv.weight, None, 1, baselines.conv.padding, layer.dilation, layer.groups
        )
    for name, call in float32.items():
        made = torch.as_tensor(call())
        if not torch.allclose(made, wanted, rtol=1e-3, atol=1e-3):
            raise RuntimeError(f"{layer}: float32 {name} computes something else")
    for name, call in int8.items():
        error = float((baselines.real(name, call()) - wanted).norm() / wanted.norm())
        if not error < 0.1:
            raise RuntimeError(f"{layer}: int8 {name} is off by {error:.2f} of the result's norm")


def time_network(network: Network, settings: Iterable[Setting], effort: Effort) -> list[Row]:
    """One network in each setting."""
    torch.manual_seed(SEED)
    example = torch.randn(1, *network.shape)
    graph = network.build()
    twin = copy.deepcopy(graph)
    set_binarisation(twin, weights=False, activations=False)
    for model in (graph, twin):
        settle(model, torch.randn(4, *network.shape))
    program = pack(graph, example)
    graph_file, twin_file = exported(graph, example), exported(twin, example)
    forms = {"QDQ": QuantFormat.QDQ, "QLinear": QuantFormat.QOperator}
    int8_files = {name: quantised(twin_file, example.shape, SEED, form) for name, form in forms.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.packed"
        program.save(path)
        facts = {**_sizes(path, graph), **_agreement(network, program, graph)}
        with steady(1, processors(1)):
            facts["profile"] = profile(program).to_json()
        for setting in settings:
            cpus = processors(setting.threads)
            with steady(setting.threads, cpus):
                x = torch.randn(setting.batch, *network.shape)
                subjects = time_packed(program, path, x, setting, cpus, effort.targets)
                for kind, model, file in (("graph", graph, graph_file), ("twin", twin, twin_file)):
                    calls: dict[str, Call] = {
                        "torch": eager(copy.deepcopy(model), x, channels_last=False),
                        "torch cl": eager(copy.deepcopy(model), x, channels_last=True),
                    }
                    if effort.compiles(setting):
                        calls["compile"] = compiled(copy.deepcopy(model), x)
                    calls["ORT"] = Session(file, x.numpy(), setting.threads)
                    subjects |= {f"{kind} {name}": Here(call) for name, call in calls.items()}
                if setting == (1, 1):
                    subjects["dense"] = Here(Session(convolution(DENSE), torch.randn(1, 128, 16, 16).numpy(), 1))
                for name, file in int8_files.items():
                    subjects[f"int8-twin ORT {name}"] = Here(Session(file, x.numpy(), setting.threads))
                rows.append(Row(network.name, setting, run(subjects, setting, effort), facts))
    return rows


def _sizes(path: Path, model: nn.Module) -> dict[str, Any]:
    checkpoint = len(save({name: value.contiguous() for name, value in model.state_dict().items()}))
    return {
        "artefact_bytes": path.stat().st_size,
        "checkpoint_bytes": checkpoint,
    }


def _agreement(network: Network, program: PackedProgram, model: nn.Module) -> dict[str, Any]:
    """Refuse to time what computes something else."""
    found = verify(model, program, torch.randn(8, *network.shape))
    if not found.ok:
        raise RuntimeError(f"{network.name}: the packed program differs from the network: {found}")
    return {
        "images": found.rows,
        "relative_difference": found.relative_difference,
        "images_with_tipped_signs": found.rows_beyond_rounding,
        "argmax_agreement": found.argmax_agreement,
    }


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def table(lines: Sequence[Sequence[str]]) -> None:
    """Print cells in columns; the first line is the head, the first column is flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        first, *rest = (cell.ljust(width) if not at else cell.rjust(width)
                        for at, (cell, width) in enumerate(zip(cells, widths, strict=True)))  # fmt: skip
        print("  ".join((first, *rest)).rstrip())


def show_layers(rows: Sequence[Row]) -> None:
    """A table of ratios for each setting, and the geometric means of families."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    for setting in settings:
        found = [row for row in rows if row.setting == setting]
        targets, others = _names(found)
        print(f"\nlayers, {setting}: microseconds of the packed layer, then times of others over its time")
        profiled = {"steps us": "steps_us", "of popcount": "of_popcount_peak", "of lookup": "of_lookup_peak"}
        profiled = {head: fact for head, fact in profiled.items() if found[0].facts.get(fact) is not None}
        lines = [["layer", "packed us", "spread", *targets, *others, "best float32", "best int8", *profiled]]
        for row in found:
            packed = row.timings["packed"]
            lines.append([
                row.subject, f"{packed.best * 1e6:.1f}", f"{packed.spread:.0%}",
                *(f"{row.ratio(name):.1f}" for name in (*targets, *others)),
                f"{row.best_ratio('float32'):.1f}", f"{row.best_ratio('int8'):.1f}",
                *(f"{row.facts[fact]:{'.1f' if fact == 'steps_us' else '.0%'}}" for fact in profiled.values()),
            ])  # fmt: skip
        table(lines)
        _print_spread(found)
    print("\nlayers: geometric means of the ratios, best float32 / best int8; steps: packed without the call")
    programs = ["packed", *_names(rows)[0]]
    lines = [["family", "layers", "", *map(str, settings)]]
    for family in dict.fromkeys(row.facts["family"] for row in rows):
        of_family = [[row for row in rows if (row.facts["family"], row.setting) == (family, s)] for s in settings]
        label = [family, str(len(of_family[0]))]
        for name in programs:
            lines.append([*label, name, *(_means(found, lambda row, name=name: row.timings[name].best)  # type: ignore[misc]
                                          for found in of_family)])  # fmt: skip
            label = ["", ""]
        cells = [_means(found, lambda row: row.facts.get("steps_us", math.nan) * 1e-6) for found in of_family]
        lines.append([*label, "steps", *("" if "nan" in cell else cell for cell in cells)])
    table(lines)


def _means(rows: Sequence[Row], seconds: Callable[[Row], float]) -> str:
    means = [geometric_mean(row.best(kind) / seconds(row) for row in rows) for kind in ("float32", "int8")]
    return " / ".join(f"{mean:.1f}" for mean in means)


def show_networks(rows: Sequence[Row]) -> None:
    """For each network: sizes, agreement, and a table of ratios, a column for each setting."""
    for name in dict.fromkeys(row.subject for row in rows):
        found = [row for row in rows if row.subject == name]
        facts = found[0].facts
        print(f"\n{name}: milliseconds of the packed program, then times of others over its time (spread)")
        lines = [["", *(str(row.setting) for row in found)]]
        lines.append(["packed", *(f"{row.timings['packed'].best * 1e3:.2f} ms ({row.timings['packed'].spread:.0%})"
                                  for row in found)])  # fmt: skip
        targets, others = _names(found)
        for other in (*targets, *others):
            lines.append([
                other,
                *(f"{row.ratio(other):.1f} ({row.timings[other].spread:.0%})" if other in row.timings else "-"
                  for row in found),
            ])  # fmt: skip
        for label, kind in (("best training graph", "graph"), ("best float twin", "twin"), ("best int8", "int8-twin")):
            lines.append([label, *(f"{row.best_ratio(kind):.1f}" for row in found)])
        table(lines)
        bounds = [_bound(row) for row in found if "dense" in row.timings]
        print(*bounds, sep="\n")
        artefact, checkpoint, arena = (
            facts["artefact_bytes"],
            facts["checkpoint_bytes"],
            facts["profile"]["arena_bytes"],
        )
        print(
            f"artefact {artefact:,} bytes, 1/{checkpoint / artefact:.1f} of the float32 checkpoint's {checkpoint:,}; "
            f"memory for features of one example {arena:,} bytes"
        )
        print(
            f"every step is what the network computes; of {facts['images']} random images, "
            f"{facts['images_with_tipped_signs']} have signs that rounding before them tipped (an untrained network "
            f"amplifies those), {facts['argmax_agreement']:.0%} the same class"
        )
    print(
        "\nThe float twin's ratio compares with the libraries as they are, which are poor at small grouped "
        "convolutions.\nA float32 program written with the care of the packed one would come nearer. An estimate for "
        "BATS on a processor\nwith AVX-512 VPOPCNTDQ, at the rate of a careful float32 convolution: about 5 times. The "
        "training graph is what one\notherwise has for this very network."
    )


def _bound(row: Row) -> str:
    """The least that a float32 program could take."""
    rate = DENSE_MACS / row.timings["dense"].best
    steps = row.facts["profile"]["steps"]
    macs = sum(step["bit_macs"] + step["macs"] for step in steps)
    ratio = macs / rate / row.timings["packed"].best
    return (
        f"{macs / 1e6:.0f} million multiply-accumulates; at the rate of a dense 3x3 convolution of 128 channels in\n"
        f"ONNX Runtime, {rate / 1e9:.0f} GMAC/s, a float32 program would take {ratio:.1f} times as long as the packed "
        "one: no small group reaches that rate"
    )


def _names(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Of the other targets, and of the other systems."""
    names = list(dict.fromkeys(name for row in rows for name in row.timings if name != "dense"))
    targets = [name for name in names if name.startswith("packed@")]
    return targets, [name for name in names if name != "packed" and name not in targets]


def _print_spread(rows: Sequence[Row]) -> None:
    spreads = [timing.spread for row in rows for timing in row.timings.values()]
    print(f"spread of all samples: median {statistics.median(spreads):.0%}, largest {max(spreads):.0%}")


FLAGS = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512_vpopcntdq", "avx512_vbmi", "avx512_vnni", "avx_vnni", "asimd", "sve",
)  # fmt: skip
"""Of a processor, as Linux names them."""


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    has = set(info.read_text().split()) if info.exists() else set()
    return {
        "processor": processor(),
        "flags": [flag for flag in FLAGS if flag in has],
        "flags_absent": [flag for flag in FLAGS[:8] if flag not in has] if platform.machine() == "x86_64" else [],
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (numba, np, torch, onnxruntime)},
    }


def progress(done: int, of: int, what: object) -> None:
    """Show on a terminal what comes next."""
    if sys.stderr.isatty():
        print(f"\r\033[K{done}/{of} {what}", end="" if done < of else "\r\033[K", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for. 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", action="store_true", help="this part; default: both")
    parser.add_argument("--networks", action="store_true", help="this part; default: both")
    parser.add_argument("--experts", type=int, default=1, help="a further network with so many, e.g. 4")
    parser.add_argument("--target", choices=list(TARGETS), action="append", default=[], help="may be repeated")
    parser.add_argument(
        "--compile", choices=["no", "single", "all"], default="single", help="where torch.compile takes part"
    )
    parser.add_argument("--rounds", type=int, default=9, help="samples of each subject (default: 9)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one setting, then 3 samples do (default: 20)")
    parser.add_argument("--quick", action="store_true", help="few layers, one network, few samples, no torch.compile")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    given = parser.parse_args(argv)
    if given.rounds < 1 or given.experts < 1:
        parser.error("--rounds and --experts are at least 1")
    both = given.layers == given.networks
    here = machine()
    print(
        f"{here['processor']}: {' '.join(here['flags'])}; without {' '.join(here['flags_absent']) or 'nothing'}\n"
        f"{here['processors']} processors, load {here['load']:.1f} before the start; Python {here['python']}, "
        f"torch {here['torch']}, ONNX Runtime {here['onnxruntime']}, Numba {here['numba']}"
    )
    settings = [setting for setting in SETTINGS if setting.threads <= usable()]
    for setting in SETTINGS:
        if setting not in settings:
            print(f"left out: {setting}: this process may use fewer processors")
    targets = tuple(OtherTarget(name) for name in dict.fromkeys(given.target))
    rounds, where = (3, "no") if given.quick else (given.rounds, given.compile)
    effort = Effort(rounds, given.seconds, where, targets)
    layers = (quick_layers() if given.quick else all_layers()) if given.layers or both else ()
    networks = all_networks(given.experts)[: 1 if given.quick else None] if given.networks or both else ()
    layer_rows: list[Row] = []
    network_rows: list[Row] = []
    try:
        for at, layer in enumerate(layers):
            progress(at, len(layers), layer)
            layer_rows += time_layer(layer, settings, effort)
        progress(1, 1, "")
        if layer_rows:
            show_layers(layer_rows)
        for at, network in enumerate(networks):
            progress(at, len(networks), network.name)
            network_rows += time_network(network, settings, effort)
        progress(1, 1, "")
        if network_rows:
            show_networks(network_rows)
    finally:
        for target in targets:
            target.close()
    if given.json is not None:
        found = {
            "machine": here,
            "effort": {**asdict(Effort(effort.rounds, effort.seconds, effort.compile)), "targets": given.target},
            "layers": [row.as_json() for row in layer_rows],
            "networks": [row.as_json() for row in network_rows],
        }
        given.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
