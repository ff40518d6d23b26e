"""What a pre-flight says, against what is so."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import Drawn, InOrder, Ladder, Mlp, climb, contents
from torch import nn
from typer.testing import CliRunner

from nasplat import Count, Evaluate, Explore, Report, Study, Task, at_least, at_most, cli, maximise, space_from
from nasplat.cost.latency import Latency
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.preflight import Share, interval
from search_spaces import Bats


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "study"


def study(folder, task, **changes):
    given = dict(
        space=Mlp(), strategy=Drawn(), task=task, objectives=[maximise("val_accuracy")], folder=folder, tracker=None,
        progress=False,
    )  # fmt: skip
    return Study(**{**given, **changes})


def params(space=None):
    space = space or Mlp()
    return sorted(sum(p.numel() for p in space.build(a).parameters()) for a in space.enumerate())


# Limits and costs.


@pytest.mark.parametrize(
    ("met", "of", "low", "high"),
    # Clopper and Pearson at 95 %: by hand for none and all (0.025 ** (1 / n)), by their tables for the others.
    [(0, 30, 0.0, 0.1157), (30, 30, 0.8843, 1.0), (5, 10, 0.1871, 0.8129), (1, 20, 0.0013, 0.2487)],
)
def test_the_interval_of_a_share(met, of, low, high):
    assert interval(met, of) == pytest.approx((low, high), abs=5e-5)


def test_a_space_that_is_small_enough_is_measured_as_a_whole(folder, blobs):
    limits = [at_most("params", 60), at_least("macs", 1), at_least("val_accuracy", 0.5)]
    found = study(folder, blobs, constraints=limits).preflight(samples=32, max_trials=4)
    known = params()
    assert (found.size, found.sampled, found.measured, found.whole, found.failed) == (32, 32, 32, True, 0)
    spread = found.costs["params"]
    assert (spread.least, spread.median, spread.greatest) == (known[0], (known[15] + known[16]) / 2, known[-1])
    met = sum(count <= 60 for count in known)
    assert 0 < met < 32
    assert found.limits[0] == Share("params at most 60", met, 32, met / 32, met / 32)
    assert found.limits[1].met == 32
    assert found.limits[2].met is None and found.limits[2].share is None
    assert found.all_limits is not None and found.all_limits.met == met
    assert found.can_be_met
    text = str(found)
    assert f"({met} of 32)" in text and "known only after training" in text and "whole space" in text
    assert max(map(len, text.splitlines())) <= 100
    assert json.loads(found.to_json())["limits"][0]["met"] == met


def test_a_sample_has_an_interval_and_is_the_same_each_time(folder, blobs):
    limits = [at_most("params", 60)]
    found, again = (study(folder, blobs, constraints=limits).preflight(samples=12) for _ in range(2))
    (share,) = found.limits
    assert (found.sampled, found.whole) == (12, False)
    assert (share.low, share.high) == interval(share.met, 12) and share.low < share.met / 12 < share.high
    assert again.limits == found.limits and again.costs == found.costs
    other = study(folder, blobs, constraints=limits, seed=5).preflight(samples=12)
    assert other.costs != found.costs


def test_limits_that_no_sample_keeps(folder, blobs):
    found = study(folder, blobs, constraints=[at_most("params", 3)]).preflight(samples=5, max_trials=10)
    assert not found.can_be_met and found.limits[0].met == 0
    assert found.search_seconds is None and "no sampled network keeps the limits" in str(found)


def test_a_relative_limit_is_of_the_measured_baseline(folder, blobs):
    widest = {"width": 16, "depth": 2, "act": "relu", "norm": False}
    own = study(folder, blobs, constraints=[at_most("params", "25%")], baselines={"reference": widest})
    found = own.preflight(samples=32)
    assert found.limits[0].limit == "params at most 25% of reference (100.8)"
    assert found.limits[0].met == sum(count <= 0.25 * 403 for count in params())
    assert not folder.exists()


# What it leaves alone.


def test_nothing_is_written_and_no_generator_moves(folder, blobs):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    own = study(folder, blobs, constraints=[at_most("params", 100)])
    own.preflight(samples=4, max_trials=3)
    assert not folder.exists()
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    table = own.run(max_trials=2).table()
    held = contents(folder)
    own.preflight(samples=4, max_trials=3)
    assert contents(folder) == held
    assert own.run(max_trials=2).table().val_accuracy.equals(table.val_accuracy)


# Time and disk.


def test_the_trial_is_that_of_the_recipe_and_its_files_are_as_long_as_said(folder, blobs):
    own = study(folder, blobs, keep_weights="all", space=Mlp())
    found = own.preflight(samples=32, max_trials=6, workers=2)
    # A fifth of the 200 points validates, class by class; batches of 32.
    batches = -(-len(blobs.load().train) // 32)
    assert (found.trial.epochs, found.trial.steps, found.trial.timed) == (2, 2 * batches, 3)
    low, high = found.search_seconds
    assert 0 < low == high
    trial = found.trial
    assert low == pytest.approx(6 * ((trial.train + trial.validate + trial.build) / 2 + trial.measure))
    result = own.run(max_trials=3)
    sizes = {
        trial.number: (folder / "trials" / f"{trial.number:05d}" / "weights.safetensors").stat().st_size
        for trial in result.trials
        if trial.copy_of is None
    }
    assert sizes
    known = sorted(4 * count for count in params())
    assert known[0] < found.disk.weights < known[-1] + 2000
    lines = (folder / "history.jsonl").read_text().splitlines()
    written = sum(len(line) + 1 for line in lines if '"at":' in line and '"copy_of"' not in line) / len(sizes)
    assert found.disk.record == pytest.approx(written, rel=0.25)
    assert found.search_bytes[0] == pytest.approx(6 * (found.disk.record + found.disk.weights))


def test_phases_are_timed_each_and_count_by_their_epochs(folder, blobs):
    recipe = {"epochs": 40, "phases": "two_step"}
    task = replace(blobs, recipe=replace(blobs.recipe, **recipe))
    found = study(folder, task).preflight(samples=2)
    assert found.trial.epochs == 40 and found.trial.train > 0
    assert found.search_seconds is None and "The search" not in str(found)  # not said how many trials


def test_a_loader_without_a_length_has_no_known_training_time(folder, blobs):
    class Endless:
        def __iter__(self):
            for _ in range(50):
                yield torch.randn(8, 4), torch.randint(3, (8,))

    batch = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    task = Task.from_loaders(Endless(), batch, name="endless", epochs=1)
    found = study(folder, task).preflight(samples=2, max_trials=5)
    assert found.trial.train is None and found.search_seconds is None
    assert "unknown" in str(found) and "does not tell its length" in str(found)
    sized = Task.from_loaders(batch * 7, batch, name="sized", epochs=3)
    assert study(folder, sized).preflight(samples=2).trial.steps == 21


@dataclass(frozen=True)
class InParts:
    def propose(self, history, rng):
        return Evaluate(history.space.sample(rng), budget=0.5)


def test_a_strategy_that_trains_in_parts_gives_a_range(folder, blobs):
    found = study(folder, blobs, strategy=InParts()).preflight(samples=2, max_trials=10)
    low, high = found.search_seconds
    assert found.first_budget == 0.5 and low < high
    assert high - low == pytest.approx(10 * 0.5 * (found.trial.train + found.trial.validate))


@dataclass(frozen=True)
class Steps:
    """An explorer of five steps an epoch."""

    epochs: int = 3

    def explore(self, space, task, rng, context):
        assert context.load() is None
        for epoch in range(self.epochs):
            for _ in range(5):
                with context.step():
                    torch.randn(10, 10) @ torch.randn(10, 10)
            context.save({"epoch": epoch})
            if not (yield Report(epoch + 1, {})):
                break
        return [space.sample(rng)]


@dataclass(frozen=True)
class Supernet:
    explorer: Steps = Steps()

    def propose(self, history, rng):
        return Explore(self.explorer)


def test_a_supernets_step_is_timed_and_the_rest_is_called_unknown(folder, blobs):
    found = study(folder, blobs, strategy=Supernet()).preflight(samples=2, max_trials=3)
    assert found.explore.steps == 3 and found.explore.step > 0 and found.explore.epoch > 0
    assert found.search_seconds is None
    assert "One step of the supernet" in str(found) and "time unknown" in str(found)
    assert not folder.exists()


def test_a_supernet_that_cannot_be_trained_says_why(folder, blobs):
    @dataclass(frozen=True)
    class Broken:
        def explore(self, space, task, rng, context):
            raise UnsupportedError("no supernet here")
            yield

    found = study(folder, blobs, strategy=Supernet(Broken())).preflight(samples=1)
    assert found.explore.step is None and "no supernet here" in str(found)


# What cannot be measured.


def sometimes(genes):
    if genes["width"] == 1:
        raise ValueError("too narrow")
    return nn.Linear(4, 3)


def test_what_fails_is_counted_and_the_first_reason_shown(folder, blobs):
    space = space_from(sometimes, {"width": (1, 2, 3, 4)})
    found = study(folder, blobs, space=space).preflight(samples=4)
    assert (found.sampled, found.measured, found.failed) == (4, 3, 1)
    assert found.reason == "ValueError: too narrow" and "1 failed, the first: ValueError: too narrow" in str(found)


def test_a_function_has_no_steps_to_time(folder):
    own = study(folder, Task.from_function(climb), space=Ladder(), strategy=InOrder(), objectives=[maximise("size")])
    found = own.preflight(max_trials=5)
    assert found.measured == 0 and found.trial.train is None and found.search_seconds is None
    assert "is a function: there are no training steps to time" in " ".join(str(found).split())


def test_a_function_with_a_meter_is_sampled(folder):
    def half(architecture, budget, seed):
        return {"val_accuracy": 0.5}

    task = Task.from_function(half, example=torch.zeros(1, 4))
    found = study(folder, task, meters=[Count()], constraints=[at_most("params", 60)]).preflight(samples=32)
    assert found.measured == 32 and found.limits[0].met == sum(count <= 60 for count in params())


def test_time_ends_the_sampling_and_is_said(folder, blobs):
    found = study(folder, blobs).preflight(samples=20, seconds=1e-6)
    assert found.out_of_time and found.sampled == 1 and "The time was over" in str(found)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"seconds": 0}, {"max_trials": 0}, {"workers": -1}])
def test_wrong_arguments_are_refused(folder, blobs, wrong):
    with pytest.raises(InvalidInputError):
        study(folder, blobs).preflight(**wrong)


# Meters that cannot work.


@dataclass(frozen=True)
class Missing:
    """A runtime that is not installed."""

    name = "missing"

    def export(self, model, example):
        return b""

    def load(self, file, example, threads):
        raise UnsupportedError("libmissing is not installed: pip install missing")

    def facts(self):
        return {}


def test_a_runtime_that_does_not_work_says_so_before_the_first_trial(folder, blobs):
    own = study(folder, blobs, meters=[Latency(Missing())])
    for call in (
        own.preflight,
        lambda: own.run(max_trials=2),
        lambda: own.evaluate(Mlp().sample(np.random.default_rng())),
    ):
        with pytest.raises(UnsupportedError, match="cannot measure anything: libmissing is not installed"):
            call()
    assert not own.result().trials


def test_another_machine_without_ray_says_so_before_there_is_a_folder(folder, blobs):
    own = study(folder, blobs, meters=[Latency("torch", on="board")])
    for call in (own.preflight, lambda: own.run(max_trials=2)):
        with pytest.raises(InvalidInputError, match=r"'board', a machine of a Ray cluster .* workers=1 or more"):
            call()
    assert not folder.exists()


# The command.


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def ahead(folder, *arguments):
    tiny = ("--space", "bats", "-s", "cells=1", "--task", "digits", "-t", "epochs=1", "-t", "limit=60")
    return call("preflight", *tiny, "--folder", folder, "--samples", 2, *arguments)


def test_the_command(folder, tmp_path):
    done = ahead(folder, "--constraint", "params<=1e9", "--trials", 7)
    assert done.exit_code == 0, done.output
    assert "params at most 1e+09" in done.stdout and "(7 trials)" in done.stdout
    assert not folder.exists()
    reference = tmp_path / "architecture.json"
    reference.write_text(Bats.small(cells=1).sample(np.random.default_rng(0)).to_json())
    limited = ahead(
        folder, "--baseline", f"ref={reference}", "--constraint", "params>=1000% of ref", "--json", "--trials", 7
    )
    assert limited.exit_code == 3, limited.output
    assert "No sampled network keeps the limits" in limited.stderr
    assert json.loads(limited.stdout)["limits"][0]["limit"].startswith("params at least 1000% of ref (")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--constraint", "params<=60%"], 1, "there are: none"),
        (["--constraint", "params<=-60%"], 2, "positive percentage"),
        (["--constraint", "params<=60% or so"], 2, "'METRIC<=60% of NAME'"),
        (["--baseline", "ref"], 2, "KEY=VALUE"),
        (["--baseline", "ref=nowhere.json"], 2, "architecture.json of an export"),
        (["--baseline", "ref={"], 2, "genes as JSON"),
        (["--baseline", 'ref={"cells": 1}'], 1, "ref"),
    ],
)
def test_mistakes_are_answered(folder, arguments, code, said):
    done = ahead(folder, *arguments)
    assert done.exit_code == code, done.output
    assert code == 1 or said in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.output and not folder.exists()
