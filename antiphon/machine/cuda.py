"""What the CUDA driver reports about this machine.

It runs in its own process, so that a driver that hangs can be abandoned and the caller gets no context on any GPU.

    python -m antiphon.machine.cuda PINNED_BYTES      prints `Gpus` as JSON
"""

from __future__ import annotations

import mmap
import os
import sys
from importlib import import_module
from typing import Any

import msgspec
import torch

from antiphon.core.errors import first_line
from antiphon.machine.facts import Check, Gpu, Gpus, Peer

_PCI_ATTRIBUTES = ("PCI_DOMAIN_ID", "PCI_BUS_ID", "PCI_DEVICE_ID")


def probe_gpus(pinned_bytes: int) -> Gpus:
    """All GPUs that this process may use. Creates a context on each.

    pinned_bytes: how much shared host memory to register with the driver, as a trial.
    Never raises, but hangs if the driver does.
    """
    if torch.version.cuda is None:
        return Gpus(problem="this torch build has no CUDA support")
    try:
        if not torch.cuda.is_available():
            return Gpus(problem="torch sees no CUDA device")
        count = torch.cuda.device_count()
        devices = tuple(_device(index) for index in range(count))
    except Exception as error:
        return Gpus(problem=f"the CUDA driver failed: {first_line(error)}")
    pairs = [(source, target) for source in range(count) for target in range(count) if source != target]
    peers = tuple(Peer(source=s, target=t, access=_peer_access(s, t)) for s, t in pairs)
    return Gpus(
        devices=devices,
        peers=peers,
        pinned_memory=_pin(pinned_bytes),
        pinned_bytes=pinned_bytes,
        direct_launches=_direct_launches(),
    )


def _device(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    try:
        free_bytes: int | None = torch.cuda.mem_get_info(index)[0]
    except Exception:  # for example, another process uses the GPU exclusively
        free_bytes = None
    flush = _attribute(index, "CAN_FLUSH_REMOTE_WRITES")
    return Gpu(
        index=index,
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory_total_bytes=properties.total_memory,
        memory_free_bytes=free_bytes,
        pci=_pci(index, properties),
        stream_memory_operations=_stream_memory_operations(index),
        flushes_remote_writes=None if flush is None else bool(flush),
    )


def _pci(index: int, properties: Any) -> str | None:
    domain, bus, device = (_attribute(index, name) for name in _PCI_ATTRIBUTES)
    if domain is None or bus is None or device is None:
        domain, bus, device = (getattr(properties, name.lower(), None) for name in _PCI_ATTRIBUTES)
    if domain is None or bus is None or device is None:
        return None
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def _attribute(index: int, name: str) -> int | None:
    """A device attribute by the driver's name; `None` without cuda.bindings or if the driver does not report it."""
    try:
        driver = import_module("cuda.bindings.driver")
        error, device = driver.cuDeviceGet(index)
        if int(error) == 0:
            attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            error, value = driver.cuDeviceGetAttribute(attribute, device)
            if int(error) == 0:
                return int(value)
    except Exception:
        pass
    return None


def _stream_memory_operations(index: int) -> Check:
    """Write a word and wait for it on a stream, with the operations that the transports use."""
    try:
        memory = import_module("antiphon.device.cuda_stream_memory")
    except ImportError as error:
        return Check(ok=None, detail=f"cuda.bindings cannot be imported: {first_line(error)}")
    device = torch.device("cuda", index)
    try:
        flush = memory.check_stream_memory_operations(device, "a transport that takes no SMs")
        with torch.cuda.device(device):
            word = torch.zeros(1, dtype=torch.int32, device=device)
            stream = torch.cuda.current_stream().cuda_stream
            write, wait = (memory.StreamOperations(flush=flush) for _ in range(2))
            write.write(word.data_ptr(), 1)
            write.queue(stream)  # apart from the wait, which would never end if this failed
            wait.wait(word.data_ptr(), 1)
            wait.queue(stream)
            torch.cuda.synchronize()
    except Exception as error:
        return Check(ok=False, detail=first_line(error))
    return Check(ok=True, detail="a word was written and waited for by a stream")


def _peer_access(source: int, target: int) -> bool | None:
    try:
        return bool(torch.cuda.can_device_access_peer(source, target))
    except Exception:
        return None


def _pin(num_bytes: int) -> Check:
    """Register memory from a memfd with the driver, as `host-staged` does."""
    try:
        memory = import_module("antiphon.device.cuda_stream_memory")
        descriptor = os.memfd_create("antiphon-probe")
    except (ImportError, AttributeError, OSError) as error:
        return Check(ok=None, detail=first_line(error))
    try:
        os.ftruncate(descriptor, num_bytes)
        tensor = torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
        torch.cuda.synchronize(0)  # makes its context the current one
        memory.register_host_memory(tensor, "the trial")  # unregistered when the process ends
    except Exception as error:
        return Check(ok=False, detail=first_line(error))
    finally:
        os.close(descriptor)
    return Check(ok=True, detail=f"{num_bytes >> 20} MiB of shared host memory were pinned")


def _direct_launches() -> Check:
    """Whether direct launches support this Triton version. Launches no kernel."""
    try:
        direct = import_module("antiphon.kernels.fused.direct")
        obstacle = direct.launch_obstacle()
    except Exception as error:
        return Check(ok=None, detail=f"Triton cannot be asked: {first_line(error)}")
    return Check(ok=not obstacle, detail=obstacle)


if __name__ == "__main__":
    found = probe_gpus(int(sys.argv[1]))
    sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    sys.stdout.flush()
    os._exit(0)  # nothing to save, and shutting down a broken driver may hang
