"""Training with Ray Train. Read in this order: driver, run, worker, step; then what they use."""
