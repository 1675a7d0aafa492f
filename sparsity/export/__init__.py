"""Export: an ordinary Hugging Face folder with the masks folded in."""
