"""Attention kernels over paged, compressed key/value caches. Imports nothing from kvjax.

Each operation is a folder. Its `reference.py` is the contract in plain jnp, and the XLA path on every platform.
"""
