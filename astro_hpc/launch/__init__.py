"""Stage to job: cluster files, the graph of stages, sbatch texts through submitit, submission, job states. No torch."""
