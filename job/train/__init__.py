"""Training with Ray Train. Read in this order: driver, run, worker, step; then the modules they import."""
