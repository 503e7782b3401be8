"""Decode attention: one query per row over the row's pages."""

from pallas_kernels.decode_attention.reference import EMPTY, Partial, decode_attention, merge, probabilities

__all__ = ["EMPTY", "Partial", "decode_attention", "merge", "probabilities"]
