"""Tracks who holds which block of the KV cache, and which blocks have known contents: the prefix cache.

    free, nothing known ──take──► held by one request ──publish──► held, known by its key
             ▲                                                        │ hold: by others as well
             └───── taken for something else ◄──── free, known ◄──────┘ give_back by the last holder

A block can be published when it is full and its step has been launched: later steps run after it. Its key stands for
all tokens of the text up to its end, so a request whose text begins with the same tokens can hold the block instead of
computing them again. A block that nobody holds keeps its contents until it is taken for something else, the one given
back first going first.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_KEY_BYTES = 16
_NO_KEY = b""


def block_key(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash a full block: its tokens and, by `previous` (the key of the block before it, or empty), all before them."""
    return blake2b(previous + array("q", token_ids).tobytes(), digest_size=_KEY_BYTES).digest()


class BlockPool:
    """Counts the holders of every block. Block 0 is never handed out: tables are padded with it.

    prefix_caching: whether contents are remembered; if not, `find` finds nothing.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.num_usable = num_blocks - 1
        self._prefix_caching = prefix_caching
        self._holders = [0] * num_blocks
        self._keys = [_NO_KEY] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Blocks that nobody holds, as ordered sets: the first is taken first.
        self._unknown = dict.fromkeys(range(1, num_blocks))
        self._known: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        """The number of blocks that nobody holds, whether their contents are known or not."""
        return len(self._unknown) + len(self._known)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix of the keys. Finding a block does not hold it."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_beside(self, blocks: Iterable[int]) -> int:
        """The number of blocks that could be taken if `blocks` were held."""
        return self.num_free - sum(not self._holders[block] for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add one holder to each block."""
        for block in blocks:
            if not self._holders[block]:
                self._unknown.pop(block, None)
                self._known.pop(block, None)
            self._holders[block] += 1

    def take(self, count: int) -> tuple[int, ...] | None:
        """Take `count` blocks, with one holder each and unknown contents; `None` if there are not enough."""
        if count > self.num_free:
            return None
        taken = []
        for _ in range(count):
            block = next(iter(self._unknown or self._known))
            self._forget(block)
            self.hold([block])
            taken.append(block)
        return tuple(taken)

    def give_back(self, blocks: Sequence[int]) -> None:
        """Remove one holder from each block. blocks: in order of the text, whose last block is reused first."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} was given back more often than it was held"
            self._holders[block] -= 1
            if not self._holders[block]:
                (self._known if self._keys[block] else self._unknown)[block] = None

    def publish(self, block: int, key: bytes) -> None:
        """Make a block with final contents findable. A key that is already known keeps its block."""
        assert self._holders[block] > 0, f"block {block} is nobody's"
        if self._prefix_caching and key not in self._block_of:
            self._forget(block)
            self._keys[block] = key
            self._block_of[key] = block

    def _forget(self, block: int) -> None:
        key, self._keys[block] = self._keys[block], _NO_KEY
        if key:
            del self._block_of[key]
