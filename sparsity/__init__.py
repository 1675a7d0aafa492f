"""Sparsity for Hugging Face language models: what the scripts are made of."""
