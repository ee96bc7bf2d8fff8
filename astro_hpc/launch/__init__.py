"""Stage to job: submitit executors, the graph of stages, sbatch rendering. Not built yet."""
