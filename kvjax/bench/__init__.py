"""Speed, measured: `python -m kvjax.bench`, a module for each of its commands."""
