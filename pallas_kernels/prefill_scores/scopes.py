"""Which pairs of a query and a key count, block by block: what the loops of all kernels are over.

A block has `rows` tokens of the side that keeps a number each, and `columns` of the side that is reduced over.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int


class Blocks(NamedTuple):
    """Blocks of columns that a block of rows needs, by index; each has the shape of the lengths."""

    first: Int[Array, "*b"]
    whole: Int[Array, "*b"]  # from here on every pair counts
    edge: Int[Array, "*b"]  # up to here
    last: Int[Array, "*b"]  # the one behind the last


class Causal(NamedTuple):
    """Rows are keys, columns queries: each sees its own token and the `reach - 1` before it."""

    reach: int  # tokens
    recent: int | None = None  # only so many last queries of a prompt count; None = all

    def start(self, length: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """The first query that counts."""
        return jnp.zeros_like(length) if self.recent is None else jnp.maximum(length - self.recent, 0)

    def blocks(self, row: Array, rows: int, columns: int, length: Int[Array, "*b"]) -> Blocks:
        """What a block of keys needs, by its index."""
        start = self.start(length)
        first = jnp.maximum(row * rows, start) // columns
        behind = ((row + 1) * rows + self.reach - 2) // columns + 1  # the last key is seen by `reach - 1` later queries
        last = jnp.minimum(-(-length // columns), behind)
        whole = -(-jnp.maximum((row + 1) * rows - 1, start) // columns)
        return _clipped(first, whole, jnp.minimum(row * rows + self.reach, length) // columns, last)

    def most(self, block: int, tokens: int) -> int:
        """Blocks that a block of keys needs at most, of so many tokens."""
        queries = tokens if self.recent is None else max(self.recent, 1)
        return min(-(-tokens // block), _touched(self.reach, block), _touched(queries, block))

    def seen(self, row: Array, column: Array, length: Array) -> Array:
        """Whether pairs count, by their positions."""
        distance = column - row
        return (distance >= 0) & (distance < self.reach) & (column >= self.start(length)) & (column < length)


class Chunked(NamedTuple):
    """Rows and columns are tokens of chunks, which see all of their own."""

    chunk: int  # tokens

    def blocks(self, row: Array, rows: int, columns: int, length: Int[Array, "*b"]) -> Blocks:
        """What a block of rows needs, by its index."""
        chunk, behind = row * rows // self.chunk, ((row + 1) * rows - 1) // self.chunk + 1
        begin, end = chunk * self.chunk, jnp.minimum(behind * self.chunk, length)
        edge = jnp.where(behind == chunk + 1, end // columns, 0)
        return _clipped(begin // columns + jnp.zeros_like(length), -(-begin // columns), edge, -(-end // columns))

    def most(self, block: int, tokens: int) -> int:
        """Blocks that a block of rows needs at most, of so many tokens."""
        if self.chunk % block == 0 or block % self.chunk == 0:
            return min(-(-tokens // block), max(self.chunk // block, 1))
        return min(-(-tokens // block), _touched(((block - 2) // self.chunk + 2) * self.chunk, block))

    def seen(self, row: Array, column: Array, length: Array) -> Array:
        """Whether pairs count, by their positions."""
        return (row // self.chunk == column // self.chunk) & (column < length)


Scope = Causal | Chunked


def _touched(span: int, block: int) -> int:
    """Blocks that so many tokens touch at most."""
    return (span + block - 2) // block + 1


def _clipped(first: Array, whole: Array, edge: Array, last: Array) -> Blocks:
    whole = jnp.clip(whole, first, jnp.maximum(first, last))
    return Blocks(first, whole, jnp.clip(edge, whole, jnp.maximum(whole, last)), last)
