"""Continuous batching: requests that come and go while others decode, over one pool of pages."""
