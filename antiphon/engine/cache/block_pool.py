"""Who holds which block of the KV cache, and whose contents are known: the prefix cache.

    free, nothing known ──take──► held by one request ──publish──► held, known by its key
             ▲                                                        │ hold: by others as well
             └───── taken for something else ◄──── free, known ◄──────┘ give_back by the last holder

A block can be published when it is full and its step has committed. Its key says all tokens of the text up to its end,
so whoever's text begins with the same tokens can hold it instead of computing them again. A block that nobody holds
keeps its contents until it is taken for something else; the one that was given back first goes first.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_KEY_BYTES = 16
_KEEP_NOTHING = b""


def block_key(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full block: of its tokens and, through `previous` (empty for the first), of all before it."""
    return blake2b(previous + array("q", token_ids).tobytes(), digest_size=_KEY_BYTES).digest()


class BlockPool:
    """Counts the holders of every block. Block 0 is never given away: tables are padded with it.

    prefix_caching: whether contents are remembered; without, `find` finds nothing.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.num_usable = num_blocks - 1
        self._prefix_caching = prefix_caching
        self._holders = [0] * num_blocks
        self._keys = [_KEEP_NOTHING] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Blocks that nobody holds, as an ordered set: the first is taken first.
        self._unknown = dict.fromkeys(range(1, num_blocks))
        self._known: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whether their contents are known or not."""
        return len(self._unknown) + len(self._known)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of the keys. Finding a block does not hold it."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_beside(self, blocks: Iterable[int]) -> int:
        """Blocks that could be taken if `blocks` were held."""
        return self.num_free - sum(not self._holders[block] for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add one holder to each block."""
        for block in blocks:
            if not self._holders[block]:
                self._unknown.pop(block, None)
                self._known.pop(block, None)
            self._holders[block] += 1

    def take(self, count: int) -> tuple[int, ...] | None:
        """`count` blocks with one holder each and nothing known of their contents; `None` if there are not enough."""
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
        """Take one holder from each block. In order of the text: its last block will be reused first."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} was given back more often than it was held"
            self._holders[block] -= 1
            if not self._holders[block]:
                (self._known if self._keys[block] else self._unknown)[block] = None

    def publish(self, block: int, key: bytes) -> None:
        """Make a block findable: its contents are computed and final. A key that is already known keeps its block."""
        assert self._holders[block] > 0, f"block {block} is nobody's"
        if self._prefix_caching and key not in self._block_of:
            self._forget(block)
            self._keys[block] = key
            self._block_of[key] = block

    def _forget(self, block: int) -> None:
        key, self._keys[block] = self._keys[block], _KEEP_NOTHING
        if key:
            del self._block_of[key]
