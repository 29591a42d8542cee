"""Private folders for the sockets of a process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_LONGEST = 80  # bytes; the path of a Unix socket is limited to about 100


def socket_folder(prefix: str) -> Path:
    """Create a private folder for sockets in the temporary folder, or in /tmp if that path is too long for a socket.

    The caller removes it.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    if len(os.fsencode(folder)) <= _LONGEST:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
