"""Server-sent events, parsed from the bytes of a response, however the network has split them.

By the standard (WHATWG HTML, "Server-sent events"): the text is UTF-8. A line ends at LF, CR LF or CR, nowhere else. A
blank line ends an event, whose data is that of its `data:` lines. Other fields and comments are ignored.

    b'data: {"a":' ──► []        b' 1}\\r\\n\\r' ──► ['{"a": 1}']        b'\\n: alive\\n' ──► []

Why no library: httpx also ends lines at U+2028. httpx-sse holds back a CR until it sees what follows, so an event that
ends with CR seems to arrive with the next one, which would falsify the measured times.
"""

from __future__ import annotations

import re

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventStream:
    """The events of one response."""

    def __init__(self) -> None:
        self._line = bytearray()  # the unfinished line
        self._data: list[str] = []  # of the unfinished event
        self._after_cr = False
        self._at_start = True

    def feed(self, part: bytes) -> list[str]:
        """The data of the events that end in this part."""
        if not part:
            return []
        if self._after_cr and part.startswith(b"\n"):  # the second half of CR LF
            part = part[1:]
        self._after_cr = part.endswith(b"\r")
        first, *others = _LINE_END.split(part)
        self._line += first
        events = []
        for start_of_next in others:
            events += self._end_line()
            self._line = bytearray(start_of_next)
        return events

    def unfinished(self) -> str:
        """Data at the end of the stream without a blank line after it. By the standard this is not an event."""
        if self._line:
            self._end_line()
        return "\n".join(self._data)

    def _end_line(self) -> list[str]:
        line = bytes(self._line)
        if self._at_start:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._at_start = False
        if not line:
            event, self._data = self._data, []
            return ["\n".join(event)] if event else []
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode(errors="replace"))
        return []
