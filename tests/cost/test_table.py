import json
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from nasplat.cost import CostTable, Latency, Measurement, Resource
from nasplat.cost.timing import Schedule
from nasplat.errors import InvalidInputError
from nasplat.identity import describe, restore
from nasplat.restorable import restorable
from nasplat.space import FunctionSpace, Group, SearchSpace, space_from
from search_spaces import Bats

QUICK = Schedule(blocks=2, seconds=0.0, patience_s=0.05)
COSTS = {"narrow": 3.0, "wide": 11.0, "off": 0.0}


@dataclass(frozen=True)
class Net(SearchSpace):
    """Two layers, each with a width and a kernel that multiply, a head, and three blocks of which two are on."""

    @property
    def choices(self):
        layers = {f"layer{i}/{what}": (1, 2, 5) for i in range(2) for what in ("width", "kernel")}
        return {**layers, "head": ("s", "m", "l"), **{f"block{i}": ("off", "narrow", "wide") for i in range(3)}}

    @property
    def choice_groups(self):
        return {"blocks": Group(("block0", "block1", "block2"), 2, "off")}

    def interactions(self):
        names = list(self.choices)
        return [tuple(names[:2]), tuple(names[2:4]), *((name,) for name in names[4:])]

    def build(self, architecture):
        raise NotImplementedError


def cost(architecture):
    genes = architecture.genes
    layers = sum((i + 1) * genes[f"layer{i}/width"] * genes[f"layer{i}/kernel"] ** 2 for i in range(2))
    return 100 + layers + {"s": 1, "m": 4, "l": 9}[genes["head"]] + sum(COSTS[genes[f"block{i}"]] for i in range(3))


@pytest.fixture(scope="module")
def table():
    return CostTable.fit(Net(), "macs", cost, np.random.default_rng(0))


def test_a_sum_over_the_terms_is_fitted_exactly(table):
    assert table.error < 1e-9
    for architecture in Net().enumerate():
        assert table.cost(architecture) == pytest.approx(cost(architecture), rel=1e-9)


def test_one_hot_weights_cost_what_the_architecture_costs(table):
    space, rng = Net(), np.random.default_rng(1)
    for architecture in (space.sample(rng) for _ in range(10)):
        assert float(table.expected(space.relax(architecture))) == pytest.approx(cost(architecture), rel=1e-5)


def test_the_expected_cost_is_the_mean_over_draws_of_free_choices(table):
    space, generator = Net(), torch.Generator().manual_seed(0)
    fixed = {"block0": "off", "block1": "narrow", "block2": "wide"}
    relaxed = {
        name: torch.softmax(torch.randn(3, generator=generator), 0)
        if name not in fixed
        else torch.tensor([float(option == fixed[name]) for option in options])
        for name, options in space.choices.items()
    }
    free = [name for name in space.choices if name not in fixed]
    mean = 0.0
    for picked in product(range(3), repeat=len(free)):
        genes = {**fixed, **{name: space.choices[name][at] for name, at in zip(free, picked, strict=True)}}
        share = np.prod([float(relaxed[name][at]) for name, at in zip(free, picked, strict=True)])
        mean += share * cost(space.architecture(genes))
    assert float(table.expected(relaxed)) == pytest.approx(mean, rel=1e-5)


def test_the_expected_cost_has_the_gradient_of_its_finite_differences(table):
    space = Net()
    relaxed = {name: torch.full((3,), 1 / 3, requires_grad=True) for name in space.choices}
    table.expected(relaxed).backward()
    for name in ("layer1/kernel", "head", "block1"):
        for at in range(3):
            moved = {key: weight.detach().clone() for key, weight in relaxed.items()}
            moved[name][at] += 1.0
            # The cost is linear in one choice's weights, so a whole step is exact.
            slope = float((table.expected(moved) - table.expected(relaxed)).detach())
            assert float(relaxed[name].grad[at]) == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_in_a_group_off_and_the_cheapest_option_are_free(table):
    blocks = {names[0]: values for names, values in table.terms if names[0].startswith("block")}
    assert all(values == pytest.approx((0.0, 0.0, 8.0), abs=1e-9) for values in blocks.values())


def test_rare_combinations_are_waited_for():
    options = tuple(range(9))
    space = space_from(lambda genes: nn.Identity(), {"a": options, "b": options, "c": (0, 1)})
    space = Joint(space.function, space.options)
    for seed in range(4):
        costed = []

        def table_cost(architecture, costed=costed):
            costed.append(architecture)
            return 1.0 + 7.0 * ((5 * architecture.genes["a"] + architecture.genes["b"]) % 11) + architecture.genes["c"]

        table = CostTable.fit(space, "x", table_cost, np.random.default_rng(seed))
        assert all(table.cost(a) == pytest.approx(table_cost(a), rel=1e-9) for a in space.enumerate())
        assert len({a.id for a in costed}) <= 82 + 20 + 162  # independent entries, held out, and the check above


@dataclass(frozen=True)
class Joint(FunctionSpace):
    forbidden: int = -1

    def interactions(self):
        return [("a", "b"), ("c",)]

    def is_valid(self, genes):
        return genes["a"] != self.forbidden


def test_what_was_never_seen_is_not_cheap():
    options = tuple(range(4))
    space = Joint(nn.Identity, {"a": options, "b": options, "c": (0, 1)}, forbidden=3)
    table = CostTable.fit(space, "x", lambda a: 10.0 + a.genes["a"] + a.genes["b"], np.random.default_rng(0))
    values = np.array(next(values for names, values in table.terms if names == ("a", "b"))).reshape(4, 4)
    assert (values[3] >= values[:3].max() - 1e-9).all()


def test_what_is_no_sum_shows_in_the_error():
    space = space_from(lambda genes: nn.Identity(), {"a": (1, 2, 3), "b": (1, 2, 3)})
    product_cost = CostTable.fit(space, "x", lambda a: 10.0 ** (a.genes["a"] * a.genes["b"]), np.random.default_rng(0))
    assert product_cost.error > 0.1


def linear(genes):
    layers = [nn.Flatten(), nn.Linear(4, genes["width"]), nn.Linear(genes["width"], 4)]
    return nn.Sequential(*layers, *(nn.Linear(4, 4) for _ in range(genes["depth"])))


def test_counted_table_of_a_space_equals_the_counts():
    space = space_from(linear, {"width": (2, 5, 9), "depth": (0, 1, 3)})
    state = torch.get_rng_state()
    table = CostTable.counted(space, torch.zeros(1, 4), "params")
    assert torch.equal(torch.get_rng_state(), state)
    assert table.error < 1e-9
    for architecture in space.enumerate():
        parameters = sum(p.numel() for p in space.build(architecture).parameters())
        assert table.cost(architecture) == pytest.approx(parameters, rel=1e-9)


@dataclass(frozen=True)
class NoisyMeter:
    """Milliseconds that are the number of layers, and noise."""

    trained = False
    metrics = ("latency_ms",)

    def measure(self, model, example, bench):
        assert not model.training
        noise = torch.randn((), generator=NOISE).item()
        return Measurement({"latency_ms": 10.0 * len(list(model)) + noise})


NOISE = torch.Generator().manual_seed(0)


@pytest.mark.slow
def test_measured_table_averages_the_noise_of_the_meter():
    space = space_from(linear, {"width": (2, 5, 9), "depth": (0, 1, 3)})
    few, many = (
        CostTable.measured(space, torch.zeros(1, 4), NoisyMeter(), oversampling=factor) for factor in (1.0, 100.0)
    )
    for architecture in space.enumerate():
        assert many.cost(architecture) == pytest.approx(10.0 * (3 + architecture.genes["depth"]), abs=0.5)
    assert 0 < few.error < 0.3
    latency = CostTable.measured(space, torch.zeros(1, 4), Latency(schedule=QUICK), oversampling=1.0)
    assert latency.metric == "latency_ms" and latency.constant > 0


def test_files_and_descriptions_come_back_equal(table, tmp_path):
    assert CostTable.load(table.save(tmp_path / "new" / "table.json")) == table
    assert restore(json.loads(json.dumps(describe(table))), restorable()) == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a cost table"),
        ("{", "not a cost table"),
        ('{"nasplat_cost_table": 7}', "version 7; legal: 1, 2"),
        ('{"nasplat_cost_table": 1, "metric": "x"}', "not a cost table"),
    ],
)
def test_bad_files_say_so(tmp_path, text, message):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=message):
        CostTable.load(path)


def test_bad_use_says_what_is_legal(table):
    with pytest.raises(InvalidInputError, match=r"the term \('head',\) has 2 values"):
        replace(table, terms=((("head",), (1.0, 2.0)),))
    with pytest.raises(InvalidInputError, match="has no costs for"):
        table.cost(Bats.small().paper_genes())
    with pytest.raises(InvalidInputError, match="does not give 'speed'; legal: params, macs"):
        CostTable.counted(Net(), torch.zeros(1, 1), "speed")
    with pytest.raises(InvalidInputError, match="no finite cost"):
        CostTable.fit(Net(), "macs", lambda a: float("nan"), np.random.default_rng(0))
    with pytest.raises(InvalidInputError, match="target is 0"):
        Resource(table, 0)
    with pytest.raises(InvalidInputError, match="legal: 'log', 'hinge'"):
        Resource(table, 1, form="square")


def test_resource_term(table):
    space = Net()
    relaxed = space.relax(space.sample(np.random.default_rng(0)))
    expected = float(table.expected(relaxed))
    log = Resource(table, expected / 2, weight=0.3)
    assert float(log.loss(relaxed)) == pytest.approx(0.3 * np.log(2), rel=1e-5)
    assert float(Resource(table, expected / 2, 0.3, "hinge").loss(relaxed)) == pytest.approx(0.3, rel=1e-5)
    assert float(Resource(table, expected * 2, 0.3, "hinge").loss(relaxed)) == 0.0
