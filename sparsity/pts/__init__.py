"""Post-training sparsification: masks, solvers, calibration, and pruning layer by layer."""
