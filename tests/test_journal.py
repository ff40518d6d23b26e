from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest
from helpers import contents, python

from nasplat.errors import FolderInUseError, JournalError
from nasplat.journal import FILE, Journal, read

HEADER = {"event": "study", "schema": 1}
EVENTS = [HEADER, {"event": "start", "trial": 0}, {"event": "finish", "trial": 0, "metrics": {"a": 0.1}}]

HOLD = """
import sys, time
from pathlib import Path
from nasplat.journal import Journal
with Journal(Path(sys.argv[1])) as journal:
    journal.append({"event": "study", "schema": 1})
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path):
    with Journal(tmp_path / "deep" / "study") as journal:
        for event in EVENTS:
            journal.append(event, durable=event["event"] == "finish")
    return tmp_path / "deep" / "study"


def test_what_is_written_is_read(folder):
    assert read(folder) == (EVENTS, (folder / FILE).stat().st_size)
    with Journal(folder) as journal:
        assert journal.events == EVENTS
        assert list(journal) == EVENTS
        assert journal.torn is None
        journal.append({"event": "end", "text": "ü\n"})
    assert read(folder)[0] == [*EVENTS, {"event": "end", "text": "ü\n"}]


def test_an_empty_or_missing_folder_has_no_events(tmp_path):
    assert read(tmp_path / "none") == ([], 0)
    assert not (tmp_path / "none").exists()


TORN = [b'{"event":"fin', b'{"event":"finish","trial":1}', b"\x00\x00\xff", b'{"event":"f\n', b"\n"]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_last_line_is_set_aside_and_nothing_before_it_is_lost(folder, torn):
    whole = (folder / FILE).read_bytes()
    with (folder / FILE).open("ab") as file:
        file.write(torn)
    assert read(folder) == (EVENTS, len(whole))
    assert (folder / FILE).read_bytes() == whole + torn
    with Journal(folder) as journal:
        assert journal.events == EVENTS
        assert journal.torn is not None
        assert torn.rstrip(b"\n") in journal.torn.read_bytes()
        journal.append({"event": "end"})
    assert (folder / FILE).read_bytes() == whole + b'{"event":"end"}\n'


def test_every_cut_of_a_journal_reads_as_the_whole_lines_before_it(folder):
    whole = (folder / FILE).read_bytes()
    for length in range(len(whole) + 1):
        (folder / FILE).write_bytes(whole[:length])
        events, end = read(folder)
        assert events == EVENTS[: whole[:length].count(b"\n")]
        assert whole[:end].count(b"\n") == len(events)


def test_two_torn_lines_are_both_kept(folder):
    for text in (b"one", b"two"):
        with (folder / FILE).open("ab") as file:
            file.write(text)
        Journal(folder).close()
    assert (folder / f"{FILE}.torn").read_bytes().split() == [b"one", b"two"]


@pytest.mark.parametrize("broken", [b"{", b"[1]", b'{"no": "event"}', b"", b"\xff"])
def test_a_broken_line_in_the_middle_is_named_and_nothing_is_changed(folder, broken):
    lines = (folder / FILE).read_bytes().splitlines()
    (folder / FILE).write_bytes(b"\n".join([lines[0], broken, *lines[1:], b""]))
    before = contents(folder)
    for opened in (read, Journal):
        with pytest.raises(JournalError, match=r"line 2 is broken.*2 lines follow.*keep the first 1 lines"):
            opened(folder)
    assert contents(folder)[FILE] == before[FILE]
    (folder / FILE).write_bytes(b"\n".join([*lines, b""]))
    Journal(folder).close()  # the refusal did not keep the lock


@pytest.mark.parametrize("schema", [2, None, "1"])
def test_another_schema_is_named(folder, schema):
    (folder / FILE).write_text(json.dumps({"event": "study", "schema": schema}) + "\n")
    with pytest.raises(JournalError, match="this nasplat reads schema 1"):
        read(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_is_not_json_is_refused_and_leaves_the_file_whole(folder, value):
    with Journal(folder) as journal, pytest.raises((ValueError, TypeError)):
        journal.append({"event": "report", "value": value})
    assert read(folder)[0] == EVENTS


def test_a_held_folder_names_its_holder_and_kill_frees_it(tmp_path):
    holder = python(HOLD, tmp_path)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=rf"process {holder.pid}\b"):
            Journal(tmp_path)
        assert read(tmp_path)[0] == [HEADER]  # a reader needs no lock
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate(timeout=60)
    with Journal(tmp_path) as journal:
        assert journal.events == [HEADER]
        with pytest.raises(FolderInUseError, match=rf"process {os.getpid()}\b"):
            Journal(tmp_path)


def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    journal = Journal(tmp_path)
    go = multiprocessing.get_context("fork").Event()
    child = multiprocessing.get_context("fork").Process(target=go.wait, daemon=True)
    child.start()
    try:
        journal.close()
        journal.close()  # twice is harmless
        Journal(tmp_path).close()
    finally:
        go.set()
        child.join(60)


def test_a_reader_sees_whole_events_while_another_process_writes(tmp_path):
    script = """
import sys
from pathlib import Path
from nasplat.journal import Journal
with Journal(Path(sys.argv[1])) as journal:
    journal.append({"event": "study", "schema": 1})
    for number in range(600):
        journal.append({"event": "report", "trial": number, "text": "x" * 2000})
"""
    writer = python(script, tmp_path)
    seen = 0
    while writer.poll() is None:
        events, _ = read(tmp_path)
        assert [event["trial"] for event in events[1:]] == list(range(len(events[1:])))
        assert len(events) >= seen
        seen = len(events)
    assert writer.communicate()[1] == ""
    assert len(read(tmp_path)[0]) == 601
