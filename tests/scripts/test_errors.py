"""Every script against wrong input: one clear line, an exit code other than 0, no traceback, earlier files untouched.

The rows run in this process through each script's own entry point, which saves a start-up of seconds a row.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import TEXTS, assert_clear_error, run_inline, run_script, tiny_llama

# {name} stands for a path of the `world` fixture below.
BASE = {
    "hf_pts.py": "--model_name_or_path {model} --device cpu --dtype fp32 --model_max_length 32 --calib_size 2 "
    "--calib_data {texts} --output_dir {out}",
    "finetune.py": "--model {model} --restore_path {state} --data_path {data} --max_length 200 --max_steps 1 "
    "--output_dir {out}",
    "eval.py": "--model_dir {model} --data_path {records} --model_max_length 200 --max_new_tokens 4 "
    "--min_new_tokens 1 --modelopt_restore_path {state} --output_json {out}/rouge.json",
    "eval_ppl.py": "--model_dir {model} --text {texts} --context 32 --modelopt_restore_path {state} "
    "--output_json {out}/perplexity.json",
    "export_hf.py": "--model_dir {model} --modelopt_restore_path {state} --output_dir {out}/exported",
    "verify_sparsity.py": "{state} --output_json {out}/table.json",
    "data_prep.py": "--source {table} --save_path {out}",
    "report.py": "--run dense={results} --output_dir {out}",
}

# (script, what is wrong, arguments that replace or add, words of the error line).
MODEL_FLAG = {
    "hf_pts.py": "--model_name_or_path",
    "finetune.py": "--model",
    "eval.py": "--model_dir",
    "eval_ppl.py": "--model_dir",
    "export_hf.py": "--model_dir",
}
STATE_FLAG = {
    "finetune.py": "--restore_path",
    "eval.py": "--modelopt_restore_path",
    "eval_ppl.py": "--modelopt_restore_path",
    "export_hf.py": "--modelopt_restore_path",
}
OUT_FLAG = {
    "hf_pts.py": "--output_dir {file}",
    "finetune.py": "--output_dir {file}",
    "eval.py": "--output_json {file}/rouge.json",
    "eval_ppl.py": "--output_json {file}/perplexity.json",
    "export_hf.py": "--output_dir {file}/exported",
    "verify_sparsity.py": "--output_json {file}/table.json",
    "data_prep.py": "--save_path {file}",
    "report.py": "--output_dir {file}",
}
ROWS = [
    *((script, "no such model", f"{flag} {{absent}}", ["{absent}"]) for script, flag in MODEL_FLAG.items()),
    ("hf_pts.py", "no such model, other name", "--model_dir {absent}", ["{absent}"]),
    ("eval.py", "no such model, other name", "--model_name_or_path {absent}", ["{absent}"]),
    ("eval_ppl.py", "no such model, other name", "--model_name_or_path {absent}", ["{absent}"]),
    ("export_hf.py", "no such model, other name", "--model_name_or_path {absent}", ["{absent}"]),
    ("finetune.py", "no such model, other name", "--model_dir {absent}", ["{absent}"]),
    *(
        (script, "no such state", f"{flag} {{absent}}", ["not found", "{absent}"])
        for script, flag in STATE_FLAG.items()
    ),
    *((script, "other model", f"{flag} {{other}}", ["belongs to another"]) for script, flag in STATE_FLAG.items()),
    *((script, "output is a file", words, ["cannot write", "{file}"]) for script, words in OUT_FLAG.items()),
    ("finetune.py", "no masks", "--restore_path {dense}", ["holds no masks"]),
    ("finetune.py", "flash attention absent", "--use_flash_attn True", ["--use_flash_attn", "flash-attn"]),
    ("finetune.py", "FSDP word", "--fsdp no_shard", ["--fsdp no_shard", "full_shard"]),
    ("finetune.py", "FSDP setting", '--fsdp_config {{"min_num_params":1}}', ["--fsdp_config", "min_num_params"]),
    ("finetune.py", "FSDP file", "--fsdp_config {absent}", ["--fsdp_config", "{absent}"]),
    (
        "finetune.py",
        "FSDP layer",
        '--fsdp_config {{"transformer_layer_cls_to_wrap":"OPTLayer"}}',
        ["OPTLayer", "Llama"],
    ),
    ("verify_sparsity.py", "no pattern", "--require 2:40", ["--require", "2:40"]),
    ("hf_pts.py", "encoder", "--model_name_or_path {encoder}", ["BertModel", "decoder-only"]),
    ("finetune.py", "model folder without config", "--model {empty}", ["config.json"]),
    ("eval.py", "cut state", "--modelopt_restore_path {cut}", ["{cut}", "not a readable modelopt state"]),
    ("finetune.py", "text as state", "--restore_path {texts}", ["not a readable modelopt state"]),
    ("export_hf.py", "weights as state", "--modelopt_restore_path {plain}", ["not a modelopt state"]),
    ("hf_pts.py", "CUDA absent", "--device cuda", ["no CUDA GPU"]),
    ("eval.py", "CUDA absent", "--device cuda", ["no CUDA GPU"]),
    ("hf_pts.py", "no such text", "--calib_data {absent}", ["not found", "{absent}"]),
    ("hf_pts.py", "text of the wrong shape", "--calib_data {records_object}", ["{records_object}", "list"]),
    ("hf_pts.py", "hub set out of reach", "--calib_data no/such-set", ["no/such-set", "the network"]),
    ("hf_pts.py", "folder without text", "--calib_data {empty}", ["{empty}"]),
    ("hf_pts.py", "no such split", "--calib_data {set}::dev", ["dev", "train, test"]),
    ("hf_pts.py", "no such configuration", "--calib_data {set}:german", ["german"]),
    ("hf_pts.py", "too many parts", "--calib_data a:b:c:d", ["a:b:c:d", "NAME:CONFIG:SPLIT"]),
    ("hf_pts.py", "weight that is no number", "--calib_data {texts}=much", ["weight", "much"]),
    ("hf_pts.py", "negative weight", "--calib_data {texts}=-1 self=2", ["weight", "-1"]),
    ("hf_pts.py", "weights of zero", "--calib_data {texts}=0 {short}=0", ["sum to 0"]),
    ("hf_pts.py", "empty source", "--calib_data {texts},", ["empty source"]),
    ("hf_pts.py", "unknown type of text", "--calib_data {file}", ["{file}"]),
    ("hf_pts.py", "damaged Parquet", "--calib_data {parquet}", ["{parquet}"]),
    ("hf_pts.py", "a short source among others", "--calib_data {texts}=0.5 {short}=0.5", ["{short}"]),
    ("hf_pts.py", "more sources than sequences", "--calib_data {texts} {short} {texts}", ["--calib_size 2"]),
    ("hf_pts.py", "base model as author", "--model_name_or_path {base} --calib_data self", ["decoder-only"]),
    ("hf_pts.py", "empty text", "--calib_data {empty_json}", ["{empty_json}"]),
    ("hf_pts.py", "tensor parallel serving", "--inference_tensor_parallel 2", ["--inference_tensor_parallel"]),
    ("hf_pts.py", "no such pattern", "--pattern 3:3", ["--pattern", "3:3"]),
    ("hf_pts.py", "text shorter than one sequence", "--model_max_length 100000", ["less than one block of 100000"]),
    ("hf_pts.py", "layers that are not there", "--ignore *.no_such", ["--ignore", "*.no_such"]),
    ("finetune.py", "no room for a token", "--max_length 1", ["--max_length", "at least 2"]),
    ("hf_pts.py", "all kept dense", "--keep_dense 1", ["--keep_dense", "less than 1", "1.0"]),
    ("hf_pts.py", "negative damping", "--percdamp -1", ["--percdamp", "-1"]),
    ("hf_pts.py", "damping of another method", "--percdamp 0.1 --sparsity_fmt wanda", ["--percdamp", "wanda"]),
    ("hf_pts.py", "hidden states in a file", "--activations_dir {file}", ["{file}"]),
    ("hf_pts.py", "unknown device", "--device gpu0", ["unknown device 'gpu0'"]),
    ("eval_ppl.py", "text shorter than a window", "--text {short}", ["tokens"]),
    ("eval_ppl.py", "several texts without names", "--text {texts} {short}", ["NAME=SOURCE", "{texts}"]),
    ("eval_ppl.py", "name given twice", "--text a={texts} a={short}", ["a={short}"]),
    ("eval_ppl.py", "no such column", "--text {set} --text_column body", ["body", "text"]),
    ("eval_ppl.py", "no such text", "--text {absent}", ["not found", "{absent}"]),
    ("eval.py", "no such template", "--prompt_template {absent}", ["prompt template not found"]),
    ("eval.py", "template without a tail", "--prompt_template {half_template}", ["tail"]),
    ("eval.py", "template without a place", "--prompt_template {placeless}", ["{{instruction}}"]),
    ("eval.py", "no chat template", "--chat_template", ["chat template"]),
    ("eval.py", "two templates", "--chat_template --prompt_template {placeless}", ["--chat_template"]),
    ("eval.py", "no such data", "--data_path {absent}", ["not found", "{absent}"]),
    ("eval.py", "broken JSON", "--data_path {broken}", ["{broken}"]),
    ("eval.py", "empty data", "--data_path {empty_json}", ["{empty_json}"]),
    ("eval.py", "missing column", "--data_path {no_output}", ["record 0", "'output'"]),
    ("finetune.py", "no such data", "--data_path {absent}", ["not found", "cnn_train.json"]),
    ("finetune.py", "broken JSON", "--data_path {broken_data}", ["cnn_"]),
    ("finetune.py", "missing column", "--data_path {no_output_data}", ["record 0", "'output'"]),
    ("finetune.py", "two templates", "--chat_template --prompt_template {half_template}", ["--chat_template"]),
    ("finetune.py", "no such text", "--text_path {absent}", ["not found", "{absent}"]),
    ("finetune.py", "hub set without a bound", "--text_path no/such-set --text_ratio 1", ["--text_tokens"]),
    ("finetune.py", "hub set out of reach", "--text_path no/such-set", ["no/such-set"]),
    ("finetune.py", "cache is a file", "--cache_dir {file}", ["cannot write", "{file}"]),
    ("finetune.py", "negative rank", "--lora_rank -1", ["--lora_rank", "-1"]),
    ("finetune.py", "rank above a weight's side", "--lora_rank 4096", ["--lora_rank 4096", "(32 x 32)"]),
    ("finetune.py", "scale of no rank", "--lora_alpha 8", ["--lora_alpha", "--lora_rank"]),
    ("finetune.py", "scale of zero", "--lora_rank 4 --lora_alpha 0", ["--lora_alpha"]),
    ("finetune.py", "optimizer without its package", "--optim galore_adamw", ["--optim galore_adamw"]),
    ("export_hf.py", "no calibration text", "--quantization int8", ["--quantization int8", "--calib_data"]),
    ("export_hf.py", "no such text", "--quantization fp8 --calib_data {absent}", ["not found", "{absent}"]),
    ("export_hf.py", "text without use", "--calib_data {texts}", ["--calib_data is only for"]),
    ("export_hf.py", "CUDA absent", "--quantization fp8_pc_pt --device cuda", ["no CUDA GPU"]),
    ("export_hf.py", "figures that are none", "--figures x={half_template}", ["no ROUGE or perplexity"]),
    ("export_hf.py", "figures without a name", "--figures {half_template}", ["NAME=VALUE"]),
    ("verify_sparsity.py", "no such file", "{absent}", ["{absent}"]),
    ("verify_sparsity.py", "cut state", "{cut}", ["{cut}"]),
    ("data_prep.py", "no such source", "--source {absent}", ["source not found", "{absent}"]),
    ("data_prep.py", "unknown type", "--source {file}", ["{file}"]),
    ("data_prep.py", "broken JSON", "--source {broken}", ["{broken}"]),
    ("data_prep.py", "no records", "--source {empty_json}", ["empty"]),
    ("data_prep.py", "missing column", "--input_column body", ["body", "article, summary"]),
    ("data_prep.py", "column of numbers", "--output_column n --source {numbers}", ["'n'"]),
    ("data_prep.py", "fraction", "--eval_fraction 1.5", ["--eval_fraction", "1.5"]),
    ("data_prep.py", "one record only", "--source {one}", ["training set is empty"]),
    ("data_prep.py", "hub out of reach", "--source hub", ["cnn_dailymail", "--source"]),
    ("report.py", "no such run", "--run x={absent}", ["{absent}"]),
    ("report.py", "no such layer log", "--pts_layers {absent}", ["not found"]),
    ("report.py", "cut state", "--state dense={cut}", ["not a readable modelopt state"]),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, model_dir, state_path, data_dir, tokenizer):
    """Paths of right and wrong files, by the names that the table uses."""
    root = tmp_path_factory.mktemp("world")

    def file(name, content):
        path = root / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def data(name, content):
        folder = root / name
        folder.mkdir()
        for split in ("train", "eval"):
            (folder / f"cnn_{split}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    encoder = root / "encoder"
    shutil.copytree(model_dir, encoder)
    file("encoder/config.json", {"model_type": "bert", "architectures": ["BertModel"]})
    shutil.copytree(model_dir, root / "base")
    base_config = json.loads((model_dir / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    file("base/config.json", base_config)
    (root / "empty").mkdir()
    (root / "cut.pth").write_bytes(state_path.read_bytes()[:2000])
    torch.save({"weight": torch.zeros(2)}, root / "plain.pth")
    other = torch.load(state_path, weights_only=True)
    other["model_state_dict"].pop("model.norm.weight")
    torch.save(other, root / "other.pth")
    torch.save({"modelopt_state": {}, "model_state_dict": tiny_llama().state_dict()}, root / "dense.pth")
    tiny_llama(vocab_size=400).config.save_pretrained(root / "results")
    file("results/perplexity.json", {"perplexity": 3.0})
    (root / "set").mkdir()
    for split in ("train", "test"):
        file(f"set/{split}.jsonl", {"text": " ".join(TEXTS)})
    no_output = [{"instruction": "a", "input": "b"}]
    rows = [{"article": text, "summary": text[:20]} for text in TEXTS]
    return {
        "model": model_dir,
        "state": state_path,
        "data": data_dir,
        "records": data_dir / "cnn_eval.json",
        "results": root / "results",
        "texts": file("texts.json", TEXTS),
        "table": file("table.json", rows),
        "one": file("one.json", rows[:1]),
        "numbers": file("numbers.json", [{**row, "n": 1} for row in rows]),
        "absent": root / "absent",
        "empty": root / "empty",
        "file": file("file", ""),
        "encoder": encoder,
        "base": root / "base",
        "cut": root / "cut.pth",
        "plain": root / "plain.pth",
        "other": root / "other.pth",
        "dense": root / "dense.pth",
        "set": root / "set",
        "parquet": file("damaged.parquet", "PAR1"),
        "half_template": file("half.json", {"head": "{instruction}"}),
        "placeless": file("placeless.json", {"head": "Task:", "tail": ""}),
        "short": file("short.txt", "a"),
        "broken": file("broken.json", '[{"instruction": '),
        "empty_json": file("empty.json", []),
        "records_object": file("object.json", {"text": "a"}),
        "no_output": file("no_output.json", no_output),
        "broken_data": data("broken_data", "[{"),
        "no_output_data": data("no_output_data", no_output),
    }


def arguments_of(script: str, change: str, paths: dict) -> list[str]:
    """The script's good command line with `change` laid over it: flags given there replace the same flags."""
    words, new = BASE[script].split(), change.split()
    if new and not new[0].startswith("--"):  # a positional argument
        words[0], new = new[0], new[1:]
    for flag in [word for word in new if word.startswith("--")]:
        if flag in words and flag != "--run":
            place = words.index(flag)
            del words[place : place + 2]
    return [word.format(**paths) for word in words + new]


@pytest.mark.parametrize(("script", "wrong", "change", "needles"), ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_wrong_input_gets_one_clear_line(world, tmp_path, script, wrong, change, needles):
    out = tmp_path / "out"
    out.mkdir()
    (out / "earlier.txt").write_text("kept")
    paths = {**world, "out": out}
    result = run_inline(script, *arguments_of(script, change, paths))
    assert result.returncode == 1  # 2 is left to what a parser can know
    assert_clear_error(result, *(needle.format(**paths) for needle in needles))
    left = {path.name for path in out.iterdir()}
    # Fine-tuning keeps its tokenized data, keyed by their content, for the run that comes after the mistake is mended.
    assert left <= {"earlier.txt", ".lock", "cache", "run.json"}, f"a failed run left {left}"
    assert (out / "earlier.txt").read_text() == "kept"


@pytest.mark.parametrize("script", BASE)
def test_the_command_that_the_rows_spoil_is_right(world, tmp_path, script):
    """Else a row might fail for another reason than its own."""
    if script in ("hf_pts.py", "finetune.py"):
        pytest.skip("run as processes in test_hf_pts.py and test_finetune.py")
    (tmp_path / "out").mkdir()
    result = run_inline(script, *arguments_of(script, "", {**world, "out": tmp_path / "out"}))
    assert result.returncode == 0, result.stderr


def test_a_process_ends_with_code_1_and_nothing_but_the_line(world, tmp_path):
    result = run_script("data_prep.py", "--save_path", tmp_path, "--source", world["absent"])
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"error: source not found: {world['absent']}; give a file, a folder, or 'aclsum'"
    ]
