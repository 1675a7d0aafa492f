#!/usr/bin/env bash
# The whole pipeline on a small real model: prepare, prune (PTS), fine-tune (SAT), evaluate, report.
#
#   bash quickstart.sh [--full]
#
# Everything it needs comes from PyPI: no model hub, no account. By default it takes about 12 minutes on two CPU cores;
# --full takes longer, on more text and all test examples. A CUDA GPU is used where there is one. A step whose result is
# there and whose command, script and input files have not changed since is not run again, so a second run only prints
# the table, and an interrupted one resumes. The screen shows one line a step; all output goes to log files. PYTHON and
# TORCH_SPEC choose interpreter and torch; see tools/setup_env.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ------------------------------------------------------------------------------------------------- sizes
calib_size=48      # calibration samples of PTS
quality=balanced   # effort of PTS
length=512         # tokens of a calibration sample, a training row, a prompt and a perplexity window
max_steps=80       # optimizer steps of SAT, of two rows each
save_steps=40      # steps between checkpoints, from which an interrupted run resumes
learning_rate=4e-4 # so small a model and so few steps need more than the 2e-5 of large models
self_tokens=32768  # text that the dense model writes for SAT to read
examples=16        # test papers to summarize for ROUGE
beams=2            # beam search width
eval_batch=16      # prompts generated together
windows=32         # perplexity windows of each text
name=quickstart
# The steps in order, and their seconds on two cores of an AMD EPYC; tools/pace.py adapts them to the machine.
plan="model 14 data 4 PTS 165 SAT 300 evaluate 155"
case ${1:-} in
  "") ;;
  --full)
    calib_size=128 quality=balanced max_steps=500 save_steps=100 examples=100 beams=4 windows=200 name=quickstart_full
    self_tokens=131072
    plan="model 22 data 4 PTS 430 SAT 1850 evaluate 1150"
    ;;
  -h | --help)
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  *)
    echo "error: unknown argument '$1'; usage: bash quickstart.sh [--full]" >&2
    exit 2
    ;;
esac
again="bash quickstart.sh${1:+ $1}"
model=demo/SmolLM2-135M-Instruct
data=data/aclsum
out=saved_models_SmolLM2-135M-Instruct_$name
begin=$SECONDS

# ------------------------------------------------------------------------------------------- environment
source tools/setup_env.sh
setup_env .venv "" requirements.txt requirements/demo.txt
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p data/steps "$out/steps"

# described RESULT COMMAND… : the command, and size and time of every file that it names but RESULT
described() {
  local word
  printf '%s\n' "${*:2}"
  for word in "${@:2}"; do
    [[ $word == *=* && -f ${word%%=*} ]] && word=${word%%=*} # a source of text with its weight
    [[ $word == *=* && -f ${word#*=} ]] && word=${word#*=}   # a source of text with its name
    [[ $word == *.* && -f ${word//.//}.py ]] && word=${word//.//}.py # a module, run with python -m
    if [[ -f $word && $word != "$1" ]]; then
      printf '%s %s %s\n' "$word" "$(wc -c <"$word")" "$(date -r "$word" +%s.%N)"
    fi
  done
}

# current STAMP RESULT COMMAND… : whether RESULT was made by this very command from the files it names as they are now.
# Times are compared for equality only: a clock that was wrong for a while does no harm.
current() {
  [[ -s $2 && -f $1 && $(<"$1") == "$(described "${@:2}")" ]]
}

# finished NAME RESULT COMMAND… : whether RESULT is current, and says so; else forgets that it ever was
finished() {
  if current "$steps/$1.done" "${@:2}"; then
    echo "$1: already done ($2)"
    return
  fi
  rm -f "$steps/$1.done"
  return 1
}

# step NAME RESULT COMMAND… : run the command, which makes the file RESULT, unless that is current
pace=""
step() {
  local name=$1 result=$2 log=$steps/$1.log
  finished "$@" && return
  shift 2
  [[ -n $pace ]] || pace=$(python -m tools.pace)
  if ! python tools/run_step.py --log "$log" --plan "$plan" --name "$name" --pace "$pace" \
    --elapsed $((SECONDS - begin)) -- "$@"; then
    printf '\nerror: step %s failed; its output is in %s. To resume from here: %s\n' "$name" "$log" "$again" >&2
    exit 1
  fi
  described "$result" "$@" >"$steps/$name.done"
}

# ------------------------------------------------------------------------------------------------- steps
steps=data/steps # logs and stamps of what --full shares
step model $model/model.safetensors python -m tools.prepare_demo --output_dir $model
step data $data/cnn_train.json python data_prep.py --save_path $data --source aclsum

steps=$out/steps
pts=$out/pts_modelopt_state.pth
step PTS "$pts" python hf_pts.py --model_name_or_path $model --device auto --model_max_length $length --dtype fp32 \
  --sparsity_fmt sparsegpt --quality $quality --calib_size $calib_size --batch_size 4 \
  --calib_data "$data/calib.jsonl=0.6,self=0.4" --output_dir "$out"

sat=$out/finetuned/finetuned_modelopt_state.pth
command=(bash launch_finetune.sh --model "$model" --restore_path "$pts" --data_path "$data"
  --output_dir "$out/finetuned" --text_path "$data/calib.jsonl=0.4,self=0.6" --self_tokens "$self_tokens"
  --text_ratio 0.8 --packing --max_length "$length"
  --train_bs 2 --lr "$learning_rate" --adam_beta2 0.95 --weight_decay 0 --max_steps "$max_steps"
  --logging_steps 5 --max_eval_samples 8
  --eval_steps "$save_steps" --save_steps "$save_steps" --save_total_limit 1 --resume)
if ! current "$steps/SAT.begun" "$steps/SAT.begun" "${command[@]}"; then
  rm -rf "$out/finetuned" # it belongs to another pruned model or other settings and cannot be resumed
  described "" "${command[@]}" >"$steps/SAT.begun"
fi
step SAT "$sat" "${command[@]}"
rm -rf "$out/finetuned/checkpoints" # 1.6 GB that only an interrupted run needs

# evaluation RUN : sets $results and $command
evaluation() {
  local state=()
  case $1 in
    PTS) state=(--modelopt_restore_path "$pts") ;;
    SAT) state=(--modelopt_restore_path "$sat") ;;
  esac
  results=$out/eval/$1
  command=(python eval.py --model_dir "$model" ${state[@]+"${state[@]}"} --dtype fastest
    --perplexity_data "papers=$data/heldout.jsonl" "manual=$data/manual.txt"
    --perplexity_context "$length" --perplexity_blocks "$windows"
    --data_path "$data/cnn_eval.json" --limit "$examples" --batch_size "$eval_batch" --beam_size "$beams"
    --model_max_length "$length" --predictions "$results/predictions.jsonl" --output_json "$results/rouge.json")
}

runs=() missing=() commands=()
for run in dense PTS SAT; do
  evaluation "$run"
  runs+=(--run "$run=$results")
  finished "evaluate-$run" "$results/rouge.json" "${command[@]}" && continue
  missing+=("$run")
  commands+=(::: "evaluate-$run" "${command[@]}")
done
if ((${#missing[@]})); then
  step evaluate "" python -m tools.side_by_side --logs "$steps" "${commands[@]:1}"
  for run in "${missing[@]}"; do
    evaluation "$run"
    described "$results/rouge.json" "${command[@]}" >"$steps/evaluate-$run.done"
  done
fi

# ------------------------------------------------------------------------------------------------ report
echo
python report.py "${runs[@]}" --state "PTS=$pts" --state "SAT=$sat" --model_dir $model \
  --pts_layers "$out/pts_layers.jsonl" --train_log "$out/finetuned/train_log.jsonl" --output_dir "$out/report" \
  --title "SmolLM2-135M-Instruct, 2:4 sparse: before and after"
cat <<END

dense model            $model
pruned (PTS) state     $pts
fine-tuned (SAT) state $sat
predictions, scores    $out/eval/
page with plots        $out/report/report.html
took $(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s; the folder holds $(du -sh "$out" | cut -f1)
END
