"""Host memory that the ranks of one host share: one memfd per rank, passed by file descriptor.

The memory has no name in a file system, so nothing stale is left behind, and a container's limit on /dev/shm does not
apply. Descriptors travel over Unix sockets in a private folder, which is removed before the call returns.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket

import torch

from antiphon.comm.group import RankGroup
from antiphon.comm.row_format import aligned
from antiphon.core.errors import OptionError, PeerError, first_line
from antiphon.core.folders import socket_folder

_ALIGNMENT = 4096


def share_host_memory(group: RankGroup, num_bytes: int, *, what: str) -> list[torch.Tensor]:
    """Allocate memory on this rank and map every rank's, in rank order. All ranks must call it at the same time.

    The results are uint8 [num_bytes], initially zero, with num_bytes rounded up to whole pages. A mapping lives as long
    as its tensor. what: the user of the memory, for errors.
    Raises `OptionError` if the memory cannot be allocated, and `PeerError` if a rank does not arrive.
    """
    num_bytes = max(aligned(num_bytes, _ALIGNMENT), _ALIGNMENT)
    folder = socket_folder("antiphon-fd-")
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with listener:
            listener.settimeout(group.timeout_s)
            path = str(folder / "memory")
            listener.bind(path)
            listener.listen(group.size)
            descriptor = _make_memfd(num_bytes, what)
            paths = group.all_gather_object(path)
            descriptors = _exchange(group, listener, paths, descriptor, what)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [_mapped(fd, num_bytes) for fd in descriptors]


def _mapped(descriptor: int, num_bytes: int) -> torch.Tensor:
    """Map the descriptor's memory, and close the descriptor."""
    try:
        mapping = mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)
    with torch.inference_mode(False):
        return torch.frombuffer(mapping, dtype=torch.uint8)


def _make_memfd(num_bytes: int, what: str) -> int:
    try:
        descriptor = os.memfd_create("antiphon", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, num_bytes)
    except (AttributeError, OSError) as error:
        raise OptionError(
            f"{what} cannot allocate {num_bytes / 2**20:.0f} MiB of shared memory (memfd)",
            limit=first_line(error),
            remedy="use the transport alltoall",
            option="transport",
        ) from error
    return descriptor


def _exchange(group: RankGroup, listener: socket.socket, paths: list[str], mine: int, what: str) -> list[int]:
    """Exchange the descriptors of all ranks.

    All connect before any accepts: connecting does not wait for the accept, so the ranks cannot deadlock in a ring.
    """
    descriptors = {group.rank: mine}
    with contextlib.ExitStack() as stack:
        try:
            outgoing = {}
            for rank, path in enumerate(paths):
                if rank != group.rank:
                    outgoing[rank] = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                    outgoing[rank].settimeout(group.timeout_s)
                    outgoing[rank].connect(path)
            for _ in outgoing:
                incoming, _ = listener.accept()
                with incoming:
                    socket.send_fds(incoming, [b"m"], [mine])
            for rank, connection in outgoing.items():
                _, received, _, _ = socket.recv_fds(connection, 1, 1)
                if not received:
                    raise ConnectionError(f"rank {rank} sent no descriptor")
                descriptors[rank] = received[0]
        except OSError as error:
            for descriptor in descriptors.values():
                os.close(descriptor)
            raise PeerError(
                f"rank {group.rank} could not share host memory for {what}", limit=first_line(error)
            ) from error
    return [descriptors[rank] for rank in range(group.size)]
