from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Mlp, climb, python
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nasplat import Task
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.identity import canonical, content_hash, describe, restore, source_hash, type_name


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = (1, 2)
    call: Any = None
    cache: Any = field(default=None, compare=False)


ALLOWED = {type_name(Inner): Inner, type_name(Outer): Outer}


@given(st.floats(allow_nan=False), st.lists(st.integers(), max_size=4))
def test_a_dataclass_is_restored_from_its_description(rate, sizes):
    made = Outer(Inner(rate), tuple(sizes))
    assert restore(describe(made), ALLOWED) == made


def test_what_is_not_compared_is_not_described():
    assert describe(Outer(cache=object())) == describe(Outer())
    assert describe(Outer(Inner(0.2))) != describe(Outer())


def test_functions_go_by_name_tensors_by_content():
    assert describe(climb) == {"function": "helpers:climb"}
    assert describe(torch.ones(2)) == describe(np.ones(2, dtype=np.float32))
    assert describe(torch.ones(2)) != describe(torch.ones(3))
    assert describe(np.float64(0.5)) == 0.5
    assert describe(np.int64(3)) == 3
    assert describe(Inner) == {"class": type_name(Inner)}


KINDS = [np.float32, np.int64, np.bool_, np.uint8]


@given(hnp.arrays(st.sampled_from(KINDS), hnp.array_shapes(min_dims=0, min_side=0)))
def test_the_hash_of_a_tensor_depends_on_dtype_shape_and_content(array):
    tensor = torch.from_numpy(array.copy())
    assert content_hash(tensor) == content_hash(tensor.clone())
    assert content_hash(tensor) != content_hash(tensor[None])
    assert content_hash(tensor) != content_hash(tensor.to(torch.float64))
    if tensor.numel():
        other = tensor.clone().reshape(-1)
        other[0] = ~other[0] if other.dtype == torch.bool else other[0] + 1
        if other.numpy().tobytes() != array.tobytes():  # NaN + 1 and 1e30 + 1 are what they were
            assert content_hash(other.reshape(tensor.shape)) != content_hash(tensor)


def test_layout_does_not_change_the_hash():
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert content_hash(x) == content_hash(x.to(memory_format=torch.channels_last))
    assert content_hash(x[:, :, ::2]) == content_hash(x[:, :, ::2].contiguous())
    assert content_hash(torch.arange(5.0)[::3][:1]) == content_hash(torch.zeros(1))


@pytest.mark.parametrize("value", [object(), functools.partial(climb, budget=1), torch.Generator()])
def test_what_is_known_only_by_its_address_is_refused(value):
    with pytest.raises(InvalidInputError, match="cannot be told apart"):
        describe(Outer(call=value))


def test_nothing_but_what_is_allowed_is_made(tmp_path):
    for description in (
        {"type": "os:system", "fields": {}},
        {"type": "helpers:Mlp", "fields": {}},
        {"function": "os:system"},
        {"class": "subprocess:Popen"},
        {"loader": "mine"},
        {"tensor": "00"},
        {"type": type_name(Outer), "fields": {"call": {"function": "os:system"}}},
    ):
        with pytest.raises(UnsupportedError, match="script"):
            restore(description, ALLOWED)


def test_a_field_that_the_class_no_longer_has_is_left_out():
    assert restore({"type": type_name(Inner), "fields": {"rate": 1.0, "gone": 2}}, ALLOWED) == Inner(1.0)


def test_canonical_texts_are_equal_across_processes():
    script = (
        "from helpers import Mlp; from nasplat import Task; from nasplat.identity import canonical, describe; "
        "print(canonical([describe(Mlp()), describe(Task.digits(epochs=2))]), end='')"
    )
    out, err = python(script).communicate(timeout=100)
    assert out == canonical([describe(Mlp()), describe(Task.digits(epochs=2))]), err


def test_a_task_of_tensors_is_known_by_their_content():
    x, y = torch.rand(20, 3), torch.arange(20) % 2
    assert describe(Task.from_tensors(x, y)) == describe(Task.from_tensors(x.clone(), y.numpy()))
    other = x.clone()
    other[3, 1] += 1
    assert describe(Task.from_tensors(other, y)) != describe(Task.from_tensors(x, y))


def test_the_source_of_a_function_is_hashed_and_of_a_builtin_is_none():
    assert source_hash(climb) != source_hash(describe)
    assert len(source_hash(climb) or "") == 16
    assert source_hash(len) is None
