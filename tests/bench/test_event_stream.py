"""Server-sent events are parsed by the rules of the standard, wherever the network splits the bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.bench.serve.event_stream import EventStream

# A byte order mark, all line ends, comments, other fields, data of several lines, characters of several bytes, and
# what other readers take for a line end.
STREAM = (
    "\ufeffdata: first\n\n"
    ": alive\r\n\r\n"
    'event: message\r\nid: 7\r\ndata: {"text": "a\u2028b\x85c\u2029d\fe\x1cf"}\r\nretry: 10\r\n\r\n'
    "data:two\rdata: lines\r\r"
    "data: mixed 😀é\r\n\n"
    "data\n\n"
    "data:  a space\n\r"
    "database: no\n\n\n"
    "data: [DONE]\n\n"
).encode()
EVENTS = [
    "first",
    '{"text": "a\u2028b\x85c\u2029d\fe\x1cf"}',
    "two\nlines",
    "mixed 😀é",
    "",
    " a space",
    "[DONE]",
]


def events_of(parts: list[bytes]) -> list[str]:
    stream = EventStream()
    return [event for part in parts for event in stream.feed(part)]


def test_a_stream_in_one_part_and_byte_by_byte() -> None:
    assert events_of([STREAM]) == EVENTS
    assert events_of([STREAM[place : place + 1] for place in range(len(STREAM))]) == EVENTS


def test_a_stream_cut_at_every_place_and_at_every_two() -> None:
    for first in range(len(STREAM) + 1):
        for second in range(first, len(STREAM) + 1, 1 if first < 40 else 7):
            parts = [STREAM[:first], STREAM[first:second], STREAM[second:]]  # some of them empty
            assert events_of(parts) == EVENTS, (first, second)


@given(
    st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"data: a", b"data: b", b":", b"\xe2\x80\xa8", b"\xf0"])),
    st.data(),
)
def test_no_cut_changes_what_is_read(pieces: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    parts = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert events_of(parts) == events_of([whole])


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_an_event_is_there_with_the_last_byte_that_ends_it(end: bytes) -> None:
    stream = EventStream()
    assert stream.feed(b"data: 1" + end) == []
    assert stream.feed(end[:1]) == ["1"], "nothing is held back until the next part"
    assert stream.feed(end[1:] + b"data: 2" + end + end) == ["2"]


def test_what_is_no_utf8_is_replaced() -> None:
    assert events_of([b"data: a\xffb\n\n"]) == ["a\ufffdb"]


@pytest.mark.parametrize("rest", [b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r\n", b"id: 1\ndata: [DONE]"])
def test_the_end_of_a_stream_without_a_blank_line(rest: bytes) -> None:
    stream = EventStream()
    assert stream.feed(b"data: 1\n\n" + rest) == ["1"]
    assert stream.unfinished() == "[DONE]"
    assert EventStream().unfinished() == ""
