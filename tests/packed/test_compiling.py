"""Who compiles, who waits, what is said: with a stand-in for what takes half a minute."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

import pytest

numba = pytest.importorskip("numba")

from nasplat.errors import NasplatWarning  # noqa: E402
from nasplat.packed import compiling  # noqa: E402


@pytest.fixture(autouse=True)
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path / f"nasplat-packed-{os.getuid()}.lock"


def test_what_is_in_the_cache_is_not_announced(capsys):
    assert compiling._compiled(lambda fingerprint, cache: (len(fingerprint), cache)) == (64, True)
    assert capsys.readouterr().err == ""


def test_compiling_is_announced_once(capsys):
    def make(fingerprint, cache):
        first = numba.njit("int64(int64)")(lambda x: x + 1)
        second = numba.njit("int64(int64)")(lambda x: x + 2)
        return [first(1), second(1)]

    assert compiling._compiled(make) == [2, 3]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "compiling the packed kernels for" in said[0] and "compiled in" in said[1]


def test_without_a_place_for_the_cache_it_compiles_and_warns():
    def make(fingerprint, cache):
        if cache:
            raise RuntimeError("cannot cache function 'execute': no locator available for file 'x.py'")
        return "compiled"

    with pytest.warns(NasplatWarning, match="NUMBA_CACHE_DIR=/some/folder"):
        assert compiling._compiled(make) == "compiled"


def test_other_errors_pass():
    def make(fingerprint, cache):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        compiling._compiled(make)


@pytest.mark.parametrize("how", ["folder", "link"])
def test_a_lock_that_cannot_be_had_stops_nobody(how, lock):
    if how == "folder":
        lock.mkdir()
    else:
        lock.symlink_to("/nowhere/else")
    assert compiling._compiled(lambda fingerprint, cache: 1) == 1


def test_one_that_waits_says_so_and_does_not_wait_for_ever(lock, monkeypatch, capsys):
    monkeypatch.setattr(compiling, "_PATIENCE", 2.5)
    other = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert compiling._compiled(lambda fingerprint, cache: 1) == 1
    finally:
        os.close(other)
    assert "waiting for another process that compiles" in capsys.readouterr().err


def test_the_lock_is_held_meanwhile_and_let_go(lock):
    def free():
        other = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(other)
        return True

    assert compiling._compiled(lambda fingerprint, cache: free()) is False
    assert free()


def test_ctrl_c_takes_effect_when_the_kernels_are_there(capsys):
    done = []

    def make(fingerprint, cache):
        os.kill(os.getpid(), signal.SIGINT)
        done.append(True)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        compiling._compiled(make)
    assert done and signal.getsignal(signal.SIGINT) is before
    assert "stopping as soon as" in capsys.readouterr().err
