"""Separates a chat's reasoning from its answer, by the tags of the model.

    <think>                 ends the prompt or begins the output
    The fox is red.         reasoning_content
    </think>
    It is red.              content

Text arrives in pieces, and a tag may be cut anywhere: text that could become a tag is held back until that is decided.
Whitespace around both parts, which templates put between tags and text, belongs to neither.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.core.errors import unknown_value


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningTags:
    """The tags before and after the reasoning of a model."""

    start: str
    end: str

    def is_open(self, prompt: str) -> bool:
        """Whether a prompt leaves the reasoning open, so that the output begins inside it."""
        return prompt.rfind(self.start) > prompt.rfind(self.end)


_THINK = ReasoningTags(start="<think>", end="</think>")

REASONING_PARSERS = dict.fromkeys(("deepseek_r1", "deepseek_v3", "glm45", "qwen3"), _THINK)
"""By vLLM's names. The parsers differ only in how templates open the reasoning, which the prompt shows."""


def reasoning_tags(parser: str) -> ReasoningTags:
    """The tags of a parser. Raises `OptionError` for an unknown one."""
    if parser not in REASONING_PARSERS:
        raise unknown_value("reasoning_parser", parser, REASONING_PARSERS)
    return REASONING_PARSERS[parser]


@dataclass(frozen=True, slots=True)
class SplitOutput:
    """A piece of an output, or all of it, as its two parts."""

    reasoning: str
    content: str


class ReasoningSplitter:
    """Splits one output. inside: whether its prompt has opened the reasoning."""

    def __init__(self, tags: ReasoningTags, *, inside: bool) -> None:
        self._tags = tags
        self._inside = inside
        self._before = not inside  # only whitespace so far, so reasoning can still begin
        self._at_start = True  # of a part: whitespace there is dropped
        self._held = ""

    def add(self, text: str, *, last: bool = False) -> SplitOutput:
        """Take more of the output. last: it is complete."""
        reasoning, content = "", ""
        self._held += text
        while self._held:
            if self._before:
                start = self._held.lstrip()
                if start.startswith(self._tags.start):
                    self._held, self._inside, self._before = start[len(self._tags.start) :], True, False
                    continue
                if self._tags.start.startswith(start) and not last:
                    break
                self._before = self._at_start = False  # there is no reasoning: the text is the answer
            if not self._inside:
                content += self._taken(len(self._held))
                break
            end = self._held.find(self._tags.end)
            if end >= 0:
                reasoning += self._taken(end).rstrip()
                self._held, self._inside, self._at_start = self._held[len(self._tags.end) :], False, True
                continue
            reasoning += self._taken(len(self._held) if last else self._num_certain())
            break
        return SplitOutput(reasoning.rstrip() if last and self._inside else reasoning, content)

    def _taken(self, num: int) -> str:
        """The next characters, without whitespace at the start of the part."""
        taken, self._held = self._held[:num], self._held[num:]
        if self._at_start:
            taken = taken.lstrip()
            self._at_start = not taken
        return taken

    def _num_certain(self) -> int:
        """The number of characters that are neither the beginning of the end tag nor whitespace before it."""
        text, tag = self._held, self._tags.end
        held = next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)
        return len(text[: len(text) - held].rstrip())
