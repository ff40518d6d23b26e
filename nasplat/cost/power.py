"""Counters of the energy that a machine has used: RAPL of processors, NVML of NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from nasplat.errors import UnsupportedError

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows RAPL's domains, those of AMD's processors too, under the name of Intel's."""


class EnergyCounter(Protocol):
    """Counts energy since it was made.

    Attributes:
        name: What counts: ``rapl`` or ``nvml``.
        domains: What it counts the energy of.
    """

    @property
    def name(self) -> str:
        """What counts."""
        ...

    @property
    def domains(self) -> tuple[str, ...]:
        """What it counts the energy of."""
        ...

    def joules(self) -> float:
        """Energy used since the counter was made."""
        ...


class Rapl:
    """Energy of all processor packages: cores, caches, memory controllers; not the memory chips.

    Must be asked again before a hardware counter has gone round twice, which takes a minute at the least.

    Raises:
        UnsupportedError: There is no such counter, or this user may not read it.
    """

    name = "rapl"

    def __init__(self) -> None:
        self._zones = [zone for zone in sorted(POWERCAP.glob("intel-rapl:*")) if _text(zone / "name")[:7] == "package"]
        if not self._zones:
            raise UnsupportedError(
                f"this machine shows no RAPL counter (no package domain in {POWERCAP}/intel-rapl:*): "
                "virtual machines, containers and processors other than x86 mostly do not"
            )
        self.domains = tuple(_text(zone / "name") for zone in self._zones)
        self._last = [_microjoules(zone / "energy_uj") for zone in self._zones]
        self._ranges = [_microjoules(zone / "max_energy_range_uj") for zone in self._zones]
        self._sum = 0

    def joules(self) -> float:
        """Energy used since the counter was made."""
        for index, zone in enumerate(self._zones):
            now = _microjoules(zone / "energy_uj")
            step = now - self._last[index]
            self._sum += step if step >= 0 else step + self._ranges[index]
            self._last[index] = now
        return self._sum / 1e6


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _microjoules(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise UnsupportedError(
            f"{path} may not be read by this user (kernels keep RAPL for root); sudo chmod a+r {path} allows it"
        ) from error
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"{path} cannot be read: {error}") from error


class Nvml:
    """Energy of the current CUDA device, its memory and board included (Volta and later).

    Raises:
        UnsupportedError: There is no such counter, or no library to read it.
    """

    name = "nvml"

    def __init__(self) -> None:
        try:
            pynvml: Any = import_module("pynvml")
        except ImportError as error:
            raise UnsupportedError("energy of a GPU is read with NVML: pip install nvidia-ml-py") from error
        if not torch.cuda.is_available():
            raise UnsupportedError("torch finds no CUDA device")
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.domains = (str(properties.name),)
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{properties.uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._read: Callable[[], int] = lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
            self._first = self._read()
        except pynvml.NVMLError as error:
            raise UnsupportedError(f"NVML cannot read the energy of {properties.name}: {error}") from error

    def joules(self) -> float:
        """Energy used since the counter was made."""
        return (self._read() - self._first) / 1e3


def counter_of(device: str) -> EnergyCounter:
    """The counter of what computes: RAPL for ``cpu``, NVML for ``cuda``.

    Raises:
        UnsupportedError: It cannot be read here; the message says why.
    """
    return Nvml() if device.startswith("cuda") else Rapl()


def unreadable(device: str) -> str:
    """Why there is no such counter here; empty where there is one."""
    why = ""
    try:
        counter_of(device)
    except UnsupportedError as error:
        why = str(error)
    return why
