"""Search trees become chains of thought with reflections and backtracks (paper, sections 2.3 and 2.4)."""
