from __future__ import annotations

import json
import math
import random
import threading

import pytest
import torch
from torch import nn

from nasplat.cost.anchor import KEPT, AnchorRecord, anchor_network, anchor_session
from nasplat.nn.binary import is_binary
from nasplat.runtimes import OnnxRuntime, TorchEager

NONSENSE = [
    "", "{", "[]", "null", "7", '"text"', '{"key": [0.5', "\x00\xff", '{"key": 3}', '{"key": "abc"}', '{"key": null}',
    '{"key": {"a": 1}}', '{"key": ["a", "b"]}', '{"key": [null]}', '{"key": [[1.0]]}', '{"key": []}',
    '{"key": [NaN]}', '{"key": [Infinity, -Infinity]}', '{"key": [-1.0, 0.0]}', '{"key": [1e400]}',
]  # fmt: skip


def files(folder):
    return [path for path in folder.iterdir() if path.is_file()]


def stored(folder):
    (path,) = files(folder)
    return path


# The network.


def test_the_anchor_is_the_same_network_every_time_and_takes_no_randomness():
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    (a, x), (b, y) = anchor_network(), anchor_network()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert torch.equal(x, y) and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert not a.training and is_binary(a) and not any(p.requires_grad for p in a.parameters())
    assert any(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in a.modules())
    torch.manual_seed(4)
    assert torch.equal(anchor_network()[0](x), a(x))


@pytest.mark.parametrize("runtime", [TorchEager(), OnnxRuntime()], ids=lambda runtime: runtime.name)
def test_every_runtime_runs_it_and_makes_it_once(runtime):
    model, x = anchor_network()
    session = anchor_session(runtime, 1)
    assert session is anchor_session(type(runtime)(), 1)
    session.run()
    # Not the same numbers everywhere: sums of signs are zero exactly or nearly.
    assert session.output().shape == model(x).shape and session.output().isfinite().all()
    assert session.seconds() > 0


# The record.


def test_nothing_is_known_at_first(tmp_path):
    assert AnchorRecord(tmp_path).reference_ms("key") == math.inf


def test_the_reference_is_quick_but_not_the_single_quickest_of_many(tmp_path):
    record = AnchorRecord(tmp_path)
    for value in [0.01, *(1.0 + index / 1000 for index in range(20)), *(2.0 for _ in range(20))]:
        record.add("key", value)
    assert 1.0 <= record.reference_ms("key") < 1.02
    assert AnchorRecord(tmp_path).reference_ms("key") == record.reference_ms("key")


def test_one_measurement_is_enough_to_know_something(tmp_path):
    AnchorRecord(tmp_path).add("key", 0.7)
    assert AnchorRecord(tmp_path).reference_ms("key") == 0.7


def test_keys_do_not_mix(tmp_path):
    record = AnchorRecord(tmp_path)
    record.add("a", 1.0)
    record.add("b", 5.0)
    assert (record.reference_ms("a"), record.reference_ms("b")) == (1.0, 5.0)
    assert record.reference_ms("c") == math.inf


def test_its_length_is_bounded_and_the_oldest_go(tmp_path):
    record = AnchorRecord(tmp_path)
    record.add("key", 0.001)
    for _ in range(KEPT + 20):
        record.add("key", 3.0)
    assert record.reference_ms("key") == 3.0
    assert len(stored(tmp_path).read_text()) < 20 * KEPT


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_on_disk_is_no_error_and_does_not_last(tmp_path, text):
    record = AnchorRecord(tmp_path)
    record.add("other", 1.0)
    stored(tmp_path).write_bytes(text.encode("latin-1"))
    reference = record.reference_ms("key")
    assert reference > 0 and not math.isnan(reference)
    for _ in range(5):
        record.add("key", 0.5)
    assert record.reference_ms("key") == 0.5
    assert json.loads(stored(tmp_path).read_text())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_time_is_not_remembered_as_one(tmp_path, value):
    record = AnchorRecord(tmp_path)
    record.add("key", value)
    record.add("key", 0.5)
    record.add("key", 0.5)
    assert record.reference_ms("key") == 0.5


def test_a_torn_file_is_never_seen_and_nothing_is_left_beside(tmp_path):
    """While one writes, another reads: always a whole record."""
    record, seen, stop = AnchorRecord(tmp_path), set(), threading.Event()
    record.add("key", 1.0)

    def read():
        while not stop.is_set():
            seen.add(AnchorRecord(tmp_path).reference_ms("key"))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(KEPT):
        record.add("key", 1.0)
    stop.set()
    reader.join()
    assert seen == {1.0}
    assert len(files(tmp_path)) == 1


def test_what_a_killed_writer_left_is_no_trouble(tmp_path):
    record = AnchorRecord(tmp_path)
    record.add("key", 1.0)
    path = stored(tmp_path)
    path.with_suffix(".tmp").write_text('{"key": [')
    record.add("key", 1.0)
    assert record.reference_ms("key") == 1.0
