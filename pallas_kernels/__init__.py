"""Attention kernels over paged, compressed key/value caches. Imports nothing from kvjax.

Each operation is a folder whose `reference.py` is its contract in plain jnp; that is also the XLA path on every platform.
"""
