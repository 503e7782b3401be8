"""Segment merging: runs of tokens become one weighted mean each (DMC)."""

from pallas_kernels.segment_merge.reference import pool, segment_sums

__all__ = ["pool", "segment_sums"]
