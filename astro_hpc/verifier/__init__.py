"""Answer extraction and comparison, and the pool of guarded processes that does it."""
