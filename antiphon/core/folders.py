"""Private folders of a process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_LONGEST = 80  # bytes; a socket's path has a limit of about 100 characters


def socket_folder(prefix: str) -> Path:
    """A new private folder for sockets: where temporary files belong, or in /tmp if that path is too long for one.

    The caller removes it.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    if len(os.fsencode(folder)) <= _LONGEST:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
