"""The steps of check.sh, which checks a machine with CUDA GPUs."""
