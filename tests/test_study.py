from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    Conv,
    Drawn,
    InOrder,
    Ladder,
    Mlp,
    assert_same,
    climb,
    comparable,
    contents,
    python,
)
from torch import nn

import nasplat
from nasplat import (
    Count,
    Evaluate,
    Latency,
    NasplatWarning,
    SearchInterrupted,
    Study,
    Task,
    at_least,
    at_most,
    maximise,
    minimise,
    space_from,
)
from nasplat.cost import Bench
from nasplat.cost.timing import Schedule
from nasplat.errors import (
    FolderError,
    FolderInUseError,
    FolderMismatchError,
    InvalidInputError,
    JournalError,
    UnknownMetricError,
    UnsupportedError,
)
from nasplat.journal import FILE, Journal
from strategies import RandomSearch


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "study"


def ladder(folder, **changes):
    """A study that costs nothing."""
    given = dict(
        space=Ladder(), strategy=InOrder(), task=Task.from_function(climb), objectives=[maximise("val_accuracy")],
        folder=folder, tracker=None, progress=False,
    )  # fmt: skip
    return Study(**{**given, **changes})


def small(folder, task, **changes):
    """A study that trains."""
    given = dict(
        space=Mlp(), strategy=Drawn(), task=task, objectives=[maximise("val_accuracy"), minimise("params")],
        folder=folder, tracker=None, progress=False,
    )  # fmt: skip
    return Study(**{**given, **changes})


# The call.


def test_the_call_end_to_end_on_digits(folder, capsys):
    task = Task.digits(epochs=2, limit=300, lr=0.01)
    study = Study(
        space=Conv(), strategy=Drawn(), task=task, objectives=[maximise("val_accuracy"), minimise("latency_ms")],
        constraints=[at_most("params", 1300)], seed=0, folder=folder, tracker=None,
        meters=[Latency(schedule=Schedule(blocks=2, seconds=0.0, patience_s=0.05))],
    )  # fmt: skip
    result = study.run(max_trials=3)
    table, front = result.table(), result.front()
    genes, metrics = {"channels", "kernel"}, {"val_accuracy", "val_loss", "latency_ms", "params", "macs", "model_bytes"}
    assert genes | metrics | {"state", "feasible", "reason", "copy_of", "budget", "seconds"} <= set(table.columns)
    assert table.index.tolist() == list(range(len(table))) and table.index.name == "trial"
    worked = table[(table.state == "complete") & table.copy_of.isna()]
    assert len(worked) == 3
    assert (table[table.state == "infeasible"].params > 1300).all() and (worked.params <= 1300).all()
    assert set(front.index) <= set(worked.index)
    assert front.val_accuracy.is_monotonic_decreasing
    best = result.best
    assert best.trial.number == front.index[0]
    assert "trials" in capsys.readouterr().err  # progress, on stderr

    # Reloaded, it gives the recorded accuracy; the test split is scored once and kept.
    for again in (best, nasplat.load(folder, space=Conv()).best, result.candidate(int(front.index[-1]))):
        model = again.model()
        assert not model.training
        held = task.load().validation
        with torch.no_grad():
            scores = task.score(model(held.x), held.y, "val")
        assert scores["val_accuracy"] == again.metrics["val_accuracy"]
    scores = best.test()
    assert set(scores) == {"test_loss", "test_accuracy"} and scores["test_accuracy"] > 0.3
    kept = folder / "trials" / f"{best.trial.number:05d}" / "test.json"
    kept.write_text('{"test_accuracy": 0.123}')
    assert best.test() == {"test_accuracy": 0.123}


def test_the_same_call_continues_with_a_larger_limit(folder, blobs):
    first = small(folder, blobs).run(max_trials=3).table()
    again = small(folder, blobs).run(max_trials=3)
    assert_same(again.table(), first)
    assert again.over == "3 of 3 trials are done"
    more = small(folder, blobs).run(max_trials=6).table()
    assert_same(more.loc[first.index], first)
    whole = small(folder.with_name("whole"), blobs).run(max_trials=6).table()
    assert_same(more, whole)
    assert (comparable(more).seconds if "seconds" in comparable(more) else more.seconds).notna().all()


def test_a_run_leaves_the_callers_generators_and_threads_alone(folder, blobs):
    random.seed(1), torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    small(folder, blobs).run(max_trials=2)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert np.array_equal(np.random.get_state()[1], state[2])  # noqa: NPY002


# What is refused.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"space": Mlp}, r"the class; make one: Mlp\(\)"),
        ({"strategy": 3}, "strategy is 3; a Strategy is needed"),
        ({"task": "fashion"}, "a Task is needed"),
        ({"objectives": []}, "at least one maximise"),
        ({"objectives": ["val_accuracy"]}, "at least one maximise"),
        ({"objectives": [maximise("a"), minimise("a")]}, "two objectives name one metric"),
        ({"constraints": [("params", 3)]}, "at_most"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"threads": 0}, "threads is 0"),
        ({"time_limit_s": 0}, "time_limit_s is 0"),
        ({"keep_weights": "none"}, "legal: 'front', 'all'"),
        ({"device": "gpu"}, "device is 'gpu'; legal"),
        ({"strategy": type("Odd", (), {"propose": lambda *_: None})()}, "cannot be told apart"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(folder, changes, says):
    with pytest.raises(InvalidInputError, match=says):
        ladder(folder, **changes)
    assert not folder.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_is_refused_where_there_is_none(folder):
    with pytest.raises(InvalidInputError, match="torch finds 0 CUDA devices; use device='cpu'"):
        ladder(folder, device="cuda")
    assert not folder.exists()


@pytest.mark.parametrize("wish", [{"objectives": [maximise("f1")]}, {"constraints": [at_least("val_f1", 1)]}])
def test_an_unknown_metric_is_named_with_those_that_exist_before_anything_is_written(folder, blobs, wish):
    with pytest.raises(UnknownMetricError) as error:
        small(folder, blobs, **wish)
    for name in ("val_accuracy", "val_loss", "params", "macs", "model_bytes", "train_seconds", "on demand: latency_ms"):
        assert name in str(error.value)
    assert not folder.exists()
    with pytest.raises(UnknownMetricError, match="there are: val_accuracy"):
        ladder(folder, task=Task.from_function(climb, metrics=["val_accuracy"]), objectives=[maximise("params")])


def test_a_metric_of_the_users_own_can_be_an_objective(folder, blobs):
    task = replace(blobs, metrics={"wrong": share_wrong})
    table = small(folder, task, objectives=[minimise("val_wrong")]).run(max_trials=2).table()
    assert np.allclose(table.val_wrong, 1 - table.val_accuracy)


def share_wrong(outputs, targets):
    return float((outputs.argmax(1) != targets).double().mean())


def test_latency_joins_when_it_is_named(folder, blobs):
    study = small(folder, blobs, objectives=[maximise("val_accuracy")], constraints=[at_most("latency_ms", 1e6)])
    assert [type(meter) for meter in study.meters] == [Count, Latency]
    with pytest.raises(InvalidInputError, match="two meters give latency_ms"):
        small(folder, blobs, meters=[Latency(), Latency(threads=2)])


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (Mlp(inputs=5), r"cannot take the inputs of the task blobs, \(1, 4\)"),
        (Mlp(classes=2), "gives 2 logits; the task blobs has the class 2: give the space at least 3 classes"),
        (Ladder(), "a ladder is not a network"),
    ],
)
def test_a_space_that_does_not_fit_the_task_says_so_before_the_start(folder, blobs, space, says):
    study = small(folder, blobs, space=space)
    with pytest.raises(InvalidInputError, match=says):
        study.run(max_trials=3)
    assert not folder.exists()


def sometimes(genes):
    if genes["width"] == 1:
        raise ValueError("too narrow")
    return nn.Linear(4, 3)


def test_a_candidate_that_raises_is_a_failed_trial_and_the_search_goes_on(folder, blobs):
    space = space_from(sometimes, {"width": (1, 2), "other": tuple(range(6))})
    table = small(folder, blobs, space=space).run(max_trials=8).table()
    assert set(table.state) == {"failed", "complete"}
    assert (table[table.state == "failed"].reason == "ValueError: too narrow").all()
    assert (table.state == "failed").equals(table.width == 1)


# A folder of another study.


@dataclass(frozen=True)
class Other:
    def propose(self, history, rng):
        return None


def other_function(architecture, budget, seed):
    return {"val_accuracy": 1.0}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"space": Ladder(7)}, "space"),
        ({"strategy": Other()}, "strategy"),
        ({"strategy": InOrder((1, 2))}, "strategy"),
        ({"task": Task.from_function(other_function)}, "task"),
        ({"seed": 1}, "seed"),
    ],
)
def test_another_study_is_refused_by_name_and_its_folder_left_as_it_is(folder, changes, part):
    ladder(folder).run(max_trials=3)
    before = contents(folder)
    with pytest.raises(FolderMismatchError, match=rf"holds a study with another {part}\. There: .*Here: "):
        ladder(folder, **changes)
    assert contents(folder) == before


def test_a_folder_that_became_another_studys_is_refused_when_it_is_opened(folder):
    one, two = ladder(folder, seed=1), ladder(folder, seed=2)
    one.run(max_trials=2)
    before = contents(folder)[FILE]
    for call in (lambda: two.run(max_trials=3), lambda: two.enqueue(Ladder().architecture({"x": 1}))):
        with pytest.raises(FolderMismatchError, match="another seed"):
            call()
    assert contents(folder)[FILE] == before


def test_a_file_is_no_folder(folder):
    folder.write_text("mine")
    with pytest.raises(FolderError, match="is a file"):
        ladder(folder)
    with pytest.raises(FolderError, match="no study in"):
        nasplat.load(folder.parent)


def test_tensors_are_the_task_by_their_content(folder, blobs):
    small(folder, blobs).run(max_trials=1)
    data = replace(blobs.data, x_train=blobs.data.x_train + 1)
    with pytest.raises(FolderMismatchError, match="another task"):
        small(folder, replace(blobs, data=data))
    small(folder, replace(blobs, data=replace(blobs.data, x_train=blobs.data.x_train.clone()))).run(max_trials=2)


def test_objectives_and_limits_may_change_where_every_trial_has_the_metric(folder):
    ladder(folder).run(max_trials=4)
    changed = ladder(folder, objectives=[minimise("size")], constraints=[at_least("size", 2.0)])
    result = changed.run(max_trials=6)
    assert result.front().index.tolist() == [2]
    assert nasplat.load(folder).front().index.tolist() == [2]
    with pytest.raises(FolderMismatchError, match=r"6 past trials \(first: 0\) have no latency_ms"):
        ladder(folder, objectives=[minimise("latency_ms")])


def test_a_changed_source_warns_and_goes_on(tmp_path, folder):
    path = tmp_path / "mine.py"
    template = "def judge(architecture, budget, seed):\n    return {{'val_accuracy': {}}}\n"

    def study(value):
        import importlib.util
        import linecache

        path.write_text(template.format(value))
        linecache.clearcache()
        spec = importlib.util.spec_from_file_location("mine", path)
        module = importlib.util.module_from_spec(spec)
        exec(compile(path.read_text(), str(path), "exec"), vars(module))
        sys.modules["mine"] = module
        return ladder(folder, task=Task.from_function(module.judge))

    try:
        study("0.5").run(max_trials=2)
        study("0.5").run(max_trials=3)  # the same source: no warning (warnings of nasplat's are errors here)
        with pytest.warns(NasplatWarning, match="the source of mine:judge changed"):
            changed = study("0.25")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NasplatWarning)
            assert changed.run(max_trials=4).table().val_accuracy.tolist() == [0.5, 0.5, 0.5, 0.25]
    finally:
        sys.modules.pop("mine", None)


def test_a_held_folder_is_refused(folder):
    study = ladder(folder)
    study.run(max_trials=1)
    with Journal(folder):
        for call in (lambda: study.run(max_trials=2), lambda: study.evaluate(Ladder().architecture({"x": 9}))):
            with pytest.raises(FolderInUseError, match=str(os.getpid())):
                call()
        assert len(nasplat.load(folder).trials) == 1
    assert len(study.run(max_trials=2).trials) == 2


def test_a_torn_line_warns_and_the_study_goes_on(folder):
    ladder(folder).run(max_trials=2)
    with (folder / FILE).open("ab") as file:
        file.write(b'{"event":"start","tri')
    with pytest.warns(NasplatWarning, match="was torn"):
        result = ladder(folder).run(max_trials=3)
    assert result.table().state.tolist() == ["complete"] * 3


# Candidates known beforehand.


def x_of(trials):
    return [trial.architecture.genes["x"] for trial in trials]


def test_enqueued_candidates_come_first_also_after_a_resume(folder):
    study = ladder(folder)
    study.enqueue(Ladder().architecture({"x": 90}))
    ladder(folder).enqueue(Ladder().architecture({"x": 80}))
    assert len(nasplat.load(folder).trials) == 0
    assert x_of(study.run(max_trials=3).trials) == [90, 80, 2]
    with pytest.raises(InvalidInputError, match="this study searches"):
        study.enqueue(Ladder(5).architecture({"x": 1}))
    assert x_of(study.run(max_trials=4).trials) == [90, 80, 2, 3]


def test_evaluate_gives_the_trial_of_one_architecture_and_starts_nothing_else(folder):
    study = ladder(folder, progress=True)
    a, b = Ladder().architecture({"x": 42}), Ladder().architecture({"x": 43})
    trial = study.evaluate(a)
    assert (trial.number, trial.state, trial.metrics["size"]) == (0, "complete", 42.0)
    again = study.evaluate(a)
    assert (again.number, again.copy_of, again.metrics["size"]) == (1, 0, 42.0)
    study.enqueue(b)
    third = study.evaluate(Ladder().architecture({"x": 44}))
    assert third.metrics["size"] == 44.0
    assert x_of(study.result().trials) == [42, 42, 43, 44]
    with pytest.raises(InvalidInputError):
        study.evaluate(Ladder(5).architecture({"x": 1}))
    assert x_of(study.run(max_trials=4).trials) == [42, 42, 43, 44, 4]


def test_evaluate_of_a_failing_candidate_is_a_failed_trial(folder):
    def fails(architecture, budget, seed):
        raise ValueError("no such thing")

    trial = ladder(folder, task=Task.from_function(fails)).evaluate(Ladder().architecture({"x": 1}))
    assert trial.state == "failed" and "no such thing" in trial.reason


# Reading.


def test_a_running_study_is_read(folder):
    seen = []

    def looks(architecture, budget, seed):
        result = nasplat.load(folder)
        table = result.table()
        seen.append((table.state.tolist(), result.over))
        return climb(architecture, budget, seed)

    ladder(folder, task=Task.from_function(looks)).run(max_trials=3)
    assert seen == [(["running"], ""), (["complete", "running"], ""), (["complete", "complete", "running"], "")]
    result = nasplat.load(folder)
    assert result.over == "3 of 3 trials are done"
    assert result.best.trial.number == 2
    assert result.table().loc[2, "val_accuracy"] == 0.02
    with pytest.raises(UnsupportedError, match="lives in the script"):
        result.space.build(result.best.architecture)
    with pytest.raises(UnsupportedError, match="has no weights"):
        result.best.model()
    with pytest.raises(FolderError, match="got the space"):
        nasplat.load(folder, space=Ladder(3))


def test_an_empty_study_has_an_empty_table_and_no_best(folder):
    result = ladder(folder).run(max_trials=0)
    assert len(result.table()) == 0 and len(result.front()) == 0
    with pytest.raises(UnsupportedError, match="no candidate"):
        _ = result.best
    with pytest.raises(UnsupportedError, match="there are 0 trials"):
        result.candidate(0)


def test_a_function_that_does_not_return_the_objective_ends_the_run(folder):
    study = ladder(folder, objectives=[maximise("val_accuracy"), minimise("energy_mj")])
    with pytest.raises(UnknownMetricError, match=r"returned val_accuracy, size, train_seconds; .* needs energy_mj"):
        study.run(max_trials=3)
    assert len(nasplat.load(folder).trials) == 1


def test_an_error_of_the_strategy_reaches_the_user_and_the_folder_goes_on(folder):
    @dataclass(frozen=True)
    class Fails(InOrder):
        broken: bool = True

        def propose(self, history, rng):
            if len(history) == 2 and (folder / "broken").exists():
                raise ZeroDivisionError("the strategy's own")
            return super().propose(history, rng)

    folder.mkdir()
    (folder / "broken").touch()
    study = ladder(folder, strategy=Fails())
    with pytest.raises(ZeroDivisionError, match="the strategy's own"):
        study.run(max_trials=3)
    assert nasplat.load(folder).table().state.tolist() == ["complete", "complete"]
    (folder / "broken").unlink()
    assert len(study.run(max_trials=3).trials) == 3


# Resuming from the folder alone.


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An installed package with a space and a strategy, without installing anything."""
    from nasplat import plugins
    from nasplat.restorable import restorable

    site = tmp_path / "site"
    site.mkdir()
    shutil.copy(Path(__file__).with_name("helpers.py"), site / "acme_nas.py")
    information = site / "acme_nas-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-nas\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[nasplat.search_spaces]\nacme-mlp = acme_nas:Mlp\n[nasplat.strategies]\nacme-drawn = acme_nas:Drawn\n"
    )
    monkeypatch.syspath_prepend(str(site))
    caches = (plugins.installed, restorable)
    for cache in caches:
        cache.cache_clear()
    import acme_nas

    yield acme_nas
    for cache in caches:
        cache.cache_clear()
    sys.modules.pop("acme_nas", None)


def test_resume_needs_nothing_but_the_folder_where_parts_are_installed(folder, plugin):
    task = Task.digits(epochs=1, limit=40)
    space = plugin.Mlp(classes=10, inputs=64)
    given = dict(strategy=plugin.Drawn(), task=task, objectives=[maximise("val_accuracy")], tracker=None, seed=3,
                 constraints=[at_most("params", 500)], keep_weights="all", progress=False)  # fmt: skip
    Study(space, folder=folder, **given).run(max_trials=2)
    study = Study.resume(folder, tracker=None, progress=False)
    assert (study.space, study.strategy, study.task) == (space, plugin.Drawn(), task)
    assert study.seed == 3 and study.keep_weights == "all" and study.meters == (Count(),)
    assert study.constraints == (at_most("params", 500),)
    resumed = study.run(max_trials=4)
    whole = Study(space, folder=folder.with_name("whole"), **given).run(max_trials=4)
    assert_same(resumed.table(), whole.table())
    loaded = nasplat.load(folder)
    assert loaded.space == space
    loaded.best.model()
    changed = Study.resume(folder, tracker=None, objectives=[minimise("params")])
    assert changed.objectives == (minimise("params"),)


def test_resume_of_parts_of_a_script_is_refused(folder):
    ladder(folder).run(max_trials=1)
    with pytest.raises(FolderError, match=r"the space Ladder\(steps=100\) lives in the script"):
        Study.resume(folder)
    with pytest.raises(FolderError, match="no study in"):
        Study.resume(folder / "none")


def test_a_plug_in_that_changed_since_can_still_be_read(folder, plugin):
    task = Task.digits(epochs=1, limit=40)
    space = plugin.Mlp(classes=10, inputs=64)
    Study(space, plugin.Drawn(), task, [maximise("val_accuracy")], folder=folder, tracker=None, progress=False).run(1)
    journal = folder / FILE
    lines = journal.read_text().splitlines()
    header = json.loads(lines[0])
    header["space"]["fields"]["gone"] = 1
    header["space_identity"] = "Mlp{old}"
    journal.write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    assert nasplat.load(folder).table().state.tolist() == ["complete"]


# Time.


def test_max_hours_counts_over_all_runs(folder):
    def slow(architecture, budget, seed):
        time.sleep(0.05)
        return climb(architecture, budget, seed)

    study = ladder(folder, task=Task.from_function(slow))
    result = study.run(max_trials=1000, max_hours=0.2 / 3600)
    assert 1 <= len(result.trials) <= 5
    assert result.over.startswith("max_hours")
    assert len(study.run(max_trials=1000, max_hours=0.2 / 3600).trials) == len(result.trials)
    more = study.run(max_trials=1000, max_hours=0.4 / 3600)
    assert len(result.trials) < len(more.trials) <= len(result.trials) + 5


def test_a_trial_past_its_limit_fails_and_the_search_goes_on(folder, blobs):
    table = small(folder, blobs, time_limit_s=1e-6).run(max_trials=2).table()
    assert (table.state == "failed").all() and table.reason.str.startswith("past its time limit").all()


# Interrupted.


@pytest.mark.parametrize("at", [0, 3, 4])
def test_ctrl_c_says_how_to_go_on_and_the_next_run_gives_the_same_table(folder, blobs, at):
    """Real SIGINTs to this process, from within training."""
    whole = small(folder.with_name("whole"), blobs).run(max_trials=5).table()
    calls = []

    def interrupting(outputs, targets):
        calls.append(1)
        if len(calls) == at + 1:
            signal.raise_signal(signal.SIGINT)
        return torch.nn.functional.cross_entropy(outputs, targets)

    # The same name and, by it, the same task; the interrupting one is the test's alone.
    task = replace(blobs, metrics={"loss2": interrupting})
    quiet = replace(blobs, metrics={"loss2": _named(interrupting)})
    with pytest.raises(SearchInterrupted, match=rf"trials are in {folder}. To go on: "):
        small(folder, task).run(max_trials=5)
    events = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    assert events[-1]["event"] == "end" and events[-1]["state"] == "interrupted"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NasplatWarning)
        resumed = small(folder, quiet).run(max_trials=5).table()
    assert_same(resumed.drop(columns="val_loss2"), whole)


def _named(function):
    def plain(outputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets)

    plain.__qualname__, plain.__module__ = function.__qualname__, function.__module__
    return plain


KILLS = """
# Runs a study in child processes that are killed at random moments, until one comes to its end.
import os, random, signal, sys, time
import torch
from helpers import Conv, Drawn
from nasplat import Study, Task, maximise, minimise, worker

torch.set_num_threads(1)
worker.CHECKPOINT_SECONDS = 0.0  # a checkpoint after every epoch, so that kills meet them too

def run(folder, trials=6):
    study = Study(Conv(), Drawn(), Task.digits(epochs=4, limit=400, batch_size=32, augment=["shift"]),
                  [maximise("val_accuracy"), minimise("params")], seed=4, folder=folder, tracker=None, progress=False)
    study.run(max_trials=trials)

def child(folder, seconds):
    begin = time.monotonic()
    process = os.fork()
    if process == 0:
        run(folder)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL, time.monotonic() - begin

run(sys.argv[1] + "-warm", 1)  # what is loaded once a process is no part of what is timed
_, whole = child(sys.argv[1], None)
moments = random.Random(0)
kills = 0
for _ in range(30):
    # Short beside the whole: a machine that was slow when that was timed, and is not now, must not finish in one go.
    kills += child(sys.argv[2], whole * moments.random() / 6)[0]
    if kills == 8:
        break
child(sys.argv[2], None)
print(kills)
"""


def test_kill_9_at_any_moment_and_resume_is_an_uninterrupted_run(folder, tmp_path):
    out, err = python(KILLS, tmp_path / "whole", folder).communicate(timeout=300)
    assert int(out or 0) >= 5, err
    whole, resumed = (nasplat.load(path, space=Conv()) for path in (tmp_path / "whole", folder))
    assert_same(resumed.table(), whole.table())
    starts = [json.loads(line)["event"] for line in (folder / FILE).read_text().splitlines()].count("session")
    assert starts >= 3  # it was resumed, not only begun
    ours, theirs = (
        {name: data for name, data in contents(path).items() if name.endswith("weights.safetensors")}
        for path in (folder, tmp_path / "whole")
    )
    assert ours == theirs


# Weights.


def kept(folder):
    return {int(path.parent.name) for path in folder.glob("trials/*/weights.safetensors")}


def test_the_fronts_weights_are_kept_and_no_others(folder, blobs):
    result = small(folder, blobs).run(max_trials=8)
    assert kept(folder) == set(result.front().index)
    number = next(t.number for t in result.trials if t.state == "complete" and t.number not in kept(folder))
    if result.trials[number].copy_of is None:
        with pytest.raises(UnsupportedError, match="keep_weights='all'"):
            result.candidate(number).model()
    more = small(folder, blobs).run(max_trials=12)
    assert kept(folder) == set(more.front().index)


def test_all_weights_are_kept_where_asked(folder, blobs):
    result = small(folder, blobs, keep_weights="all").run(max_trials=5)
    own = {t.number for t in result.trials if t.copy_of is None}
    assert kept(folder) == own
    copies = [t.number for t in result.trials if t.copy_of is not None]
    for number in [*own, *copies]:
        result.candidate(number).model()


@dataclass(frozen=True)
class Halving:
    """Three networks for half of the epochs, then the best of them for all."""

    def propose(self, history, rng):
        number = len(history)
        if number < 3:
            return Evaluate(history.space.sample(rng), budget=0.5)
        if number == 3 and not history.running:
            best = min(history.scored(), key=history.losses)
            return Evaluate(best.architecture, budget=1.0, weights_of=best.number)
        return None


def test_a_strategy_may_go_on_from_a_share_of_the_training(folder):
    task = Task.digits(epochs=4, limit=100)
    given = dict(space=Conv(), strategy=Halving(), objectives=[maximise("val_accuracy")])
    result = small(folder, task, **given).run(max_trials=9)
    table = result.table()
    assert table.state.tolist() == ["complete"] * 4, table.reason.tolist()
    assert table.budget.tolist() == [0.5, 0.5, 0.5, 1.0]
    assert [len(trial.reports) for trial in result.trials] == [2, 2, 2, 2]
    assert result.front().index.tolist() == [3]
    result.best.model()
    source = result.trials[3].proposal.weights_of
    assert kept(folder) == {0, 1, 2, 3} - {source}, "what was gone on from is needed no more"
    assert not (folder / f"trials/{source:05d}/checkpoint.pt").exists()
    assert_same(nasplat.load(folder, space=Conv()).table(), table)


@dataclass(frozen=True)
class Impatient(Drawn):
    def keep(self, trial, history):
        return len(trial.reports) < 2 or trial.number % 2 == 0


def test_a_strategy_may_end_trials_early(folder):
    task = Task.digits(epochs=3, limit=60)
    result = small(folder, task, space=Conv(), strategy=Impatient(), retrain_duplicates=True).run(max_trials=4)
    assert result.table().state.tolist() == ["complete", "stopped", "complete", "stopped"]
    assert [len(t.reports) for t in result.trials] == [3, 2, 3, 2]
    assert set(result.front().index) <= {0, 2}
    assert kept(folder) <= {0, 2} and not list(folder.glob("trials/*/checkpoint.pt"))


def test_a_gene_named_like_a_column_keeps_out_of_its_way(tmp_path):
    space = space_from(lambda genes: None, {"state": (1, 2), "val_accuracy": (3, 4), "width": (5, 6)})

    def evaluate(architecture, budget, seed):
        return {"val_accuracy": 0.5}

    study = Study(
        space, RandomSearch(), Task.from_function(evaluate), [maximise("val_accuracy")],
        folder=tmp_path / "named", tracker=None, progress=False,
    )  # fmt: skip
    row = study.run(1).table().iloc[0]
    assert (row["state"], row["val_accuracy"]) == ("complete", 0.5)
    assert row["gene.state"] in (1, 2) and row["gene.val_accuracy"] in (3, 4) and row["width"] in (5, 6)


def test_a_finished_study_starts_no_ray(tmp_path, monkeypatch):
    def evaluate(architecture, budget, seed):
        return {"val_accuracy": 0.5}

    space = space_from(lambda genes: None, {"width": (1, 2, 3)})
    study = Study(
        space, RandomSearch(), Task.from_function(evaluate), [maximise("val_accuracy")],
        folder=tmp_path / "done", tracker=None, progress=False,
    )  # fmt: skip
    study.run(2)
    started = []
    monkeypatch.setattr("nasplat.runners.ray_tune.connected", lambda **named: contextlib.nullcontext(Bench()))
    monkeypatch.setattr("nasplat.runners.ray_tune.run", lambda *given, **named: started.append(given))
    assert len(study.run(2, workers=2).trials) == 2
    assert started == []
    study.run(3, workers=2)
    assert len(started) == 1


def valid(tmp_path, **changes):
    """The arguments of a study that is fine, with changes."""
    space = space_from(lambda genes: None, {"width": (1, 2, 3)})
    task = Task.from_function(lambda architecture, budget, seed: {"val_accuracy": 0.5}, name="half")
    return {
        "space": space, "strategy": RandomSearch(), "task": task, "objectives": [maximise("val_accuracy")],
        "folder": tmp_path / "study", "tracker": None, "progress": False, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": maximise("val_accuracy")}, "objectives is .*a list is needed"),
        ({"constraints": None}, "constraints is None; a list is needed"),
        ({"meters": ["latency"]}, "a meter is 'latency'"),
        ({"meters": [nasplat.Latency]}, "a meter is <class"),
        ({"tracker": "wandb"}, "tracker is 'wandb'; legal: 'mlflow', None"),
        ({"tracker": 5}, "tracker is 5"),
        ({"threads": "2"}, "threads is '2'; a whole number from 1 on"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"time_limit_s": "2"}, "time_limit_s is '2'"),
    ],
)
def test_wrong_arguments_are_refused_in_words(tmp_path, changes, message):
    with pytest.raises(InvalidInputError, match=message):
        Study(**valid(tmp_path, **changes))
    assert not (tmp_path / "study").exists()


def test_wrong_calls_are_refused_in_words(tmp_path):
    study = Study(**valid(tmp_path))
    for wrong in ("3", 2.5, True):
        with pytest.raises(InvalidInputError, match=r"max_trials is .*a whole number from 0 on"):
            study.run(wrong)
    with pytest.raises(InvalidInputError, match="workers is '2'"):
        study.run(1, workers="2")
    for call in (study.enqueue, study.evaluate):
        with pytest.raises(InvalidInputError, match="is no architecture"):
            call({"width": 1})
    with pytest.raises(InvalidInputError, match="a recipe has no optimizer; legal: epochs, "):
        Task.digits(optimizer="adam")
    with pytest.raises(InvalidInputError, match="its name is needed"):
        maximise("")
    with pytest.raises(FolderError, match="cannot be made"):
        Study(**valid(tmp_path, folder="/proc/nowhere/study")).run(1)


def test_only_a_run_that_ended_by_itself_is_over(tmp_path):
    study = Study(**valid(tmp_path))
    trial = study.evaluate(study.space.architecture({"width": 2}))
    assert trial.state == "complete" and study.result().over == ""
    assert study.run(2).over == "2 of 2 trials are done" == study.result().over
    assert study.result().worked == 2
    study.evaluate(study.space.architecture({"width": 2}))  # a copy; the run before is over as before
    assert study.result().over == "2 of 2 trials are done" and study.result().worked == 2

    def interrupt(architecture, budget, seed):
        raise KeyboardInterrupt

    stopped = Study(**valid(tmp_path, task=Task.from_function(interrupt, name="stops"), folder=tmp_path / "stopped"))
    with pytest.raises(nasplat.SearchInterrupted) as caught:
        stopped.run(1)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert stopped.result().over == ""


def test_a_damaged_journal_is_explained(tmp_path):
    study = Study(**valid(tmp_path))
    study.run(2)
    path = tmp_path / "study" / FILE
    lines = path.read_text().splitlines()

    def damaged(number, change):
        event = json.loads(lines[number])
        change(event)
        path.write_text("\n".join([*lines[:number], json.dumps(event), *lines[number + 1 :]]) + "\n")

    start = next(index for index, line in enumerate(lines) if json.loads(line)["event"] == "start")
    damaged(0, lambda event: event.pop("space_identity"))
    with pytest.raises(JournalError, match="line 1 lacks space_identity"):
        nasplat.load(tmp_path / "study")
    for change in (
        lambda event: event.pop("proposal"),
        lambda event: event["proposal"].pop("kind"),
        lambda event: event.pop("trial"),
    ):
        damaged(start, change)
        with pytest.raises(JournalError, match="the journal's start"):
            nasplat.load(tmp_path / "study")
    damaged(start, lambda event: event["proposal"]["genes"].update(width=7))
    with pytest.raises(JournalError, match="width is 7; legal: 1, 2, 3"):
        Study(**valid(tmp_path))


def test_a_silent_study_still_warns(tmp_path):
    class Refuses:
        def start(self, study):
            raise ConnectionError("nobody there")

        def log(self, trial): ...

        def artifact(self, path, folder=""): ...

        def end(self, state): ...

        def where(self, study):
            return "nowhere"

    with pytest.warns(nasplat.NasplatWarning) as warned:
        Study(**valid(tmp_path, tracker=Refuses())).run(1)
    said = [str(warning.message) for warning in warned]
    assert len(said) == 2
    assert "cannot be recorded now" in said[0] and "nobody there" in said[0] and "not in the record yet" in said[1]
