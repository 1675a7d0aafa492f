"""Setting up: the environment of the two commands, and the demonstration model."""
