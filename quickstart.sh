#!/usr/bin/env bash
# The whole pipeline on a small real model: prepare, prune (PTS), fine-tune (SAT), evaluate, report.
#
#   bash quickstart.sh [--full]
#
# Everything it needs comes from PyPI: no model hub, no account. It takes 10 to 20 minutes on two CPU cores; --full uses
# more text and all test examples and takes over an hour. A CUDA GPU is used if there is one. The screen shows one line
# per step; everything else goes to log files. A step whose result exists is not run again, so an interrupted run
# resumes, and a second one only prints the table. PYTHON and TORCH_SPEC choose interpreter and torch; see
# tools/setup_env.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# sizes
name=quickstart
calib_size=48 # calibration sequences of PTS
length=512    # tokens of a calibration sequence, a training row, a prompt and a perplexity window
max_steps=80 save_steps=40 # optimizer steps of SAT, of two rows each, and those between checkpoints
self_tokens=32768          # tokens that the dense model generates for SAT
examples=16 beams=2        # papers to summarize for ROUGE, and the beam width
windows=32                 # perplexity windows of each text
case ${1:-} in
  "")
    if ! nvidia-smi >/dev/null 2>&1 && ! grep -qs bf16 /proc/cpuinfo; then
      echo "this CPU has no bf16 instructions, which doubles the time: less text, fewer training steps and examples"
      calib_size=32 max_steps=60 save_steps=30 self_tokens=16384 examples=8
    fi
    ;;
  --full)
    name=quickstart_full calib_size=128 max_steps=500 save_steps=100 self_tokens=131072 examples=100 beams=4 windows=200
    ;;
  -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
  *) echo "error: unknown argument '$1'; usage: bash quickstart.sh [--full]" >&2 && exit 2 ;;
esac
model=demo/SmolLM2-135M-Instruct
data=data/aclsum
out=saved_models_SmolLM2-135M-Instruct_$name
pts=$out/pts_modelopt_state.pth
sat=$out/finetuned/finetuned_modelopt_state.pth

source tools/setup_env.sh
setup_env .venv "" requirements.txt requirements/demo.txt
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$out/logs"
[[ -f $out/quickstart.sh ]] || cp quickstart.sh "$out"
if ! cmp -s quickstart.sh "$out/quickstart.sh"; then
  echo "error: $out was made by another version of quickstart.sh; to start over: rm -r $out" >&2 && exit 1
fi

# step NAME RESULT COMMAND…: run the command, whose last output is the file RESULT, unless RESULT exists
step() {
  local name=$1 result=$2 log=$out/logs/$1.log start=$SECONDS
  [[ ! -s $result ]] || { echo "$name: reusing $result" && return; }
  echo "$name: running (log: $log)"
  if ! "${@:3}" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    echo "error: step $name failed; see $log. The same command resumes from here." >&2 && exit 1
  fi
  grep '^warning:' "$log" || true
  echo "$name: $((SECONDS - start)) s"
}

step model $model/model.safetensors python -m tools.prepare_demo --output_dir $model
step data $data/further.jsonl python data_prep.py --save_path $data --source aclsum
step PTS "$pts" python hf_pts.py --model_name_or_path $model --device auto --model_max_length $length --dtype fp32 \
  --sparsity_fmt sparsegpt --calib_size $calib_size --batch_size 4 \
  --calib_data $data/calib.jsonl=0.3 $data/further.jsonl=0.3 self=0.4 --output_dir "$out"
step SAT "$sat" bash launch_finetune.sh --model $model --restore_path "$pts" --data_path $data \
  --output_dir "$out/finetuned" --text_path $data/calib.jsonl=0.2 $data/further.jsonl=0.3 self=0.5 --text_ratio 0.8 \
  --self_tokens $self_tokens --packing --max_length $length --train_bs 2 --lr 3e-4 --adam_beta2 0.95 --weight_decay 0 \
  --max_steps $max_steps --logging_steps 5 --max_eval_samples 8 --eval_steps $save_steps --save_steps $save_steps \
  --save_total_limit 1 --resume
rm -rf "$out/finetuned/checkpoints" # 1.6 GB that only an interrupted run needs

# rouge RUN [STATE] and perplexity RUN [STATE]: evaluate the dense model, or that with a sparse state
rouge() {
  step "ROUGE-$1" "$out/eval/$1/rouge.json" python eval.py --model_dir $model ${2:+--modelopt_restore_path "$2"} \
    --dtype fastest --data_path $data/cnn_eval.json --limit $examples --batch_size 16 --beam_size $beams \
    --model_max_length $length --predictions "$out/eval/$1/predictions.jsonl" --output_json "$out/eval/$1/rouge.json"
}
perplexity() {
  step "perplexity-$1" "$out/eval/$1/perplexity.json" python eval_ppl.py --model_dir $model \
    ${2:+--modelopt_restore_path "$2"} --dtype fastest --text papers=$data/heldout.jsonl manual=$data/manual.txt \
    --context $length --max_blocks $windows --output_json "$out/eval/$1/perplexity.json"
}
# Two at a time with half of the cores each: one computes while the other loads its libraries.
OMP_NUM_THREADS=$((($(nproc) + 1) / 2)) && export OMP_NUM_THREADS
set -m # gives each half a process group, which the trap can stop
{ rouge dense && rouge PTS "$pts" && perplexity SAT "$sat"; } & halves=($!)
{ rouge SAT "$sat" && perplexity dense && perplexity PTS "$pts"; } & halves+=($!)
trap 'kill -- "${halves[@]/#/-}" 2>/dev/null || true' EXIT
wait "${halves[0]}"
wait "${halves[1]}"

echo
python report.py --run dense="$out/eval/dense" --run PTS="$out/eval/PTS" --run SAT="$out/eval/SAT" --state PTS="$pts" \
  --state SAT="$sat" --model_dir $model --pts_layers "$out/pts_layers.jsonl" --output_dir "$out/report" \
  --train_log "$out/finetuned/train_log.jsonl" --title "SmolLM2-135M-Instruct, 2:4 sparse: before and after"
echo "
dense model       $model
sparse states     $pts (PTS)
                  $sat (SAT)
results           $out/eval/
page with plots   $out/report/report.html
took $((SECONDS / 60)) min $((SECONDS % 60)) s; to start over: rm -r $out ($(du -sh "$out" | cut -f1))"
