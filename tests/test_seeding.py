from __future__ import annotations

import random

import numpy as np
import torch

from nasplat import seeding
from nasplat.worker import load_checkpoint, save_checkpoint


def draw():
    numpy = float(np.random.rand()), float(np.random.randn())  # noqa: NPY002
    return random.random(), random.gauss(0, 1), *numpy, float(torch.rand(()))


def test_a_seed_decides_and_the_caller_gets_its_generators_back():
    before = seeding.get_state()
    with seeding.seeded(3):
        first = draw()
    with seeding.seeded(3):
        assert draw() == first
    with seeding.seeded(4):
        assert all(a != b for a, b in zip(draw(), first, strict=True))
    after = seeding.get_state()
    assert torch.equal(before.pop("torch"), after.pop("torch")) and before == after


def test_a_state_survives_a_checkpoint(tmp_path):
    with seeding.seeded(5):
        draw()  # leaves one of two normal numbers cached, in Python and in NumPy
        save_checkpoint({"generators": seeding.get_state()}, tmp_path / "checkpoint.pt")
        expected = [draw(), draw()]
        seeding.set_state(load_checkpoint(tmp_path / "checkpoint.pt")["generators"])
        assert [draw(), draw()] == expected
