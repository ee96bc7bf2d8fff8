"""The run folder: manifests, atomic writes, locks, progress, metrics."""
