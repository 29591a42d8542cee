"""Server-sent events, read from the bytes of an answer however the network has cut them.

By the standard (WHATWG HTML, "Server-sent events"): the text is UTF-8. A line ends at LF, CR LF or CR, nowhere else. A
blank line ends an event, whose data is that of its `data:` lines. Other fields and comments are passed over.

    b'data: {"a":' ──► []        b' 1}\\r\\n\\r' ──► ['{"a": 1}']        b'\\n: alive\\n' ──► []

Why no library: httpx ends lines at U+2028 too. httpx-sse holds a CR back until it sees what follows, so an event that
ends with CR seems to come when the next one does; here times are what is measured.
"""

from __future__ import annotations

import re

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventStream:
    """The events of one answer."""

    def __init__(self) -> None:
        self._line = bytearray()  # the one that has not ended
        self._data: list[str] = []  # of the event that has not ended
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
        """Data at the end of the stream that no blank line has followed. By the standard it is no event."""
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
