#!/usr/bin/env bash
# What a CUDA machine makes of this project, in one command (meant for under 8 minutes on one data-centre GPU) and one table:
#
#   bash benchmarks/gpu_check.sh [--parts "pts sat eval speed"] [--output FILE] [--rehearse]
#
#   pts     pruning a random model of Llama-2-7B's shape: time and memory, beside modelopt's SparseGPT
#   sat     sparsity-aware training of the demonstration model on all GPUs (FSDP on two or more)
#   eval    summaries by the model that sat trained
#   speed   dense against 2:4 matrix products
#
# A part that fails is named in the table, the others still run, and the exit code is 1. --rehearse runs pts, sat and eval at
# toy sizes on the CPU, to try the script out. It needs the packages of requirements.txt and requirements-demo.txt in the
# environment of `python` (or $PYTHON).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python="${PYTHON:-python}" parts="" output=() rehearse=""
while (($#)); do
  case $1 in
    --parts) parts=${2:-} && shift ;;
    --output) output=(--output "${2:-}") && shift ;;
    --rehearse) rehearse=1 ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) echo "error: unknown argument '$1'; see bash benchmarks/gpu_check.sh --help" >&2 && exit 2 ;;
  esac
  shift
done
if [[ -z $parts ]]; then
  parts="pts sat eval speed"
  [[ -z $rehearse ]] || parts="pts sat eval" # the CPU has no 2:4 kernels to time
fi
for part in $parts; do
  [[ " pts sat eval speed " == *" $part "* ]] || { echo "error: --parts takes pts, sat, eval, speed; found '$part'" >&2 && exit 2; }
done

if [[ $rehearse ]]; then
  export CUDA_VISIBLE_DEVICES=""
  note="REHEARSAL at toy sizes on the CPU: the figures mean nothing."
  pts=(--device cpu --tiny --sequences 4 --length 32)
  prune=(--calib_size 2 --model_max_length 32 --batch_size 2 --quality fast)
  train=(--max_steps 2 --max_length 256 --train_bs 1 --logging_steps 1 --max_eval_samples 1)
  evaluate=(--limit 2 --beam_size 1 --model_max_length 128 --max_new_tokens 4 --min_new_tokens 1)
else
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "error: torch sees no CUDA GPU here; --rehearse tries the script out on the CPU" >&2
    exit 1
  }
  note="" pts=()
  prune=(--calib_size 64 --model_max_length 512 --batch_size 8)
  train=(--max_steps 40 --max_length 1024 --train_bs 4 --logging_steps 5 --max_eval_samples 16)
  evaluate=(--limit 32 --beam_size 4 --batch_size 8 --model_max_length 1024)
fi

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHON="$python"
model=demo/SmolLM2-135M-Instruct
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

# part NAME COMMAND… : run it if it was asked for; its output goes to the terminal and to a log
part() {
  local name=$1 begin=$SECONDS
  shift
  [[ " $parts " == *" $name "* ]] || return 0
  printf '\n%s: %s\n' "$name" "$*"
  "$@" 2>&1 | tee "$work/$name.log" || failed+=("$name")
  printf '%s took %d s\n' "$name" $((SECONDS - begin))
}

train_demo() {
  [[ -f $model/model.safetensors ]] || "$python" prepare_demo.py --output_dir $model || return
  "$python" data_prep.py --source aclsum --save_path "$work/data" || return
  "$python" hf_pts.py --model_name_or_path $model --dtype fp32 --calib_data "$work/data/calib.jsonl" \
    --output_dir "$work/pts" "${prune[@]}" || return
  bash launch_finetune.sh --model $model --restore_path "$work/pts/pts_modelopt_state.pth" --data_path "$work/data" \
    --text_path "$work/data/calib.jsonl" --packing --weight_decay 0 --lr 3e-4 --output_dir "$work/sat" "${train[@]}"
}

part pts "$python" benchmarks/gpu_pts.py ${pts[@]+"${pts[@]}"} --output "$work/pts.json"
[[ " $parts " != *" eval "* || " $parts " == *" sat "* ]] || parts="sat $parts" # there must be something to evaluate
part sat train_demo
part eval "$python" eval.py --model_dir $model --modelopt_restore_path "$work/sat/finetuned_modelopt_state.pth" \
  --data_path "$work/data/cnn_eval.json" --samples 0 --output_json "$work/rouge.json" "${evaluate[@]}"
part speed "$python" benchmarks/sparse_inference.py --output "$work/speed.json"

# shellcheck disable=SC2086  # $parts is a list
"$python" benchmarks/gpu_table.py "$work" --parts $parts --failed ${failed[@]+"${failed[@]}"} --note "$note" \
  ${output[@]+"${output[@]}"} || exit 1
if ((${#failed[@]})); then
  echo "error: failed: ${failed[*]}; the output above says why" >&2
  exit 1
fi
