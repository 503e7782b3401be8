"""The methods: one file and one factory each. A factory's signature is its schema."""

from kvjax.methods.full import full
from kvjax.methods.h2o import h2o
from kvjax.methods.pyramidkv import pyramidkv
from kvjax.methods.snapkv import snapkv
from kvjax.methods.streaming_llm import streaming_llm
from kvjax.methods.tova import tova

METHODS = {
    "full": full,
    "streaming_llm": streaming_llm,
    "h2o": h2o,
    "tova": tova,
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
}

__all__ = ["METHODS", *METHODS]
