"""Prefill scores: how much attention each prompt token received, without the T x T matrix."""

from pallas_kernels.prefill_scores.reference import column_sums

__all__ = ["column_sums"]
