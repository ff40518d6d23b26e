from __future__ import annotations

import copy
import json
import pickle

import pytest
from helpers import Mlp, python
from hypothesis import given
from hypothesis import strategies as st

from nasplat import Architecture
from nasplat.errors import ArchitectureError

numbers = st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.booleans() | numbers | st.text()
genes = st.dictionaries(st.text(max_size=5), scalars, max_size=5)


@given(st.text(max_size=5), genes)
def test_json_pickle_and_copy_round_trip(space, genes):
    architecture = Architecture(space, genes)
    for other in (
        Architecture.from_json(architecture.to_json()),
        Architecture.from_json(architecture.to_json(indent=None)),
        pickle.loads(pickle.dumps(architecture)),
        copy.deepcopy(architecture),
    ):
        assert other == architecture
        assert hash(other) == hash(architecture)
        assert other.id == architecture.id
        assert dict(other.genes) == genes


def test_the_order_of_genes_carries_no_meaning_but_space_type_and_value_do():
    base = Architecture("s", {"a": 1, "b": 2})
    assert Architecture("s", {"b": 2, "a": 1}) == base
    others = [
        Architecture("t", {"a": 1, "b": 2}),
        Architecture("s", {"a": 2, "b": 1}),
        Architecture("s", {"a": 1.0, "b": 2}),
        Architecture("s", {"a": True, "b": 2}),
        Architecture("s", {"a": "1", "b": 2}),
        Architecture("s", {"a": 1}),
    ]
    assert len({base, *others}) == 1 + len(others)
    assert base != "s"


def test_the_id_is_the_same_in_another_process_and_in_the_next_release():
    architecture = Architecture("Mlp{}", {"width": 4, "act": "relu", "norm": False})
    script = (
        "from nasplat import Architecture; "
        "print(Architecture('Mlp{}', {'norm': False, 'act': 'relu', 'width': 4}).id, end='')"
    )
    out, _ = python(script).communicate(timeout=100)
    assert out == architecture.id
    assert architecture.id == "fce68aaac7700a93"


def test_it_cannot_be_changed():
    genes = {"a": 1}
    architecture = Architecture("s", genes)
    genes["a"] = 2
    assert architecture.genes["a"] == 1
    with pytest.raises(TypeError):
        architecture.genes["a"] = 3  # type: ignore[index]
    with pytest.raises(AttributeError):
        architecture.space = "t"  # type: ignore[misc]


def edited(**changes):
    return json.dumps({**json.loads(Architecture("s", {"a": 1}).to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not an architecture"),
        ("[]", "not an architecture"),
        ("3", "not an architecture"),
        ('"text"', "not an architecture"),
        ('{"schema": 1, "space": "s"}', "genes"),
        ('{"schema": 1, "space": "s", "genes": [1]}', "genes an object"),
        ('{"schema": 1, "space": 3, "genes": {}}', "space must be a string"),
        (edited(schema=2), "schema 2; this nasplat reads schema 1"),
        (edited(genes={"a": 2}), "does not belong to these genes"),
        (edited(id="0" * 16), "does not belong to these genes"),
        (edited(id=None), "does not belong to these genes"),
    ],
)
def test_wrong_json_is_refused_in_words(text, says):
    with pytest.raises(ArchitectureError, match=says):
        Architecture.from_json(text)


def test_json_without_an_id_is_taken():
    record = json.loads(Architecture("s", {"a": 1}).to_json())
    del record["id"]
    record["genes"]["a"] = 2
    assert Architecture.from_json(json.dumps(record)) == Architecture("s", {"a": 2})


def test_a_space_with_other_parameters_makes_other_architectures():
    genes = {"width": 4, "depth": 1, "act": "relu", "norm": False}
    assert Mlp(3).architecture(genes) != Mlp(4).architecture(genes)
    assert Mlp(3).architecture(genes) == Mlp(3).architecture(genes)
