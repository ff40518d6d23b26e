"""What every search space owes, as tests.

Subclass, say which space, and pytest collects the rest.

Example::

    class TestMySpace(SpaceContract):
        @pytest.fixture
        def space(self):
            return MySpace(classes=10)

        @pytest.fixture
        def example(self):
            return torch.randn(4, 1, 16, 16)
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.errors import ArchitectureError, UnsupportedError
from nasplat.nn import set_binarisation
from nasplat.ranges import Range
from nasplat.space import SearchSpace, Supernet

# Rebuilds the space from its fields, so that nothing computed in the first process comes along.
_OTHER_PROCESS = """
import dataclasses, json, pickle, sys
import numpy as np
space = dataclasses.replace(pickle.load(sys.stdin.buffer))
rng = np.random.default_rng(7)
print(json.dumps([space.identity, list(space.choices), [space.sample(rng).id for _ in range(5)]]))
"""


class SpaceContract:
    """Tests of one space. Give the fixtures ``space`` and ``example``; the attributes are for special cases.

    Attributes:
        samples: Architectures drawn where a law is tested on samples.
        builds: Architectures that are built and run.
        classes: Expected width of the output; None takes ``space.classes`` where it has one.
        silent_options: Options that compute nothing, and so give their weight in a supernet no gradient, besides the
            ``off`` option of groups.
        idle_parameters: Regular expressions of parameters that a loss on the output need not reach.
        path_binarisation: What is binary in the supernet (arguments of ``nasplat.nn.set_binarisation``), where that
            differs from the built network. Networks without binary layers are left alone.
        tolerance: Largest difference between the built network and the supernet's path, absolute and relative.
    """

    samples: int = 20
    builds: int = 3
    classes: int | None = None
    silent_options: Collection[Any] = ()
    idle_parameters: Collection[str] = ()
    path_binarisation: Mapping[str, bool] = MappingProxyType({"weights": False})
    tolerance: float = 1e-4

    @pytest.fixture
    def space(self) -> SearchSpace:
        """The space under test."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture `space`")

    @pytest.fixture
    def example(self) -> Tensor:
        """A batch of at least two inputs, shape ``(n, ...)``."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture `example`")

    def neutralise(self, supernet: Supernet) -> None:
        """Make what a supernet has and a built network lacks do nothing, in evaluation mode. Default: there is none.

        For instance the normalisation that follows a pool in the supernet of DARTS alone.
        """

    def draw(self, space: SearchSpace, n: int, seed: int = 0) -> list[Architecture]:
        """``n`` samples of the space."""
        rng = np.random.default_rng(seed)
        return [space.sample(rng) for _ in range(n)]

    # Data.

    def test_choices_are_ordered_json(self, space: SearchSpace) -> None:
        """Names are legal MLflow keys, options are different JSON scalars, and the order is always the same."""
        assert space.choices, "a space needs a choice"
        for name, options in space.choices.items():
            assert re.fullmatch(r"[A-Za-z0-9_\-./]+", name), f"{name!r}: letters, digits and _ - . / only"
            assert len(options) > 0, f"{name!r} has no options"
            for option in options:
                assert type(option) in (str, int, float, bool), f"{name!r}: {option!r} is not a JSON scalar"
            assert json.loads(json.dumps(list(options))) == list(options), f"{name!r}: options change in JSON"
            assert len(set(options)) == len(options), f"{name!r}: options are not all different"
        first = [(name, tuple(options)) for name, options in space.choices.items()]
        for again in (space, _fresh(space)):
            assert [(name, tuple(options)) for name, options in again.choices.items()] == first, "choices changed"

    def test_space_survives_pickle(self, space: SearchSpace) -> None:
        """A pickled space is an equal space, with the same identity."""
        copy = pickle.loads(pickle.dumps(space))
        assert copy.identity == space.identity, "a pickled space has another identity"
        assert _fresh(copy).identity == space.identity, "identity must follow from the fields"
        assert list(copy.choices) == list(space.choices), "a pickled space has other choices"

    def test_architecture_survives_json_and_pickle(self, space: SearchSpace) -> None:
        """An architecture read back is equal, and its genes are legal."""
        for architecture in self.draw(space, self.samples):
            for copy in (
                Architecture.from_json(architecture.to_json()),
                pickle.loads(pickle.dumps(architecture)),
                space.architecture(architecture.genes),
            ):
                assert copy == architecture, f"{copy} was {architecture}"
                assert dict(copy.genes) == dict(architecture.genes), f"{copy.genes} were {architecture.genes}"
            assert space.owns(architecture), "a space does not know its own sample"

    def test_same_id_in_another_process(self, space: SearchSpace) -> None:
        """Identity, order of choices and samples do not depend on the process or its hash seed."""
        rng = np.random.default_rng(7)
        here = [space.identity, list(space.choices), [space.sample(rng).id for _ in range(5)]]
        seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
        path = os.pathsep.join(entry or "." for entry in sys.path)
        done = subprocess.run(
            [sys.executable, "-c", _OTHER_PROCESS],
            input=pickle.dumps(space),
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
        )
        assert done.returncode == 0, f"the space cannot be used in another process:\n{done.stderr.decode()}"
        there = json.loads(done.stdout)
        assert there == here, f"identity, choices or samples differ in another process: {there} against {here}"

    # Verbs.

    def test_sampling_depends_on_rng_only(self, space: SearchSpace) -> None:
        """Equal generators give equal samples, whatever the global generators do, and those are not touched."""
        first = self.draw(space, self.samples)
        random.random(), torch.rand(1), np.random.rand()  # noqa: NPY002
        assert self.draw(space, self.samples) == first, "sampling depends on more than its rng"
        if space.size() > 1:
            assert len({architecture.id for architecture in first}) > 1, "samples are all the same"
        rng = np.random.default_rng(3)
        with _untouched_generators("sample, mutate or crossover"):
            a, b = space.sample(rng), space.sample(rng)
            if _mutable(space, a):
                space.mutate(a, rng)
            space.crossover(a, b, rng)

    def test_mutants_are_valid_neighbours(self, space: SearchSpace) -> None:
        """A mutant is legal, not its parent, and one of its parent's neighbours; equal generators, equal mutants."""
        rng = np.random.default_rng(1)
        for parent in self.draw(space, self.samples):
            neighbours = space.neighbours(parent)
            assert parent not in neighbours, "an architecture is its own neighbour"
            assert len(set(neighbours)) == len(neighbours), "a neighbour is listed twice"
            assert neighbours == space.neighbours(parent), "neighbours have no fixed order"
            if not _mutable(space, parent):
                continue
            for _ in range(5):
                child = space.mutate(parent, rng)
                assert child != parent, "a mutant equals its parent"
                assert child in neighbours, "a mutant is not among the neighbours"
                assert space.architecture(child.genes) == child, "a child is not what its genes say"
            twins = [space.mutate(parent, np.random.default_rng(2)) for _ in range(2)]
            assert twins[0] == twins[1], "mutation depends on more than its rng"

    def test_crossover_takes_from_parents_only(self, space: SearchSpace) -> None:
        """A child is legal and each of its genes is one of the parents'."""
        rng = np.random.default_rng(1)
        for a, b in pairwise(self.draw(space, self.samples)):
            child = space.crossover(a, b, rng)
            assert space.architecture(child.genes) == child, "a child is not what its genes say"
            for name, option in child.genes.items():
                assert option in (a.genes[name], b.genes[name]), f"{name!r} comes from neither parent"
            assert space.crossover(a, a, rng) == a, "an architecture crossed with itself changes"

    def test_groups_keep_their_rule(self, space: SearchSpace) -> None:
        """Just ``pick`` choices of a group are on, after every verb, and other numbers are refused."""
        if not space.choice_groups:
            return
        rng = np.random.default_rng(5)
        a, b = self.draw(space, 2)
        made = [*self.draw(space, self.samples), space.crossover(a, b, rng), *space.neighbours(a)]
        for group in space.choice_groups.values():
            for architecture in made:
                on = [name for name in group.names if architecture.genes[name] != group.off]
                assert len(on) == group.pick, f"{len(on)} of {group.names} are on, not {group.pick}"
            with pytest.raises(ArchitectureError):
                space.architecture({**a.genes, **dict.fromkeys(group.names, group.off)})

    def test_errors_list_what_is_legal(self, space: SearchSpace) -> None:
        """Wrong genes raise an ArchitectureError that names the choice and lists its options."""
        genes = dict(self.draw(space, 1)[0].genes)
        for name, options in space.choices.items():
            with pytest.raises(ArchitectureError) as caught:
                space.architecture({**genes, name: "no such option"})
            for part in (name, *([repr(options)] if isinstance(options, Range) else map(repr, options))):
                assert part in str(caught.value), f"the error about {name!r} does not mention {part}"
            with pytest.raises(ArchitectureError, match=re.escape(name)):
                space.architecture({key: gene for key, gene in genes.items() if key != name})
        with pytest.raises(ArchitectureError, match="no such choice"):
            space.architecture({**genes, "no such choice": 0})

    def test_encoding_tells_architectures_apart(self, space: SearchSpace) -> None:
        """Encodings are float vectors of one length, equal just for equal architectures."""
        architectures = list(dict.fromkeys(self.draw(space, self.samples)))
        codes = [space.encode(architecture) for architecture in architectures]
        kinds = {(code.shape, code.dtype.name) for code in codes}
        assert len(kinds) == 1, f"encodings differ in shape or type: {kinds}"
        assert codes[0].ndim == 1, f"an encoding has shape {codes[0].shape}, not one dimension"
        assert np.issubdtype(codes[0].dtype, np.floating), f"encodings are {codes[0].dtype}, not floating point"
        assert all(np.isfinite(code).all() for code in codes), "an encoding is not finite"
        assert len({code.tobytes() for code in codes}) == len(codes), "two architectures have one encoding"

    def test_size_counts_what_enumerate_lists(self, space: SearchSpace) -> None:
        """A small space lists each architecture once, and has as many as it says."""
        if space.size() > 2000:
            return
        listed = [architecture.id for architecture in space.enumerate()]
        assert len(set(listed)) == len(listed), "an architecture is listed twice"
        if type(space).is_valid is SearchSpace.is_valid:
            assert len(listed) == space.size(), f"{len(listed)} listed, size says {space.size()}"
        assert len(listed) <= space.size(), f"{len(listed)} listed, size says {space.size()}"
        drawn = {architecture.id for architecture in self.draw(space, self.samples)}
        assert drawn <= set(listed), "a sample is not listed"

    def test_relaxed_one_hot_is_the_architecture(self, space: SearchSpace) -> None:
        """``discretise`` undoes ``relax``."""
        for architecture in self.draw(space, self.samples):
            relaxed = space.relax(architecture)
            lengths = {name: len(options) for name, options in space.choices.items()}
            assert {name: len(weights) for name, weights in relaxed.items()} == lengths, "not a weight per option"
            assert space.discretise(relaxed) == architecture, "discretise does not undo relax"

    # Networks.

    def test_build_depends_on_torch_seed_only(self, space: SearchSpace, example: Tensor) -> None:
        """Equal torch seeds give equal weights, in networks that share nothing; the architecture is not changed."""
        for architecture in self.draw(space, self.builds):
            genes = dict(architecture.genes)
            random.random(), np.random.rand()  # noqa: NPY002
            one, two = _run_build(space, architecture, example), _run_build(space, architecture, example)
            states = one.state_dict(), two.state_dict()
            assert list(states[0]) == list(states[1]), "two builds have different tensors"
            for name, tensor in states[0].items():
                assert torch.equal(tensor, states[1][name]), f"{name} differs between two builds under one seed"
                if tensor.numel():
                    assert tensor.data_ptr() != states[1][name].data_ptr(), f"{name} is shared by two builds"
            assert dict(architecture.genes) == genes, "build changed its architecture"

    def test_network_is_differentiable(self, space: SearchSpace, example: Tensor) -> None:
        """Logits are ``(n, classes)`` and finite, and every parameter gets a finite gradient."""
        classes = self.classes if self.classes is not None else getattr(space, "classes", None)
        for architecture in self.draw(space, self.builds):
            model = _run_build(space, architecture, example).train()
            logits = model(example)
            assert logits.ndim == 2, f"logits have shape {tuple(logits.shape)}, not (n, classes)"
            assert logits.shape[0] == example.shape[0], f"{logits.shape[0]} rows for {example.shape[0]} examples"
            assert classes is None or logits.shape[1] == classes, f"{logits.shape[1]} logits for {classes} classes"
            assert torch.isfinite(logits).all(), "logits are not finite"
            torch.autograd.backward(_loss(logits, *getattr(model, "auxiliary", ())))
            self._check_gradients(model, f"the network of {dict(architecture.genes)}")

    def test_supernet_reaches_every_option(self, space: SearchSpace, example: Tensor) -> None:
        """With all weights positive, every parameter and the weight of every option gets a gradient."""
        supernet = _supernet(space)
        silent = {*self.silent_options, *(group.off for group in space.choice_groups.values())}
        generator = torch.Generator().manual_seed(0)
        relaxed = {
            name: torch.softmax(torch.randn(len(options), generator=generator), 0).requires_grad_()
            for name, options in space.choices.items()
        }
        torch.autograd.backward(_loss(supernet.train()(example, relaxed)))
        self._check_gradients(supernet, "the supernet")
        for name, options in space.choices.items():
            for index, option in enumerate(options):
                if option in silent:
                    continue
                gradient = relaxed[name].grad
                assert gradient is not None, f"the weights of {name!r} get no gradient"
                value = float(gradient[index])
                assert np.isfinite(value), f"{name!r}: the gradient of {option!r} is {value}"
                assert value != 0, f"{name!r}: {option!r} has no effect"

    def test_one_hot_supernet_agrees_with_build(self, space: SearchSpace, example: Tensor) -> None:
        """A path of the supernet is the built network with inherited weights, and nothing else is computed."""
        supernet = _supernet(space)
        even = {name: torch.full((len(options),), 1 / len(options)) for name, options in space.choices.items()}
        with torch.no_grad():
            # Running statistics of normalisations away from their first values.
            supernet.train()(example, even)
        self.neutralise(supernet)
        for architecture in self.draw(space, self.builds):
            model = _run_build(space, architecture, example)
            space.inherit(model, None, supernet.state_dict())
            set_binarisation(model, **self.path_binarisation)
            relaxed = space.relax(architecture)
            with torch.no_grad():
                built = model.eval()(example)
            supernet.eval().zero_grad(set_to_none=True)
            path = supernet(example, relaxed)
            torch.testing.assert_close(path.detach(), built, rtol=self.tolerance, atol=self.tolerance)
            torch.autograd.backward(_loss(path))
            held = sum(parameter.numel() for parameter in model.parameters())
            touched = {
                name: int(parameter.grad.count_nonzero())
                for name, parameter in supernet.named_parameters()
                if parameter.grad is not None
            }
            used = sum(touched.values())
            assert used <= held, f"{used} weights get a gradient on a path of {held}: options of weight 0 are computed"

    def test_supernet_keeps_what_it_is_told(self, space: SearchSpace, example: Tensor) -> None:
        """A supernet of the options of two architectures is no larger than the whole one, and runs both."""
        whole = _supernet(space)
        pair = self.draw(space, 2)
        keep = {name: tuple(dict.fromkeys(a.genes[name] for a in pair)) for name in space.choices}
        try:
            part = space.supernet(keep=keep)
        except UnsupportedError as error:
            pytest.skip(f"supernet(keep=...): {error}")
        sizes = [sum(p.numel() for p in supernet.parameters()) for supernet in (part, whole)]
        assert sizes[0] <= sizes[1], f"{sizes[0]} parameters with fewer options, {sizes[1]} with all"
        for architecture in pair:
            with torch.no_grad():
                logits = part(example, space.relax(architecture))
            assert torch.isfinite(logits).all(), "logits are not finite"

    def _check_gradients(self, model: nn.Module, what: str) -> None:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or any(re.search(pattern, name) for pattern in self.idle_parameters):
                continue
            assert parameter.grad is not None, f"{what}: {name} gets no gradient"
            assert torch.isfinite(parameter.grad).all(), f"{what}: the gradient of {name} is not finite"


def _fresh(space: SearchSpace) -> SearchSpace:
    # Fields only: without what a cached property has stored in the instance.
    assert is_dataclass(space), f"{type(space).__name__} is not a dataclass"
    return replace(space)


def _mutable(space: SearchSpace, architecture: Architecture) -> bool:
    return bool(space.neighbours(architecture))


@contextmanager
def _untouched_generators(what: str) -> Iterator[None]:
    states: dict[str, Callable[[], bytes]] = {
        "random": lambda: pickle.dumps(random.getstate()),
        "numpy.random": lambda: pickle.dumps(np.random.get_state()),  # noqa: NPY002
        "torch": lambda: torch.get_rng_state().numpy().tobytes(),
    }
    before = {name: state() for name, state in states.items()}
    yield
    for name, state in states.items():
        assert state() == before[name], f"{what} uses the global generator of {name}"


def _run_build(space: SearchSpace, architecture: Architecture, example: Tensor) -> nn.Module:
    """A network built and, for the sake of lazy layers, run once, under one torch seed."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(11)
        model = space.build(architecture).eval()
        model(example)
    return model


def _supernet(space: SearchSpace) -> Supernet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        try:
            return space.supernet()
        except UnsupportedError as error:
            pytest.skip(str(error))


def _loss(*outputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(17)
    total = torch.zeros(())
    for logits in outputs:
        labels = torch.randint(logits.shape[1], (logits.shape[0],), generator=generator)
        total = total + nn.functional.cross_entropy(logits, labels)
    return total
