from __future__ import annotations

import gc
import os
import signal

import pytest
import torch

from nasplat import Task

LONG = ("test_studies.py", "test_ray_tune.py", "test_readme.py", "test_bundle.py", "test_optuna_search.py")
"""Files that take longest. ``make test`` begins them first, so that its two workers end at about the same time."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the files of ``make test``, which gives them to its workers one by one: their tests share fixtures."""
    if hasattr(config, "workerinput"):
        order = {name: index for index, name in enumerate(LONG)}
        items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """What is compared between runs is computed on one thread; two cores are shared with other work."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_bench(tmp_path_factory):
    """Tests neither wait for measurements of other processes, nor leave anchors in the record of this machine.

    Beside each other they never find it quiet, so they do not wait for that either.
    """
    os.environ["NASPLAT_BENCH_FOLDER"] = str(tmp_path_factory.mktemp("bench"))
    os.environ["NASPLAT_BENCH_PATIENCE"] = "0.2"


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """A measurement collects garbage first: that is not to look at all modules that are loaded by now."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def ctrl_c():
    """Python's own handler, also where the tests run in the background of a shell, which makes children ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def blobs() -> Task:
    """200 points of three classes in 4 dimensions, 2 epochs: a training of milliseconds."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 3
    x = torch.randn(200, 4, generator=generator) + 2.0 * torch.nn.functional.one_hot(y, 4)
    return Task.from_tensors(x, y, epochs=2, batch_size=32, lr=0.02, name="blobs", x_test=x[:20], y_test=y[:20])
