"""Sparsity for Hugging Face language models: what the scripts are made of."""

import warnings

# modelopt 0.47 warns of every transformers release from 5.15 on. All tests pass on those that requirements.txt allows,
# so only newer ones should be warned of.
TESTED_TRANSFORMERS = r"transformers 5\.(1[5-9]|2[0-4])\.\S+ is not tested with current version of modelopt"
warnings.filterwarnings("ignore", message=TESTED_TRANSFORMERS)
