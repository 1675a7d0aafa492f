"""Sparsity for Hugging Face language models: what the scripts are made of."""

import os
import warnings

# modelopt 0.47 warns of every transformers release from 5.15 on. All tests pass on those that requirements.txt allows,
# so only newer ones should be warned of.
TESTED_TRANSFORMERS = r"transformers 5\.(1[5-9]|2[0-4])\.\S+ is not tested with current version of modelopt"
warnings.filterwarnings("ignore", message=TESTED_TRANSFORMERS)

# What libraries say to those who call them, and a user of a script cannot change.
LIBRARIES = r"(torch|transformers|tokenizers|datasets|accelerate|modelopt|peft|huggingface_hub)(\.|$)"
for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
    warnings.filterwarnings("ignore", category=category, module=LIBRARIES)
for message in (
    r".*clean_up_tokenization_spaces",
    r"Cannot (en|dis)able progress bars",
    r"In CPU autocast, but the target dtype is not supported",
):
    warnings.filterwarnings("ignore", message=message)

# tqdm shows a bar only after so many seconds: what takes a moment, such as loading a small model, needs none.
os.environ.setdefault("TQDM_DELAY", "3")
