"""Held-out accuracy, behaviour and cost of the models of a run."""
