"""The README.md of an exported model: what it is, how it was measured, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity.inspection import MatrixReport, zero_totals
from sparsity.metrics import INTERVALS, PERPLEXITIES, ROUGE_TYPES
from sparsity.text import valid_unicode

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ZEROS = """
The zeros are ordinary zeros in ordinary tensors. They make neither the files smaller nor the model faster until a
runtime with kernels for the pattern compresses it; GPUs have them for 2:4.
"""
LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
LOADING_QUANTIZED = """A server that reads NVIDIA Model Optimizer's checkpoints of this quantization opens the folder.
Plain transformers do not know the format: they would take the stored integers for weights.
"""


def write_model_card(
    folder: Path,
    base: str,
    config: PretrainedConfig,
    dtype: str,
    reports: list[MatrixReport],
    figures: list[tuple[str, dict[str, Any]]],
    quantization: dict[str, Any] | None = None,
) -> None:
    """Write `folder`/README.md; only figures that were measured appear in it.

    Args:
        figures: a label such as "dense" and the content of a result file; see `read_metrics`.
        quantization: the quantization_config of a quantized model.
    """
    # A local folder is no name others could follow, so its path stays out of the card.
    name = Path(base).resolve().name if Path(base).is_dir() else base
    quantized = ""
    if quantization is not None:
        algorithm = quantization.get("quant_algo")
        quantized = f", those of the decoder's linear layers quantized to {algorithm} by NVIDIA Model Optimizer"
    hub = "" if Path(base).is_dir() else f"base_model: {base}\n"
    title, tags, weights, zeros_text = f"{name}, dense", "", f"The weights of {name}, none of them pruned.", ""
    if reports:
        elements, zeros = zero_totals(reports)
        pattern, zeros_text = reports[0].pattern, ZEROS
        title, tags = f"{name}, {pattern} sparse", f"tags:\n- sparse\n- {pattern}\n"
        weights = (
            f"The weights of {name}, pruned to {pattern} in {len(reports)} matrices ({zeros / elements:.2%} of their\n"
            f"{elements:,} weights; all others are dense)."
        )
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
{hub}{tags}---

# {title}

{weights} Architecture:
{(config.architectures or [config.model_type])[0]}; weights in {dtype}{quantized}.
{zeros_text}
## Loading

{LOADING if quantization is None else LOADING_QUANTIZED}
## Measured

{_figures_text(figures)}
## Licence

The licence of {name} applies to these weights, which derive from it.
"""
    (folder / "README.md").write_text(valid_unicode(text), encoding="utf-8")


def _figures_text(figures: list[tuple[str, dict[str, Any]]]) -> str:
    if not figures:
        return "No figures were given when this model was exported.\n"
    perplexities = [
        (f"{label}, {name}" if name else label, {**content, **result})
        for label, content in figures
        for name, result in content.get(PERPLEXITIES, {}).items()
    ]
    rouges = [(label, content) for label, content in figures if ROUGE_TYPES[0] in content]
    text = ""
    if perplexities:
        text += "| model | perplexity | dtype | protocol |\n|---|---|---|---|\n"
        for label, result in perplexities:
            protocol = str(result.get("protocol", "")).removeprefix("protocol: ")
            text += f"| {label} | {result['perplexity']:.2f} | {result.get('dtype', '')} | {protocol} |\n"
        text += "\n"
    if rouges:
        text += "| model | ROUGE-1 | ROUGE-2 | ROUGE-L | ROUGE-Lsum | examples |\n|---|---|---|---|---|---|\n"
        for label, content in rouges:
            text += f"| {label} | "
            for key in ROUGE_TYPES:
                interval = content.get(INTERVALS, {}).get(key)
                text += f"{content[key]:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}] | " if interval else " | ")
            text += f"{content.get('examples', '')} |\n"
        text += "\nROUGE: mean F-measure in percent with stemming; in brackets the 95% bootstrap interval.\n\n"
    return text
