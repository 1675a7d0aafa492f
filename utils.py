"""What every script of this project shares: errors, safe files, data reading, the prompt, models and states.

Scripts import from here and from the engine; no script imports another script.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pickle
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# Headed sections in the manner of Alpaca; training and evaluation must see the very same text.
PROMPT_HEAD = (
    "The task below comes with a text to work on. Write an answer that carries out the task.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n"
)
PROMPT_TAIL = "\n\n### Response:\n"
DEFAULT_INSTRUCTION = "Summarize the following article."


class UserError(Exception):
    """A mistake the user can mend. Its text is one line: what is wrong, which value, what to do."""


def _is_failed_write(error: Exception) -> bool:
    """Whether a library's error, of a class of its own, says that a file could not be written."""
    text = str(error)
    if type(error).__name__ == "SafetensorError":
        return "I/O error" in text
    signs = ("PytorchStreamWriter failed", "file write failed", "unexpected pos", "iostream error")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


_held_locks = contextlib.ExitStack()


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's `main`, turning foreseeable failures into one line on stderr.

    Exit codes: 1 for a wrong input or a full disk, 130 for Ctrl-C. Anything else is a defect of ours and
    keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}. Free space or choose another output folder.", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if not _is_failed_write(error):
            raise
        print(
            f"error: writing failed ({first_line(error)}); is the disk full? Files saved before are whole.",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    finally:
        _held_locks.close()


@contextlib.contextmanager
def fail_together(process) -> Iterator[None]:
    """Let a UserError in any process end all of them, told once, instead of leaving the others to wait for ever.

    Every process must enter the block, and nothing inside it may communicate with other processes.

    Args:
        process: an `accelerate.PartialState`.
    """
    from accelerate.utils import gather_object

    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    messages = [text for text in gather_object([message]) if text]
    if messages and process.num_processes == 1:
        raise UserError(messages[0])
    if messages:
        if process.is_main_process:
            print(f"error: {messages[0]}", file=sys.stderr, flush=True)
        process.wait_for_everyone()  # a launcher stops everybody once one has left: first let the message out
        process.destroy_process_group()
        sys.exit(1)


# ---------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only if the block ends without error."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would lock colleagues out of the result
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(value: Any, path: str | Path) -> None:
    """Write `value` as indented UTF-8 JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_torch(value: Any, path: str | Path) -> None:
    """`torch.save`, whole or not at all."""
    with atomic_path(path) as temporary:
        torch.save(value, temporary)


def prepare_output_dir(path: str | Path) -> Path:
    """Create the folder and check that files can be written in it.

    Raises:
        UserError: the path is a file, or cannot be created or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the output folder {path}: {error.strerror}; choose another one") from error
    return path


def lock_output_dir(path: str | Path) -> None:
    """Hold an existing folder for this run alone, until run_cli ends or the process dies, however that happens.

    In a multi-process run only the main process should call this.

    Raises:
        UserError: another run holds it.
    """
    import fcntl

    handle = _held_locks.enter_context(open(Path(path) / ".lock", "ab+", buffering=0))  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        owner = f" (process {pid})" if (pid := handle.read().decode().strip()) else ""
        raise UserError(f"another run{owner} is writing to {path}; wait for it, or choose another folder") from error
    except OSError:
        return  # some network file systems have no locks; then nothing guards the folder
    with contextlib.suppress(OSError):  # the number only serves the message above; a full disk will be told elsewhere
        handle.truncate(0)
        handle.write(str(os.getpid()).encode())


def require_file(path: str | Path, what: str) -> Path:
    """Return `path` if it is a file, else raise a UserError that names `what` it should have been."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} not found: {path}")
    return path


# ----------------------------------------------------------------------------------------------- data


def read_json(path: str | Path, what: str) -> Any:
    """Parse a JSON file, or one value per line if it is named .jsonl; UserError on anything malformed."""
    path = require_file(path, what)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    if path.suffix != ".jsonl":
        try:
            return json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{what} {path} is not valid JSON: {error}") from error
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{what} {path} line {number} is not valid JSON: {error}") from error
    return values


def valid_unicode(text: str) -> str:
    """`text` with "?" for half surrogate pairs, which broken scrapers leave in JSON and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_records(path: str | Path) -> list[dict[str, str]]:
    """Read instruction / input / output records from a JSON array or a JSONL file.

    Raises:
        UserError: missing, malformed or empty file, or a record without the text fields.
    """
    records = read_json(path, "data file")
    if not isinstance(records, list):
        raise UserError(f"data file {path} must hold a list of records, found {type(records).__name__}")
    if not records:
        raise UserError(f"data file {path} has no records; make it with data_prep.py")
    for number, record in enumerate(records):
        for key in ("instruction", "input", "output"):
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise UserError(f"data file {path}: record {number} has no text field '{key}'; see data_prep.py --help")
        if not record["output"].strip():
            raise UserError(f"data file {path}: record {number} has an empty 'output' (the reference summary)")
    return [
        {key: valid_unicode(value) if isinstance(value, str) else value for key, value in record.items()}
        for record in records
    ]


def read_texts(path: str | Path) -> list[str]:
    """Read plain documents: .txt (documents parted by blank lines stay one text), .json or .jsonl.

    JSON items are strings, or objects with one of the fields text, input, article or document.
    """
    path = require_file(path, "text file")
    if path.suffix not in (".json", ".jsonl"):
        try:
            texts = [path.read_text(encoding="utf-8-sig")]
        except UnicodeDecodeError as error:
            raise UserError(f"text file {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    else:
        items = read_json(path, "text file")
        if not isinstance(items, list):
            raise UserError(f"text file {path} must hold a list, found {type(items).__name__}")
        texts = [_text_of(item, number, path) for number, item in enumerate(items)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"text file {path} holds no text")
    return texts


def _text_of(item: Any, number: int, path: Path) -> str:
    if isinstance(item, str):
        return valid_unicode(item)
    for key in ("text", "input", "article", "document"):
        if isinstance(item, dict) and isinstance(item.get(key), str):
            return valid_unicode(item[key])
    raise UserError(f"text file {path}: item {number} has no field text, input, article or document")


def token_blocks(tokenizer, texts: list[str], block_size: int, limit: int | None = None) -> torch.Tensor:
    """Join the texts' tokens (an end-of-text token between texts) and cut them into full blocks.

    Returns:
        int64 tensor of shape [blocks, block_size]; at most `limit` blocks, none of them padded.

    Raises:
        UserError: the texts do not fill one block.
    """
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream.append(tokenizer.eos_token_id)
        if limit is not None and len(stream) >= limit * block_size:
            break
    return _cut_blocks(stream, block_size, limit)


def _cut_blocks(stream: list[int], block_size: int, limit: int | None) -> torch.Tensor:
    blocks = len(stream) // block_size
    if limit is not None:
        blocks = min(blocks, limit)
    if blocks == 0:
        raise UserError(f"the text has only {len(stream)} tokens, less than one block of {block_size}")
    return torch.tensor(stream[: blocks * block_size]).view(blocks, block_size)


def sample_blocks(tokenizer, texts: list[str], block_size: int, limit: int, seed: int) -> torch.Tensor:
    """Like `token_blocks`, but drawn from as many texts as there are: a window at a random place in each.

    Texts that are short give all they have, and the longer ones share the rest evenly.

    Returns:
        int64 tensor of shape [min(limit, blocks that the texts can fill), block_size].

    Raises:
        UserError: the texts do not fill one block.
    """
    rng = random.Random(seed)
    texts = rng.sample(texts, len(texts))
    need, ids = limit * block_size, []
    for text in texts:
        ids.append([*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id])
        # Texts many times the need are diverse enough; reading on would only take time.
        if len(ids) >= 4 * limit and sum(map(len, ids)) >= 4 * need:
            break
    share = need
    for rank, length in enumerate(sorted(map(len, ids))):
        share = -(-need // (len(ids) - rank))
        if length >= share:
            break
        need -= length
    stream: list[int] = []
    for tokens in ids:
        start = rng.randrange(max(0, len(tokens) - share) + 1)
        stream += tokens[start : start + share]
    return _cut_blocks(stream, block_size, limit)


# --------------------------------------------------------------------------------------------- prompt


def encode_prompt(tokenizer, record: dict[str, str], max_length: int) -> list[int]:
    """Token ids of a record's prompt in at most `max_length` tokens; only the article is ever shortened.

    Raises:
        UserError: not even an empty article fits.
    """

    def encode(article: str) -> list[int]:
        prompt = PROMPT_HEAD.format(instruction=record["instruction"]) + article + PROMPT_TAIL
        return tokenizer(prompt, verbose=False)["input_ids"]

    article = record["input"].strip()
    ids = encode(article)
    if len(ids) <= max_length:
        return ids
    article_ids = tokenizer(article, add_special_tokens=False, verbose=False)["input_ids"]
    keep = len(article_ids)
    while len(ids) > max_length:
        if keep == 0:
            raise UserError(
                f"max_length {max_length} is too small: the prompt without its article has {len(ids)} tokens"
            )
        # Cutting can change how the tokens at the seam merge, hence a loop rather than one subtraction.
        keep = max(0, keep - (len(ids) - max_length))
        ids = encode(tokenizer.decode(article_ids[:keep], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return ids


# ------------------------------------------------------------------------------------ models and states


def resolve_device(name: str) -> torch.device:
    """Turn --device into a torch.device; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}'; use cuda, cuda:N or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name} was asked for, but torch sees no CUDA GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} does not exist: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def bf16_is_faster(device: torch.device) -> bool:
    """Whether matrix products gain by bfloat16 factors: on any GPU, and on a CPU with instructions for them."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type != "cpu" or any(getattr(torch.cpu, name, bool)() for name in names)


def load_config(model: str, trust_remote_code: bool = False):
    """Load the configuration of a hub id or folder and check that it is a decoder-only language model.

    Raises:
        UserError: not found, unreadable, or an encoder or encoder-decoder model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise UserError(f"model folder {model} has no config.json; give a Hugging Face model folder or hub id")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the last two: JSON of a wrong shape
        raise UserError(f"cannot load a model from '{model}': {first_line(error)}") from error
    decoders = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    named = config.architectures or []
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in getattr(
        config, "auto_map", {}
    )
    if config.is_encoder_decoder or not known or (named and not any(name.endswith(decoders) for name in named)):
        kind = named[0] if named else config.model_type
        raise UserError(f"'{model}' is a {kind}, not a decoder-only causal language model such as Llama")
    return config


def check_lengths(config, lengths: dict[str, int]) -> None:
    """Check that token counts, named by their options, together stay within the model's positions.

    Raises:
        UserError: they do not. A model without a bound (e.g. ALiBi) passes.
    """
    text_config = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        positions = getattr(text_config, key, None)
        if isinstance(positions, int) and sum(lengths.values()) > positions:
            asked = " plus ".join(f"{name} {value}" for name, value in lengths.items())
            raise UserError(f"{asked} is more than the model's {positions} positions; choose a smaller value")


def load_model(model: str, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False):
    """Load a causal LM on the CPU in eval mode; `dtype` "auto" keeps the checkpoint's own.

    Raises:
        UserError: the model cannot be found or its weight files are missing, truncated or misshapen.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = load_config(model, trust_remote_code)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=dtype, trust_remote_code=trust_remote_code, low_cpu_mem_usage=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot load the weights of '{model}': {first_line(error)}") from error
    return loaded.eval()


def empty_model(config, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False):
    """The model of a configuration without memory for its weights (on the meta device), for shapes and estimates."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # Eager attention builds its masks without looking at values, which an empty model has not got.
        options = {"attn_implementation": "eager", "trust_remote_code": trust_remote_code}
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()


def load_tokenizer(model: str, trust_remote_code: bool = False):
    """Load the tokenizer; a missing pad token falls back to end-of-text, then to the unknown token.

    Raises:
        UserError: no tokenizer, no end-of-text token, or nothing to pad with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception on a malformed tokenizer.json
        raise UserError(f"cannot load a tokenizer from '{model}': {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of '{model}' has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def load_state(path: str | Path) -> dict[str, Any]:
    """Memory-map a modelopt state file without running any pickled code.

    Returns:
        {"modelopt_state": …, "model_state_dict": name → tensor}, as `modelopt.torch.opt.save` writes it.

    Raises:
        UserError: missing, truncated or not such a file.
    """
    path = require_file(path, "modelopt state")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, … for a damaged zip
        raise UserError(
            f"{path} is not a readable modelopt state (damaged, truncated or unsafe): {first_line(error)}"
        ) from None
    if not isinstance(state, dict) or not {"modelopt_state", "model_state_dict"} <= state.keys():
        raise UserError(
            f"{path} is not a modelopt state: it lacks modelopt_state and model_state_dict; make it with hf_pts.py"
        )
    return state


def check_state_fits(state_dict: dict[str, torch.Tensor], model, path: str | Path) -> None:
    """Check that a state has exactly the tensors of `model` (which may be on the meta device), masks aside.

    Raises:
        UserError: names or shapes differ: the state, read from `path`, belongs to another model.
    """
    saved = {name: tensor.shape for name, tensor in state_dict.items() if not name.endswith("._weight_mask")}
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(saved.keys() ^ own.keys()) + sorted(n for n in saved.keys() & own.keys() if saved[n] != own[n]):
        ours, theirs = own.get(name), saved.get(name)
        raise UserError(
            f"state {path} belongs to another model: '{name}' is {list(theirs) if theirs else 'absent'} in the state "
            f"and {list(ours) if ours else 'absent'} in the model"
        )


def restore_sparse(model, path: str | Path, fold: bool = False):
    """Apply a saved modelopt state (masks and weights) to a freshly loaded dense `model`, in place.

    Args:
        fold: for inference. Multiply the masks in and leave plain layers, which give the same outputs; a layer with a
            mask multiplies it in anew at every forward pass, and that takes longer than decoding one token.

    Raises:
        UserError: the file is unreadable, or belongs to a model of other layers or sizes.
    """
    import modelopt.torch.opt as mto
    import modelopt.torch.sparsity  # registers the sparsity modes

    state = load_state(path)
    check_state_fits(state["model_state_dict"], model, path)
    try:
        model = mto.restore_from_modelopt_state(model, state["modelopt_state"])
        model.load_state_dict(state["model_state_dict"])
    except (RuntimeError, KeyError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"state {path} does not fit the model: {first_line(error)}") from error
    return modelopt.torch.sparsity.export(model) if fold else model


def load_for_inference(model: str, dtype: str | None, state: str | Path | None, trust_remote_code: bool = False):
    """The dense model, or with the path of a state the sparse one with its masks folded in, on the CPU.

    Args:
        dtype: a key of DTYPES; None keeps the checkpoint's own.

    Raises:
        UserError: as `load_model` and `restore_sparse`.
    """
    loaded = load_model(model, DTYPES[dtype] if dtype else "auto", trust_remote_code)
    return restore_sparse(loaded, state, fold=True) if state else loaded


def sparse_masks(state_dict: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (weight name, weight [out, in], bool mask [out, in]) for every masked layer of a state dict."""
    for name, mask in state_dict.items():
        if name.endswith("._weight_mask"):
            weight_name = name.removesuffix("_weight_mask") + "weight"
            yield weight_name, state_dict[weight_name], mask


def perplexity(
    model, blocks: torch.Tensor, device: torch.device, batch_size: int = 4, stride: int | None = None
) -> float:
    """exp of the mean next-token negative log-likelihood, in nats, over blocks of token ids.

    Args:
        blocks: int64 tensor [N, T]; T - 1 tokens of each are scored.
        stride: tokens from the start of one block to the next, where blocks overlap. Blocks after the first are then
            scored on their last `stride` tokens only, so that no token counts twice.
    """
    from tqdm import tqdm

    total, count = 0.0, 0
    length = blocks.shape[1]
    fresh = length - 1 if stride is None else min(stride, length - 1)
    with torch.inference_mode():
        for start in tqdm(range(0, len(blocks), batch_size), desc="perplexity", leave=False, disable=None):
            batch = blocks[start : start + batch_size].to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            # Row by row: 32-bit logits of a whole batch would take gigabytes for a large vocabulary.
            for row, (tokens, scores) in enumerate(zip(batch, logits, strict=True), start=start):
                scored = fresh if row else length - 1
                losses = torch.nn.functional.cross_entropy(
                    scores[-1 - scored : -1].float(), tokens[-scored:], reduction="sum"
                )
                total += losses.item()
                count += scored
    mean = total / count
    return math.inf if mean > 700 else math.exp(mean)
