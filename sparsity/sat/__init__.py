"""Sparsity-aware training: data, losses, and a Trainer that holds the masks."""
