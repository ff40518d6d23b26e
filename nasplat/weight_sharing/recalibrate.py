"""Batch-norm statistics of one network, estimated anew.

The running statistics of a supernet are of all the paths that it was trained on, and suit none of them: before a path
is scored they are estimated again, from training data, for that path alone (Guo et al. 2020, arXiv:1904.00420,
section on the search).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError
from nasplat.task import Task
from nasplat.train import place


def recalibrate(
    network: nn.Module,
    batches: Iterable[Tensor],
    step: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Replace the running statistics of all batch norms by averages over these batches, in place.

    Each mean is the average of the batches' means, each variance that of their unbiased variances. Everything but the
    batch norms is in evaluation mode meanwhile (no dropout), nothing has a gradient, and nothing else changes.
    A batch norm that no batch reaches (of an option that is not computed) is left with mean 0 and variance 1; one
    without running statistics is left alone.

    Args:
        network: Takes a batch.
        batches: Inputs ``(n, ...)`` on the network's device, each of at least 2 examples.
        step: Wraps each forward pass.

    Raises:
        InvalidInputError: There is no batch.
    """
    norms = _norms(network)
    modes = {module: module.training for module in network.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    calls = dict.fromkeys(norms, 0)

    def count(norm: nn.Module, _: object) -> None:
        # A norm that is applied several times in a pass averages over all of them.
        assert isinstance(norm, _BatchNorm)
        calls[norm] += 1
        norm.momentum = 1 / calls[norm]

    hooks = [norm.register_forward_pre_hook(count) for norm in norms]
    try:
        network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        number = 0
        for number, x in enumerate(batches, start=1):
            for norm in norms:
                # Weight 1/k for the k-th batch makes the running value an average. Layers that compute several
                # norms at once read it here, and never call the modules.
                norm.momentum = 1 / number
            with step(), torch.no_grad():
                network(x)
        if not number:
            raise InvalidInputError("there is no batch to recalibrate with; at least 1 is needed")
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training


@contextmanager
def kept_statistics(network: nn.Module) -> Iterator[None]:
    """Give all batch norms their running statistics back at the end, to the last bit."""
    before = {buffer: buffer.clone() for norm in _norms(network) for buffer in norm.buffers(recurse=False)}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)


def calibration_batches(task: Task, count: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Inputs of training batches in an order drawn from the seed, as they are: validation data is not augmented either.

    Args:
        task: Its training data, in batches of its recipe's size.
        count: How many, at least 1. Where one pass over the data has fewer, it begins again in a new order.
        seed: Of the order, in [0, 2**32).
        device: Where to put them.

    Yields:
        Inputs ``(n, ...)`` of at least 2 examples.

    Raises:
        InvalidInputError: ``count`` is no integer from 1 up, or the data has no batch of 2 examples.
    """
    if not is_whole(count):
        raise InvalidInputError(f"the number of batches is {count!r}; an integer from 1 up is needed")
    return islice(_endless(task, seed, device), count)


def _endless(task: Task, seed: int, device: torch.device) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(seed)
    source = task.load().train
    while True:
        found = False
        for x, _ in source.batches(task.recipe.batch_size, order):
            if len(x) > 1:
                found = True
                yield place(x, device)
        if not found:
            raise InvalidInputError("the training data has no batch of at least 2 examples to recalibrate with")


def _norms(network: nn.Module) -> list[_BatchNorm]:
    return [
        module for module in network.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
