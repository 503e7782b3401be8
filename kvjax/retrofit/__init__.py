"""Retrofitting: a model goes on learning until it decides by itself what a cache may merge (DMC) or evict (DMS)."""
