"""Stores: in which number format a slot is kept.

A store's codes are one array, or a dict whose `codes` entry is the payload and whose other entries are scales. Every
leaf leads with the axes of the slots; policies move slots as codes and never look inside.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from kvjax.spec import PyTree
from pallas_kernels.codes import DENSE

Balance = Float[Array, "#B K R"] | tuple  # `Tier.balance` of one layer; of one sequence where that is shared


class Store(NamedTuple):
    """A codec of vectors.

    Attributes:
      init: `(pages, page, width, dtype) -> codes`, zeroed pages `[P page ...]` for vectors of `width` values; with the
        model's dtype.
      encode: `x [... width] -> codes [... ...]`.
      decode: `(codes, dtype) -> x [... width]`; one of `pallas_kernels.codes` if kernels are to read it.
      name: for people.
      run: slots that are encoded and decoded together; 1 = each for itself.
    """

    init: Callable[[int, int, int, DTypeLike], PyTree]
    encode: Callable[[Array], PyTree]
    decode: Callable[[PyTree, DTypeLike], Array]
    name: str
    run: int = 1


def _dense_init(pages: int, page: int, width: int, dtype: DTypeLike) -> PyTree:
    return jnp.zeros((pages, page, width), dtype)


dense = Store(_dense_init, lambda x: x, DENSE, "dense")
"""Every value in the model's dtype. Cost: width x itemsize bytes per vector, no arithmetic."""


class KVStore(NamedTuple):
    """The stores of a tier.

    Attributes:
      key, value: codecs of keys and of values.
      balanced: keys are multiplied by `Tier.balance` before they are encoded, queries divided by it.
      residual: newest tokens that are kept unquantised, for stores whose key codec has runs.
    """

    key: Store = dense
    value: Store = dense
    balanced: bool = False
    residual: int = 0

    @property
    def name(self) -> str:
        """For people; a name of `kvjax.cache.quantize.named`, but for the balance."""
        if self.residual:
            return f"{self.key.name}:{self.residual}"
        both = self.key.name if self.key == self.value else f"{self.key.name}/{self.value.name}"
        return f"balanced {both}" if self.balanced else both

    @property
    def is_dense(self) -> bool:
        """Whether nothing is quantised."""
        return self.key == self.value == dense

    @property
    def one_by_one(self) -> "KVStore":
        """The format of tokens that come one after the other: without runs, and without the balance of a prompt."""
        return KVStore() if self.residual else self._replace(balanced=False)

    def encode(self, k: Float[Array, "B K n R"], v: Float[Array, "B K n W"], balance: Balance) -> tuple[PyTree, PyTree]:
        """Codes of keys and values."""
        if not isinstance(balance, tuple):
            k = k.astype(jnp.float32) * balance[:, :, None]
        return self.key.encode(k), self.value.encode(v)

    def decode(self, k: PyTree, v: PyTree, balance: Balance) -> tuple[Float[Array, "B K n R"], Float[Array, "B K n W"]]:
        """Keys and values in float32, without the balance; `key.decode` alone leaves it in."""
        keys, values = self.key.decode(k, jnp.float32), self.value.decode(v, jnp.float32)
        return keys if isinstance(balance, tuple) else keys / balance[:, :, None], values

    def query(self, q: Float[Array, "B K G H"], balance: Balance) -> Float[Array, "B K G H"]:
        """What a query becomes before it meets encoded keys."""
        return q if isinstance(balance, tuple) else (q.astype(jnp.float32) / balance[:, :, None]).astype(q.dtype)
