from __future__ import annotations

import copy
import math
import pickle
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import Binary, equal_states
from safetensors.torch import load_file
from torch import nn

import nasplat.worker as worker_module
from nasplat import Evaluate, Study, Task, maximise
from nasplat.errors import InvalidInputError
from nasplat.identity import describe
from nasplat.nn import BinaryConv2d
from nasplat.phases import PROGRESSIVE, TWO_STEP, Phase
from nasplat.search import Assignment
from nasplat.teacher import Lesson, Teacher, attention_map, attention_maps, divergence, frozen, transfer_points
from nasplat.train import Training, evaluate
from nasplat.worker import Worker, trial_folder

CPU = torch.device("cpu")
SMALL = Binary().architecture({"channels": 4})


def network(seed=0):
    torch.manual_seed(seed)
    model = Binary().build(SMALL)
    model.eval()(torch.zeros(1, 1, 8, 8))
    return model.train()


def digits(**recipe):
    return Task.digits(**{"epochs": 3, "limit": 40, "batch_size": 20, **recipe})


def training(task, model=None, seed=0):
    return Training(model or network(), task, CPU, seed, nullcontext)


# The losses, against loops.


def slow_map(x):
    n, c, h, w = x.shape
    maps = []
    for i in range(n):
        q = [sum(float(x[i, k, r, s]) ** 2 for k in range(c)) for r in range(h) for s in range(w)]
        length = math.sqrt(sum(value**2 for value in q))
        maps.append([value / length for value in q])
    return np.array(maps)


def slow_divergence(outputs, targets, temperature):
    def softmax(row):
        powers = [math.exp(float(value) / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    rows = [
        sum(p * math.log(p / q) for p, q in zip(softmax(target), softmax(output), strict=True))
        for output, target in zip(outputs, targets, strict=True)
    ]
    return temperature**2 * sum(rows) / len(rows)


def test_an_attention_map_is_the_squares_over_channels_at_length_one():
    x = torch.randn(3, 5, 4, 2)
    np.testing.assert_allclose(attention_map(x).numpy(), slow_map(x), rtol=1e-5)
    assert torch.equal(attention_map(torch.zeros(2, 3, 4, 4)), torch.zeros(2, 16))  # a dead layer is no NaN


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_divergence_is_that_of_the_teachers_softmax(temperature):
    outputs, targets = torch.randn(6, 4), 2 * torch.randn(6, 4)
    found = float(divergence(outputs, targets, temperature))
    assert found == pytest.approx(slow_divergence(outputs, targets, temperature), rel=1e-4)
    assert float(divergence(targets, targets, temperature)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("distance", ["squared", "norm"])
def test_the_loss_is_attention_at_each_point_and_logits(distance):
    student, shown = network(1).eval(), frozen(network(2))
    x = torch.randn(4, 1, 8, 8)
    outputs, loss = Lesson(Teacher(temperature=2.0, distance=distance), shown, student, 7.0, 3.0)(student, x)
    with torch.no_grad():
        assert torch.equal(outputs, student(x))
        expected = 3.0 * slow_divergence(outputs, shown(x), 2.0)
        # The two stages, computed by hand.
        a, b = (model.stage1(model.stem(x)) for model in (student, shown))
        deep = [m.stage2(m.norm(m.pool(y))) for m, y in ((student, a), (shown, b))]
    for one, other in ((a, b), deep):
        difference = slow_map(one) - slow_map(other)
        lengths = np.sqrt((difference**2).sum(axis=1))
        expected += 7.0 * ((difference**2).mean() if distance == "squared" else lengths.mean())
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("distance", ["squared", "norm"])
def test_equal_maps_have_a_gradient_of_zero(distance):
    model = network()
    _, loss = Lesson(Teacher(distance=distance), frozen(model), model.eval(), 1e3, 0.0)(model, torch.randn(4, 1, 8, 8))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_no_gradient_reaches_the_teacher_and_nothing_of_it_changes():
    student, shown = network(1), frozen(network(2))
    before = copy.deepcopy(shown.state_dict())
    _, loss = Lesson(Teacher(), shown, student, 1.0, 1.0)(student, torch.randn(4, 1, 8, 8))
    loss.backward()
    assert student.stem.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in shown.parameters())
    assert equal_states(shown.state_dict(), before) and not shown.training


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_no_hook_stays_whatever_happens():
    student, shown = network(1), frozen(network(2))
    lesson = Lesson(Teacher(), shown, student, 1.0, 1.0)
    lesson(student, torch.randn(4, 1, 8, 8))
    with pytest.raises(RuntimeError):
        lesson(student, torch.randn(4, 3, 8, 8))
    assert hooks(student) == hooks(shown) == 0
    x = torch.randn(2, 1, 8, 8)
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert torch.equal(twin.eval()(x), student.eval()(x))


def test_a_map_is_taken_before_a_later_layer_overwrites_it():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(inplace=True))
    x = torch.randn(2, 1, 4, 4)
    with torch.no_grad(), attention_maps(model, ["0"]) as found:
        model(x)
    torch.testing.assert_close(found["0"], attention_map(model[0](x)))


# The teacher of each phase.


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (Teacher(), [(0, 0), (1e3, 1), (0, 1)]),
        (Teacher(attention=2, logits=3, last="all"), [(0, 0), (2, 3), (2, 3)]),
        (Teacher(logits=0), [(0, 0), (1e3, 0), (0, 0)]),
        (Teacher(network=network), [(1e3, 1), (1e3, 1), (0, 1)]),
    ],
)
def test_the_first_phase_has_no_teacher_and_the_last_matches_logits(teacher, expected):
    assert [teacher.weights(phase, 3) for phase in range(3)] == expected


def test_the_teacher_of_a_phase_is_the_network_as_the_phase_before_left_it():
    run = training(digits(epochs=6, phases=PROGRESSIVE, teacher=Teacher()))
    teachers, states = [], []
    for _ in run.epochs(6):
        teachers.append(run._lesson and run._lesson.network)
        states.append(copy.deepcopy(run.model.state_dict()))
    assert teachers[0] is teachers[1] is None
    assert teachers[2] is teachers[3] and teachers[4] is teachers[5]
    assert equal_states(teachers[2].state_dict(), states[1]) and equal_states(teachers[4].state_dict(), states[3])
    modes = [[(x.tanh_activations, x.binary_activations, x.binary_weights) for x in layers(t)] for t in teachers[2::2]]
    assert modes == [[(True, False, False)] * 2, [(False, True, False)] * 2]
    assert teachers[2].stage2.single and not teachers[4].stage2.single
    assert hooks(run.model) == 0 and "_lesson" not in vars(run.model)


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, BinaryConv2d)]


@pytest.mark.parametrize("labels", [True, False])
def test_the_training_loss_is_that_of_the_labels_and_of_the_teacher(labels):
    # One batch an epoch, so that the loss reported is of the weights as the epoch before left them.
    phases = (Phase(0.5, binary_weights=False), Phase(0.5, binary_weights=False))
    teacher = Teacher(logits=5.0, attention=9.0, last="all", labels=labels)
    task = digits(epochs=2, batch_size=100, phases=phases, teacher=teacher)
    run = training(task)
    run.model.dropout.p = 0.0
    reports = run.epochs(2)
    next(reports)
    student, shown = copy.deepcopy(run.model).train(), frozen(run.model)
    x, y = next(task.load().train.batches(100))
    with torch.no_grad():
        outputs, target = student(x), shown(x)
        expected = 5.0 * slow_divergence(outputs, target, 1.0)
        if labels:
            expected += float(task.compute_loss(outputs, y))
        for name in student.transfer_points:
            with attention_maps(student, [name]) as own, attention_maps(shown, [name]) as maps:
                student(x), shown(x)
            expected += 9.0 * float((own[name] - maps[name]).square().mean())
    assert next(reports).metrics["train_loss"] == pytest.approx(expected, rel=1e-4)


def own_network():
    torch.rand(17)
    return network(5)


def test_a_network_of_the_users_own_teaches_the_first_phase():
    torch.manual_seed(4)
    model, before = network(), torch.get_rng_state()
    task = digits(epochs=2, phases=TWO_STEP, teacher=Teacher(network=own_network))
    run = training(task, model)
    assert torch.equal(torch.get_rng_state(), before)  # what making the teacher draws, the training does not
    expected = own_network().state_dict()
    for report in run.epochs(2):
        assert equal_states(run._lesson.network.state_dict(), expected) is (report.step == 1)
        assert (run.state()["teacher"] is None) is (report.step == 1)
    assert describe(task)["fields"]["recipe"]["fields"]["teacher"]["fields"]["network"] == {
        "function": f"{__name__}:own_network"
    }


def test_a_network_that_is_not_in_phases_can_be_taught():
    class Plain(nn.Sequential):
        transfer_points = ("0",)

    def plain():
        return Plain(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))

    teacher = Teacher(network=plain, last="all")
    reports = list(training(digits(epochs=1, teacher=teacher), plain()).epochs(1))
    bare = list(training(digits(epochs=1), plain()).epochs(1))
    assert reports[0].metrics["train_loss"] != bare[0].metrics["train_loss"]


# Whole trials.


def run_trial(worker, number, stop=None, **changes):
    assignment = Assignment(number, Evaluate(SMALL, **changes.pop("proposal", {})), changes.pop("seed", 5), **changes)
    items = []
    steps = worker.run(assignment)
    for item in steps:
        items.append(item)
        if stop is not None and len(items) == stop:
            steps.send(True)  # the checkpoint is written after the report was answered
            steps.close()
            return items
    assert items[-1].state == "complete", items[-1].traceback
    return items[:-1]


def weights(worker, number):
    return load_file(trial_folder(worker.folder, number) / "weights.safetensors")


def test_a_taught_trial_goes_on_wherever_it_was_killed_or_halved(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "CHECKPOINT_SECONDS", -1.0)
    task = digits(epochs=6, phases=PROGRESSIVE, teacher=Teacher(last="all"))
    worker = Worker(Binary(), task, tmp_path)
    whole = [report.metrics for report in run_trial(worker, 0)]
    for cut in range(1, 6):
        seen = run_trial(worker, cut, stop=cut)
        reports = [report.metrics for report in seen + run_trial(worker, cut)]
        assert reports == whole and equal_states(weights(worker, cut), weights(worker, 0))
    # A share of the epochs, and on from there: in the middle of a phase, and at a boundary.
    for number, budget in ((10, 0.5), (20, 1 / 3)):
        first = run_trial(worker, number, proposal={"budget": budget})
        second = run_trial(worker, number + 1, proposal={"weights_of": number}, source=SMALL, seed=99)
        assert [report.metrics for report in first + second] == whole
        assert equal_states(weights(worker, number + 1), weights(worker, 0))


@dataclass(frozen=True)
class Halves:
    """One network with half of the epochs, then with all of them."""

    def propose(self, history, rng):
        return Evaluate(SMALL, budget=(0.5, 1.0)[len(history)]) if len(history) < 2 else None


def test_a_candidates_network_is_in_the_phase_that_it_was_scored_in(tmp_path):
    task = digits(epochs=2, phases=TWO_STEP, teacher=Teacher())
    study = Study(
        Binary(), Halves(), task, [maximise("val_accuracy")], folder=tmp_path, tracker=None, keep_weights="all"
    )
    result = study.run(max_trials=2)
    for number, binary in ((0, False), (1, True)):
        candidate = result.candidate(number)
        assert [layer.is_binary for layer in layers(candidate.model())] == [binary, binary]
        scores = evaluate(candidate.model(), task, task.load().validation, "val", CPU, nullcontext)
        assert scores["val_loss"] == candidate.metrics["val_loss"]


# What is refused.


def two(first, second, points=("0",)):
    made = [nn.Sequential(*model, nn.Flatten(), nn.LazyLinear(10)) for model in (first, second)]
    for model in made:
        model.transfer_points = points
        model(torch.zeros(2, 1, 8, 8))
    return made


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"attention": -1}, "attention is -1; legal: a number from 0 up"),
        ({"logits": float("nan")}, "logits is nan"),
        ({"attention": float("inf")}, "attention is inf; legal: a number from 0 up"),
        ({"attention": "a"}, "attention is 'a'"),
        ({"temperature": float("inf")}, "temperature is inf; legal: a positive number"),
        ({"attention": 0, "logits": 0}, "both 0, so it teaches nothing"),
        ({"temperature": 0}, "temperature is 0; legal: a positive number"),
        ({"distance": "l1"}, "distance is 'l1'; legal: squared, norm"),
        ({"last": "none"}, "last is 'none'; legal: logits, all"),
        ({"network": nn.Linear(1, 1)}, "network is Linear; a function that makes one"),
        ({"network": "resnet"}, "network is str; a function that makes one"),
    ],
)
def test_a_teacher_says_what_is_wrong(wrong, says):
    with pytest.raises(InvalidInputError, match=says):
        Teacher(**wrong)


def test_a_network_without_transfer_points_is_refused_before_the_first_epoch():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(InvalidInputError, match=r"Sequential has no transfer points .* Teacher\(attention=0\)"):
        training(digits(phases="progressive", teacher=Teacher()), copy.deepcopy(plain))
    # Where attention is not matched, none are needed: here the second phase is the last one.
    for taught in ({"phases": TWO_STEP, "teacher": Teacher()}, {"phases": "expert", "teacher": Teacher(attention=0)}):
        assert len(list(training(digits(**taught), copy.deepcopy(plain)).epochs(3))) == 3


def test_transfer_points_that_are_wrong_are_said():
    model = network()
    model.transfer_points = ("stage1", "stage7", "")
    with pytest.raises(InvalidInputError, match="BinaryNetwork name no modules of it: , stage7"):
        transfer_points(model)
    with pytest.raises(InvalidInputError, match=r"transfer point 1 gives \(2, 8\); a tensor"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8))
        with attention_maps(model, ["1"]):
            model(torch.zeros(2, 4))
    with pytest.raises(InvalidInputError, match="does not run its transfer points head"), attention_maps(model, []):
        model = network()
        with attention_maps(model, ["head"]):
            pass
    one, other = two([nn.Conv2d(1, 2, 3)], [nn.Conv2d(1, 2, 5)])
    with pytest.raises(InvalidInputError, match="0 has 36 positions, the teacher's 0 has 16; equal"):
        Lesson(Teacher(), other, one, 1.0, 0.0)(one, torch.zeros(2, 1, 8, 8))
    other.transfer_points = ("0", "1")
    with pytest.raises(InvalidInputError, match="1 transfer points of Sequential and 2 of its teacher"):
        Lesson(Teacher(), other, one, 1.0, 0.0)


def test_outputs_that_are_no_logits_of_one_shape_are_refused():
    for shape in ((4,), (4, 5), (2, 4, 3)):
        with pytest.raises(InvalidInputError, match=r"both must be \(n, classes\); or ask for Teacher\(logits=0\)"):
            divergence(torch.zeros(shape), torch.zeros(4, 3) if len(shape) == 2 else torch.zeros(shape), 1.0)


def test_equal_teachers_make_equal_tasks():
    task = digits(phases=PROGRESSIVE, teacher=Teacher())
    assert describe(task) == describe(digits(phases="progressive", teacher=Teacher()))
    changed = replace(task, recipe=replace(task.recipe, teacher=Teacher(temperature=2.0)))
    assert describe(task) != describe(changed)
