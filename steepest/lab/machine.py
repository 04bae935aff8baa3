"""Who runs a trial: machine, process and its start, so that a dead worker is known from a live one."""

import contextlib
import functools
import os
import platform
import socket
import sys
from pathlib import Path
from typing import Any


@functools.cache
def _place() -> str:
    """This machine (and, in a container, this container) since its last boot."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(str(Path(path).readlink()) if path.endswith("pid") else Path(path).read_text().strip()[:8])
        except OSError:
            continue
    return "/".join(parts)


def me() -> dict[str, Any]:
    """This process, as plain data."""
    pid = os.getpid()
    return {"place": _place(), "pid": pid, "started": _started(pid)}


def is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether the process of `me()` still runs; None if it is on another machine, or if we cannot know."""
    if owner.get("place") != _place() or os.name != "posix":
        return None
    pid = int(owner["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    started = _started(pid)
    if sys.platform == "linux":
        return started is not None and started == owner.get("started")
    return True


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (Linux); None if it is gone, a zombie, or not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def environment(device: Any) -> dict[str, Any]:
    """Versions and machine, for the report."""
    import torch

    from steepest import __version__

    name = str(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steepest": __version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": name,
    }


def cpu_name() -> str:
    """The processor's name and its number of usable cores."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name} ({cores()} cores)"


def cores() -> int:
    """Number of cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def reset_peak_memory(device: Any) -> None:
    """Start a new measurement of `peak_memory`."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: Any) -> int | None:
    """Bytes at the peak since the last reset: of CUDA memory, or of the whole process on a CPU; None if unknown."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
