"""Setup: the environment of quickstart.sh and run_tests.sh, and the demonstration model."""
