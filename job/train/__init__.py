"""Training with Ray Train. Read in this order: driver, run, worker, training, step; then the modules they import."""
