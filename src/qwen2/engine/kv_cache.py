"""Keys and values of every sequence, in blocks, and those of ended ones that later prompts may begin with.

A sequence is a list of blocks. A full block is never written again and can be found by the text that it holds: each has a hash of
its tokens chained to that of the text before it, and is compared by its tokens, not trusted by its hash. Sequences with the same
beginning share its blocks; of the first block where they differ, what is alike is copied. Blocks that nobody holds stay until
their memory is wanted, the least recently used going first; at most `keep` of them, but always those of the sequence that ended
last.

Left out: who has to give way when all blocks are in use (scheduler.py).
"""

# T tokens of one sequence, c chain: the hash that stands for a text from its beginning

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

from qwen2.engine.blocks import BLOCK, Block, BlockPool, NoRoomError

if TYPE_CHECKING:
    from qwen2.engine.blocks import KernelMemory, TensorMemory

BRANCHES = 16  # of one text that are compared when a prompt goes another way: those used last


class BlockSequence:
    """One sequence: the tokens that were read, and blocks with room for them and a few more."""

    def __init__(self, cache: KVCache, root: int, shared: bool) -> None:
        self.cache, self.memory = cache, cache.pool.memory
        self.tokens: list[int] = []  # those whose keys and values are stored in every layer
        self.blocks: list[Block] = []
        self.addresses: list[int] = []
        self.chains = [root]  # after each full block
        self.shared = shared  # whether others may find what it holds

    def __len__(self) -> int:
        return len(self.tokens)

    def missing(self, total: int) -> int:
        """Blocks that it needs beyond its own to hold so many tokens."""
        return max(0, -(-total // BLOCK) - len(self.blocks))

    def reserve(self, total: int) -> None:
        """Make room for `total` tokens. NoRoomError where every block is in use."""
        for _ in range(self.missing(total)):
            self.append(self.cache.take())

    def append(self, block: Block) -> None:
        """One more block, of which this sequence is a holder now."""
        self.blocks.append(block)
        self.addresses.append(block.address)

    def advance(self, tokens: Sequence[int]) -> None:
        """Count tokens in, once every layer has written them; blocks that are full now can be found."""
        self.tokens.extend(tokens)
        assert len(self.tokens) <= len(self.blocks) * BLOCK, f"{len(self)} tokens in room for {len(self.blocks) * BLOCK}"
        while len(self.chains) * BLOCK <= len(self.tokens):
            self.cache.publish(self)


class KVCache:
    """All blocks of one engine. `seed` is what all cached texts depend on besides their tokens: weights, scaling."""

    def __init__(self, memory: KernelMemory | TensorMemory, limit: int, keep: int, seed: Hashable = ()) -> None:
        self.pool, self.keep, self.seed = BlockPool(memory, limit), keep, seed
        self.root = hash((seed, memory.name))
        self.odd = count()  # tells chains apart whose hashes collide
        self.live: list[BlockSequence] = []
        self.found: dict[int, Block] = {}  # full blocks that can be found, by chain
        self.branches: dict[tuple[int, int], list[Block]] = {}  # full or not, by the chain before them and their first token
        self.idle: OrderedDict[int, Block] = OrderedDict()  # held by nobody, least recently used first, by id()
        self.hits = self.asked = 0  # tokens of prompts that were found, and all of them

    # --- sequences

    def open(self, prompt: Sequence[int], reuse: bool = True, adapter: str | None = None) -> BlockSequence:
        """A sequence for a prompt, which holds the longest beginning of it that is there. Without `reuse` nothing is shared.

        The prompt's last token is always read anew, because its logits are wanted. `adapter`: the digest of the one that bends what is
        stored; only texts of the same one are found.
        """
        sequence = BlockSequence(self, self.root if adapter is None else hash((self.root, adapter)), shared=reuse)
        if reuse:
            self.extend(sequence, prompt)
        self.live.append(sequence)
        return sequence

    def extend(self, sequence: BlockSequence, prompt: Sequence[int]) -> int:
        """Take over what is there of the prompt beyond the sequence's end, where that is a block's; how many tokens that were."""
        before, last = len(sequence), len(prompt) - 1
        if not sequence.shared or before % BLOCK or len(sequence.blocks) * BLOCK > before:
            return 0
        while last - len(sequence) >= BLOCK:
            start = len(sequence)
            block = self._full(sequence.chains[-1], tuple(prompt[start : start + BLOCK]))
            if block is None:
                break
            self._hold(block)
            sequence.append(block)
            sequence.tokens.extend(block.tokens)
            sequence.chains.append(block.chain)
        self._copy_part(sequence, prompt, last)
        return len(sequence) - before

    def _full(self, parent: int, tokens: tuple[int, ...]) -> Block | None:
        block = self.found.get(hash((parent, tokens)))
        return block if block is not None and block.parent == parent and block.tokens == tokens else None

    def _copy_part(self, sequence: BlockSequence, prompt: Sequence[int], last: int) -> None:
        """Of the block where the prompt goes another way, or ends, what is alike: copied, or taken over where nobody holds it."""
        start, parent = len(sequence), sequence.chains[-1]
        rest = prompt[start : min(start + BLOCK, last)]
        branches = self.branches.get((parent, rest[0]), ()) if rest else ()
        best, length = None, 0
        for block in branches[-BRANCHES:]:
            alike = common_prefix(block.tokens, rest)
            if alike >= length:  # of equals the one used last
                best, length = block, alike
        if best is None:
            return
        if best.refs == 0 and length == len(best.tokens) < BLOCK:
            self.hide(best)
            del self.idle[id(best)]
            best.refs, mine = 1, best
        else:
            self._hold(best)  # or it might be given away to make room for its own copy
            try:
                mine = self.take()
            except NoRoomError:
                return
            finally:
                self._release(best)
            self.pool.memory.copy(best, mine)
        sequence.append(mine)
        sequence.tokens.extend(rest[:length])

    def fork(self, sequence: BlockSequence) -> BlockSequence:
        """A second live sequence with the same beginning: full blocks shared, the last one copied where it is not full."""
        other = BlockSequence(self, self.root, sequence.shared)
        full, rest = divmod(len(sequence), BLOCK)
        copied = self.take() if rest else None
        for block in sequence.blocks[:full]:
            self._hold(block)
            other.append(block)
        if copied is not None:
            self.pool.memory.copy(sequence.blocks[full], copied)
            other.append(copied)
        other.tokens, other.chains = list(sequence.tokens), list(sequence.chains)
        self.live.append(other)
        return other

    def close(self, sequence: BlockSequence, keep: bool = True) -> None:
        """A sequence is done; what it holds may be found by prompts to come, its last block too if `keep`."""
        self.live.remove(sequence)
        full, rest = divmod(len(sequence), BLOCK)
        if rest and keep and sequence.shared:
            self._publish_part(sequence.blocks[full], sequence.chains[full], tuple(sequence.tokens[full * BLOCK :]))
        for block in reversed(sequence.blocks):  # the end of a text goes before its beginning, which more may have in common
            self._release(block)
        self._shrink(max(self.keep, len(sequence.blocks)))

    def discard(self, sequence: BlockSequence) -> None:
        """A sequence went wrong: nobody shall find what it holds."""
        for block in sequence.blocks:
            self.hide(block)
        self.close(sequence, keep=False)

    # --- blocks

    def take(self) -> Block:
        """A block to write, for one holder; the least recently used one of nobody where no more may be made."""
        if self.pool.taken >= self.pool.limit and self.idle:
            self._evict()
        block = self.pool.take()
        block.refs = 1
        return block

    @property
    def available(self) -> int:
        """How many blocks can still be taken."""
        return self.pool.limit - self.pool.taken + len(self.idle)

    def _hold(self, block: Block) -> None:
        if block.refs == 0:
            del self.idle[id(block)]
        block.refs += 1

    def _release(self, block: Block) -> None:
        block.refs -= 1
        if block.refs:
            return
        if block.tokens:
            self.idle[id(block)] = block
        else:
            self.pool.give(block)

    def _evict(self) -> None:
        _, block = self.idle.popitem(last=False)
        self.hide(block)
        self.pool.give(block)

    def _shrink(self, most: int) -> None:
        while len(self.idle) > most:
            self._evict()

    def publish(self, sequence: BlockSequence) -> None:
        """The sequence's next block is full: let it be found, or take the one that holds the same already and free this."""
        index = len(sequence.chains) - 1
        parent, tokens = sequence.chains[-1], tuple(sequence.tokens[index * BLOCK : (index + 1) * BLOCK])
        chain = hash((parent, tokens))
        block, known = sequence.blocks[index], self.found.get(chain)
        if known is None:
            if sequence.shared:
                self._show(block, parent, chain, tokens)
                self.found[chain] = block
        elif known.parent != parent or known.tokens != tokens:
            chain = hash((chain, next(self.odd)))  # another text with this hash: what follows here is found by nobody
        elif sequence.shared and known is not block:
            self._hold(known)
            sequence.blocks[index], sequence.addresses[index] = known, known.address
            self._release(block)
        sequence.chains.append(chain)

    def _publish_part(self, block: Block, parent: int, tokens: tuple[int, ...]) -> None:
        """A block that is not full, unless another holds as much; those that hold less of the same are not needed any more."""
        for other in list(self.branches.get((parent, tokens[0]), ())):
            alike = common_prefix(other.tokens, tokens)
            if alike == len(tokens):
                return
            if alike == len(other.tokens) and other.refs == 0:
                self.hide(other)
                del self.idle[id(other)]
                self.pool.give(other)
        self._show(block, parent, hash((parent, tokens)), tokens)

    def _show(self, block: Block, parent: int, chain: int, tokens: tuple[int, ...]) -> None:
        block.parent, block.chain, block.tokens = parent, chain, tokens
        self.branches.setdefault((parent, tokens[0]), []).append(block)

    def hide(self, block: Block) -> None:
        """Nobody shall find this block any more."""
        if not block.tokens:
            return
        place = (block.parent, block.tokens[0])
        self.branches[place].remove(block)
        if not self.branches[place]:
            del self.branches[place]
        if self.found.get(block.chain) is block:
            del self.found[block.chain]
        block.tokens = ()

    def clear(self) -> None:
        """Free every block that nobody holds."""
        self._shrink(0)

    def reset(self) -> None:
        """Forget everything, after a step that broke off in the middle of who knows what."""
        self.__init__(self.pool.memory, self.pool.limit, self.keep, self.seed)  # type: ignore[misc]

    # --- accounts

    @property
    def nbytes(self) -> int:
        """Memory of the blocks that are held or can be found."""
        return self.pool.taken * self.pool.memory.block_bytes

    @property
    def limit_bytes(self) -> int:
        """Memory of all blocks that there may be."""
        return self.pool.limit * self.pool.memory.block_bytes

    def check(self, in_use: Iterable[BlockSequence]) -> None:
        """Every block is free, to be found, or held: exactly what the sequences say. Runs when the engine falls idle."""
        owned = list(in_use)
        if sorted(map(id, owned)) != sorted(map(id, self.live)):
            raise RuntimeError(f"{len(self.live)} sequences are live, requests hold {len(owned)}")
        held = Counter(id(block) for sequence in self.live for block in sequence.blocks)
        blocks = {id(block): block for sequence in self.live for block in sequence.blocks} | dict(self.idle)
        for key, block in blocks.items():
            if block.refs != held[key]:
                raise RuntimeError(f"a block of the cache has {block.refs} holders counted, {held[key]} sequences hold it")
            if key in self.idle and not block.tokens:
                raise RuntimeError("a block of the cache is held by nobody and can be found by nobody")
        self.pool.check(list(blocks.values()))
        for block in self._findable():
            if id(block) not in blocks:
                raise RuntimeError("a block of the cache can be found and is free")
        for sequence in self.live:
            self._check_sequence(sequence)

    def _findable(self) -> Iterator[Block]:
        for blocks in self.branches.values():
            yield from blocks
        yield from self.found.values()

    @staticmethod
    def _check_sequence(sequence: BlockSequence) -> None:
        length = len(sequence)
        if length > len(sequence.blocks) * BLOCK or len(sequence.chains) != length // BLOCK + 1:
            raise RuntimeError(f"a sequence of {length} tokens has {len(sequence.blocks)} blocks of {BLOCK}, {len(sequence.chains)} chains")
        for index, block in enumerate(sequence.blocks):
            told = tuple(sequence.tokens[index * BLOCK : (index + 1) * BLOCK])
            if block.tokens and block.tokens != told:
                raise RuntimeError("a block of the cache does not hold what its sequence has read")
            if block.refs > 1 and len(told) < BLOCK:
                raise RuntimeError("two sequences may write the same block")
            if block.address != sequence.addresses[index]:
                raise RuntimeError("a sequence has the address of another block")


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(a), len(b))
    if tuple(a[:length]) == tuple(b[:length]):  # compared at C speed
        return length
    return next(i for i in range(length) if a[i] != b[i])
