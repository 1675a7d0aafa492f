"""Evaluation: generated summaries, ROUGE and perplexity."""
