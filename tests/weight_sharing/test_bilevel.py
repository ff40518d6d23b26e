import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from nasplat.cost import CostTable, Resource
from nasplat.errors import InvalidInputError, NonFiniteError, UnsupportedError
from nasplat.space import Group, SearchSpace, Supernet
from nasplat.task import Task
from nasplat.testing.landscapes import TinyCell
from nasplat.testing.strategy_contract import ExplorerContract, RecordingContext, assert_same, explore
from nasplat.weight_sharing import bilevel
from nasplat.weight_sharing.bilevel import Bilevel, Moment, Stage
from nasplat.weight_sharing.eigenvalue import EigenvalueStop
from search_spaces import Bats, DartsCell
from strategies import BatsSearch, Darts

OPTIONS = ("off", "a", "b", "c")


@dataclass(frozen=True)
class Row(SearchSpace):
    """A row of layers that are all alike: two edges of which one is on, and an activation; two kinds from 3 layers."""

    cells: int = 1

    @property
    def choices(self):
        own = {"edge0": OPTIONS, "edge1": OPTIONS, "activation": ("relu", "tanh", "none")}
        return {**own, "late": (False, True)} if self.cells >= 3 else own

    @property
    def choice_groups(self):
        return {"edges": Group(("edge0", "edge1"), 1, "off")}

    def build(self, architecture):
        raise NotImplementedError

    def supernet(self, keep=None, partial=1):
        if partial not in (1, 2, 4):
            raise InvalidInputError(f"partial is {partial}; legal: 1, 2, 4")
        return RowSupernet(self.cells, self.alive(keep), keep is not None, partial)


class RowSupernet(Supernet):
    made: list = []  # noqa: RUF012

    def __init__(self, cells, alive, kept, partial):
        super().__init__()
        self.asked = {"cells": cells, "alive": alive, "kept": kept, "partial": partial}
        self.head = torch.nn.Linear(64, 10)
        self.relaxed = []
        self.made.append(self)

    def forward(self, x, relaxed):
        self.relaxed.append({name: weights.detach().clone() for name, weights in relaxed.items()})
        scale = sum(relaxed["edge0"] * torch.arange(4)) + sum(relaxed["edge1"]) + sum(relaxed["activation"][:2])
        return scale * self.head(x.flatten(1))


@pytest.fixture
def made():
    """The supernets that were made, in order."""
    RowSupernet.made = []
    return RowSupernet.made


@dataclass(frozen=True)
class Fixed(Bilevel):
    """Starts from given alphas and hardly moves them."""

    epochs: int = 1
    batch_size: int = 16
    alpha_lr: float = 1e-12
    alpha_weight_decay: float = 0.0
    alphas: tuple = ()

    def initial(self, moment, rng):
        whole = dict(self.alphas)
        return {
            name: torch.tensor([whole[name][moment.space.choices[name].index(option)] for option in options])
            for name, options in moment.alive.items()
        }


ALPHAS = (
    ("edge0", (3.0, 0.1, 0.3, 0.2)),
    ("edge1", (0.0, 2.0, 1.0, 3.0)),
    ("activation", (0.0, 1.0, 2.0)),
)


def tiny():
    return Task.digits(limit=32)


# Stages.


def test_stages_have_their_depth_options_and_share_of_channels(made):
    stages = (Stage(), Stage(cells=2, options=3), Stage(options=2, partial=4))
    context, reports = RecordingContext(), []
    found = explore(Fixed(alphas=ALPHAS, stages=stages, epochs=2, partial=2), Row(), tiny(), context, reports)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    first, second, third = [net for net in made if net.relaxed]
    assert first.asked == {"cells": 1, "alive": Row().alive(None), "kept": False, "partial": 2}
    assert second.asked == {
        "cells": 2,
        "alive": {"edge0": ("off", "b", "c"), "edge1": ("a", "b", "c"), "activation": ("relu", "tanh", "none")},
        "kept": True,
        "partial": 2,
    }
    assert third.asked == {
        "cells": 1,
        "alive": {"edge0": ("off", "b"), "edge1": ("a", "c"), "activation": ("tanh", "none")},
        "kept": True,
        "partial": 4,
    }
    # Dropped options weigh exactly 0, in their places; the others are a softmax of what is left.
    weights = third.relaxed[-1]
    off, _, option, _ = torch.softmax(torch.tensor([3.0, -math.inf, 0.3, -math.inf]), 0).tolist()
    assert weights["edge0"].tolist() == pytest.approx([off, 0.0, option, 0.0])
    assert weights["edge0"][[1, 3]].tolist() == [0.0, 0.0]
    assert weights["edge1"][[0, 2]].tolist() == [0.0, 0.0]
    assert all(float(share.sum()) == pytest.approx(1.0) for share in weights.values())
    # Of the original space; the group's only member that is on is the stronger.
    assert [Row().owns(architecture) for architecture in found] == [True]
    assert found[0].genes == {"edge0": "off", "edge1": "c", "activation": "none"}
    assert_same(context.kept, dict(third.state_dict()))


def test_a_member_of_a_group_keeps_an_option_that_is_on(made):
    """``off`` is the strongest by far, and still one other option of each edge is left to be found."""
    alphas = (("edge0", (9.0, 0.1, 0.3, 0.2)), ("edge1", (9.0, 0.0, 0.0, 0.1)), ALPHAS[2])
    explorer = Fixed(alphas=alphas, stages=(Stage(), Stage(options=2)))
    found = explore(explorer, Row(), tiny(), RecordingContext())
    assert made[-1].asked["alive"]["edge0"] == ("off", "b")
    assert made[-1].asked["alive"]["edge1"] == ("off", "c")
    assert found[0].genes["edge0"] == "b"
    assert found[0].genes["edge1"] == "off"


def test_a_dropped_option_is_not_found_where_the_alive_one_weighs_nothing():
    """At a low temperature a weight underflows to 0, which is the weight of a dropped option, too."""

    @dataclass(frozen=True)
    class Cold(Fixed):
        def mixture(self, parameters, moment):
            mixture = super().mixture(parameters, moment)
            cold = {name: torch.tensor([1.0, 0.0]) for name in ("edge0", "edge1") if len(moment.alive[name]) == 2}
            return {**mixture, **cold}

    alphas = (("edge0", (9.0, 0.1, 0.3, 0.2)), ("edge1", (9.0, 0.0, 0.0, 0.1)), ALPHAS[2])
    found = explore(Cold(alphas=alphas, stages=(Stage(), Stage(options=2))), Row(), tiny(), RecordingContext())
    assert (found[0].genes["edge0"], found[0].genes["edge1"]) == ("b", "off")


def test_as_many_options_as_there_are_are_all_kept(made):
    explore(Fixed(alphas=ALPHAS, stages=(Stage(), Stage(options=9))), Row(), tiny(), RecordingContext())
    assert [net.asked["kept"] for net in made if net.relaxed] == [False, False]


def test_each_stage_begins_anew(made):
    explorer = Darts(epochs=2, batch_size=16, alpha_lr=0.5, stages=(Stage(), Stage()))
    explore(explorer, Row(), tiny(), RecordingContext())
    first, second = [net for net in made if net.relaxed]
    assert not torch.equal(first.head.weight, second.head.weight)
    moved, begun = first.relaxed[-1]["edge0"], second.relaxed[0]["edge0"]
    assert (moved - 0.25).abs().max() > 0.05
    assert 0 < (begun - 0.25).abs().max() < 3e-3
    assert not torch.equal(first.relaxed[0]["edge0"], begun)


def test_told_to_end_it_answers_from_the_stage_that_it_is_in(made):
    explorer = Fixed(alphas=ALPHAS, stages=(Stage(), Stage(options=2)))
    found = explore(explorer, Row(), tiny(), RecordingContext(), stop_after=1)
    assert len([net for net in made if net.relaxed]) == 1
    assert found[0].genes["edge1"] == "c"


@pytest.mark.parametrize(
    ("space", "stage", "error", "words"),
    [
        (TinyCell(), Stage(cells=3), UnsupportedError, "TinyCell has no field 'cells'.*3 of them.*cells=None"),
        (TinyCell(), Stage(options=2), UnsupportedError, "TinyCell has a whole supernet only"),
        (Row(), Stage(cells=3), UnsupportedError, "Row with cells=3 has other choices"),
        (Row(), Stage(partial=3), InvalidInputError, "partial is 3; legal: 1, 2, 4"),
        (DartsCell.small(), Stage(cells=1), UnsupportedError, "cells=1 has other choices.*every kind of cell"),
        (Bats.small(), Stage(partial=8), InvalidInputError, "partial is 8; legal: 1, 2, 4"),
    ],
)
def test_what_a_later_stage_cannot_have_is_refused_before_the_first(space, stage, error, words):
    context = RecordingContext()
    with pytest.raises(error, match=words):
        explore(Darts(epochs=1, stages=(Stage(), stage)), space, tiny(), context)
    assert context.steps == 0


def test_trying_the_later_stages_draws_nothing_from_the_run():
    """The first stage is what it is alone."""
    runs = []
    for stages in ((), (Stage(), Stage(cells=2, options=2))):
        reports = []
        explore(Darts(epochs=2, batch_size=8, stages=stages), Row(), tiny(), RecordingContext(), reports, 2)
        runs.append([report.metrics["train_loss"] for report in reports])
    # But for the seed of the architecture parameters, drawn with those of the data.
    assert runs[0] == pytest.approx(runs[1], rel=1e-2)


# Early stop.


def rising(monkeypatch, values):
    """Make the eigenvalue these numbers, one after the other."""
    series = iter(values)
    monkeypatch.setattr(bilevel, "dominant_eigenvalue", lambda loss, parameters, step: next(series))


@dataclass(frozen=True)
class Watched(Darts):
    """Reports its first alpha."""

    def metrics(self, run):
        return {"watched": float(run.parameters["edge0"][0])}


def found_share(context, name="edge0"):
    """The architecture parameters of the last state."""
    return float(context.load()["parameters"][name][0])


RULE = EigenvalueStop(every=1, window=1, lag=1, not_before=1)


def test_goes_back_to_the_earlier_record(monkeypatch):
    rising(monkeypatch, [1.0, 1.0, 1.1, 2.0])
    context, reports = RecordingContext(), []
    explorer = Watched(epochs=9, batch_size=16, alpha_lr=0.5, early_stop=RULE)
    explore(explorer, Row(), tiny(), context, reports)
    assert [report.metrics["alpha_eigenvalue"] for report in reports] == [1.0, 1.0, 1.1, 2.0]
    watched = [report.metrics["watched"] for report in reports]
    assert len(set(watched)) == 4
    assert found_share(context) == watched[2]
    assert context.load()["stopped"] is True


def test_what_it_found_is_that_of_the_earlier_record(monkeypatch):
    """The alphas are pushed away from an option in the last epoch, which does not count."""

    @dataclass(frozen=True)
    class Pushed(Fixed):
        alpha_lr: float = 5.0

        def architecture_gradient(self, run, train, validation):
            away = 1.0 * (run.moment.epoch == 2)
            return torch.zeros(()), [torch.tensor([0.0, 0.0, 0.0, away][: len(p)]) for p in run.parameters.values()]

    rising(monkeypatch, [1.0, 2.0])
    explorer = Pushed(alphas=ALPHAS, epochs=2, early_stop=RULE)
    stopped = explore(explorer, Row(), tiny(), RecordingContext())
    assert stopped != explore(replace(explorer, early_stop=None), Row(), tiny(), RecordingContext())
    assert stopped == explore(replace(explorer, early_stop=None, epochs=1), Row(), tiny(), RecordingContext())


def test_an_early_stop_ends_the_stage_and_not_the_search(monkeypatch, made):
    rising(monkeypatch, [1.0, 2.0, 1.0, 1.0, 1.0])
    reports = []
    explorer = Watched(epochs=3, batch_size=16, early_stop=RULE, stages=(Stage(), Stage(options=2)))
    explore(explorer, Row(), tiny(), RecordingContext(), reports)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]
    assert len([net for net in made if net.relaxed]) == 2


def test_the_warm_up_is_not_recorded(monkeypatch):
    """Its architecture parameters have not moved, so they are nothing to go back to."""
    rising(monkeypatch, [1.0, 2.0])
    context, reports = RecordingContext(), []
    explorer = Watched(epochs=9, warmup=3, batch_size=16, alpha_lr=0.5, early_stop=RULE)
    explore(explorer, Row(), tiny(), context, reports)
    assert ["alpha_eigenvalue" in report.metrics for report in reports] == [False] * 3 + [True] * 2
    assert found_share(context) == reports[3].metrics["watched"]


def test_looking_changes_nothing():
    """Random numbers, batch norms and architecture parameters are as if nobody had looked."""
    runs = []
    never = EigenvalueStop(every=2, factor=1e9)
    for rule in (None, never):
        context, reports = RecordingContext(), []
        explorer = Darts(epochs=4, batch_size=16, alpha_lr=0.1, early_stop=rule)
        explore(explorer, TinyCell(), Task.digits(limit=64), context, reports)
        state = context.load()
        del state["records"]
        runs.append((state, [dict(report.metrics) for report in reports]))
    looks = [metrics.pop("alpha_eigenvalue", None) for metrics in runs[1][1]]
    assert [look is None for look in looks] == [True, False, True, False]
    assert runs[0][1] == runs[1][1]
    assert_same(runs[0][0], runs[1][0])


def test_looks_at_the_same_drawn_examples_each_time(monkeypatch):
    """Data may come class by class, so the first examples are no sample of them."""
    seen = []

    def look(loss, parameters, step):
        seen.append(None)
        loss()
        return 1.0

    original = Task.compute_loss

    def compute_loss(self, outputs, y):
        if seen and seen[-1] is None:
            seen[-1] = y.clone()
        return original(self, outputs, y)

    monkeypatch.setattr(bilevel, "dominant_eigenvalue", look)
    monkeypatch.setattr(Task, "compute_loss", compute_loss)
    task = Task.from_tensors(torch.randn(200, 1, 8, 8), torch.arange(200) // 20)
    rule = EigenvalueStop(every=1, batch_size=32)
    explore(Darts(epochs=3, batch_size=16, early_stop=rule), Row(), task, RecordingContext())
    assert [len(labels) for labels in seen] == [32, 32, 32]
    assert all(torch.equal(labels, seen[0]) for labels in seen)
    assert len(set(seen[0].tolist())) > 5


def test_an_eigenvalue_that_is_not_finite_fails_by_name(monkeypatch):
    rising(monkeypatch, [math.nan])
    with pytest.raises(NonFiniteError, match="epoch 1: alpha_eigenvalue is nan"):
        explore(Darts(epochs=1, early_stop=RULE), Row(), tiny(), RecordingContext())


# Resuming to the last bit: killed at every save, also at the border of two stages and where a stage ended early.


@pytest.fixture
def sharpens(monkeypatch):
    """The eigenvalue is computed, and what the rule sees grows with the architecture parameters."""
    real = bilevel.dominant_eigenvalue

    def look(loss, parameters, step):
        assert math.isfinite(real(loss, parameters, step))
        return 1.0 + 1e6 * sum(float(parameter.detach().square().sum()) for parameter in parameters)

    monkeypatch.setattr(bilevel, "dominant_eigenvalue", look)


class TestStagesContract(ExplorerContract):
    """Second order; each of the two stages ends an epoch early."""

    epochs = 6

    @pytest.fixture
    def explorer(self, sharpens):
        return Darts(
            epochs=4,
            warmup=1,
            batch_size=8,
            order="second",
            alpha_lr=0.1,
            early_stop=replace(RULE, not_before=2),
            stages=(Stage(), Stage(cells=2, options=2, partial=2)),
        )

    @pytest.fixture
    def space(self):
        return Row()

    @pytest.fixture
    def task(self):
        return tiny()


@pytest.mark.parametrize(
    ("explorer", "space"),
    [
        pytest.param(Darts(epochs=1, order="second", batch_size=16), DartsCell.small(), marks=pytest.mark.slow),
        (BatsSearch(epochs=1, warmup=0, batch_size=16), Bats.small()),
    ],
    ids=["second order in the DARTS cell", "BATS"],
)
def test_resumed_from_3_cells_to_5_and_from_8_options_to_4(explorer, space):
    """A step an epoch: killed after each, and at the border."""
    explorer = replace(explorer, stages=(Stage(cells=3), Stage(cells=5, options=4)))
    ExplorerContract().test_resumed_is_uninterrupted(explorer, space, Task.digits(limit=20), kill_before_saving=False)


# Metrics.


def test_expected_cost_and_what_a_member_adds_are_reported():
    space = Row()
    table = CostTable.fit(space, "params", lambda a: 10.0 * OPTIONS.index(a.genes["edge0"]), np.random.default_rng(0))
    reports = []
    explorer = Watched(epochs=1, batch_size=16, resource=Resource(table, 1.0))
    explore(explorer, space, tiny(), RecordingContext(), reports)
    assert reports[0].metrics.keys() == {
        "train_loss", "alpha_loss", "mean_max_weight", "expected_params", "watched"
    }  # fmt: skip
    assert reports[0].metrics["mean_max_weight"] == pytest.approx((0.25 + 0.25 + 1 / 3) / 3, abs=1e-3)


def test_progress_runs_from_0_to_1():
    space = Row()
    assert [Moment(space, space.alive(None), epoch, 5).progress for epoch in range(1, 6)] == [0, 0.25, 0.5, 0.75, 1]
    assert Moment(space, space.alive(None), 1, 1).progress == 0


def test_choices_that_are_alike_are_mixed_as_each_by_itself():
    space = Bats.small()
    alive = {name: options[: 3 + index % 3] for index, (name, options) in enumerate(space.alive(None).items())}
    moment = Moment(space, alive, 1, 1)
    alphas = Darts().initial(moment, np.random.default_rng(0))
    mixture = Darts().mixture({name: 1e3 * alpha for name, alpha in alphas.items()}, moment)
    assert list(mixture) == list(alive)
    for name, weights in mixture.items():
        expected = torch.softmax(1e3 * alphas[name] / (0.2 if name.startswith("normal") else 0.15), dim=0)
        torch.testing.assert_close(weights, expected)


# Arguments.


@pytest.mark.parametrize(
    "arguments",
    [
        {"epochs": 0},
        {"epochs": 2.5},
        {"batch_size": 1},
        {"batch_size": "64"},
        {"warmup": -1},
        {"warmup": 1.0},
        {"epochs": 5, "warmup": 5},
        {"optimiser": "lion"},
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"lr_min": 1.0},
        {"lr_min": -1e-3},
        {"lr_min": math.nan},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"weight_decay": -1e-4},
        {"weight_decay": None},
        {"clip": 0.0},
        {"clip": "none"},
        {"alpha_lr": -1.0},
        {"alpha_lr": True},
        {"alpha_betas": 0.5},
        {"alpha_betas": (0.5,)},
        {"alpha_betas": (0.5, 1.0)},
        {"alpha_betas": (0.5, "0.9")},
        {"alpha_weight_decay": -1.0},
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"partial": 0},
        {"partial": 2.0},
        {"stages": 3},
        {"stages": Stage()},
        {"stages": ({"cells": 5},)},
        {"stages": (Stage(options=5),)},
        {"early_stop": True},
        {"early_stop": {"every": 2}},
        {"resource": 0.1},
    ],
    ids=str,
)
def test_refuses(arguments):
    name = next(reversed(arguments))
    with pytest.raises(InvalidInputError, match=f"{name}.*legal"):
        Bilevel(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"options": 1}, {"options": 2.0}, {"cells": 0}, {"cells": True}, {"partial": 0}, {"partial": "2"}]
)
def test_a_stage_refuses(arguments):
    (name,) = arguments
    with pytest.raises(InvalidInputError, match=f"{name} of a stage is .*; None, or an integer from [12] up"):
        Stage(**arguments)


def test_lists_become_tuples():
    explorer = Bilevel(alpha_betas=[0.5, 0.9], stages=[Stage(), Stage(options=3)])
    assert explorer == Bilevel(alpha_betas=(0.5, 0.9), stages=(Stage(), Stage(options=3)))
    hash(explorer)
