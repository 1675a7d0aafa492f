#!/usr/bin/env bash
# Step 2: sparsity-aware training on all visible GPUs, on one, or on the CPU.
#
#   bash launch_finetune.sh --model MODEL --max_length 1024 --output_dir OUT --num_epochs 3 \
#       --restore_path PTS_DIR/pts_modelopt_state.pth
#
# With several processes FSDP shards the model; with one it runs plainly. All other options go to finetune.py.
#
# Several machines under Slurm, one launcher on each (here 2 machines of 8 GPUs, with a shared file system):
#
#   #SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --signal=USR1@300
#   export FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
#   srun bash -c 'bash launch_finetune.sh --num_processes 16 --num_machines 2 --machine_rank "$SLURM_NODEID" \
#       --main_process_ip "$FIRST" --main_process_port 29500 --model MODEL --restore_path PTS --output_dir OUT --resume'
#
# --signal notifies the run five minutes before its time is up: it saves and stops, and the same job, queued again,
# resumes.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
export FINETUNE_PROG="bash launch_finetune.sh"

usage="Options of the launcher:
  --num_processes N       total number of processes, one per GPU (default: the visible GPUs, at least 1)
  --num_machines N        machines (default: 1); start this script once on each, with the options below
  --machine_rank R        0 on the first machine, then 1, 2, …
  --main_process_ip IP    address of the first machine
  --main_process_port P   a free port there (default: a free one on one machine, 29500 on several)
"
declare -A launch=([--num_machines]=1 [--machine_rank]=0) # the launcher's options, as in the usage text
rest=()

fail() {
    echo "error: $1" >&2
    exit 2
}

while (($#)); do
    name="${1%%=*}"
    if [[ $name == -h || $name == --help ]]; then
        echo "$usage"
        exec "$python" "$here/finetune.py" --help
    elif [[ $name != --* || $usage != *"  $name "* ]]; then
        rest+=("$1")
    else
        if [[ $1 == *=* ]]; then
            value="${1#*=}"
        else
            (($# >= 2)) || fail "$name needs a value"
            value="$2"
            shift
        fi
        [[ $name == *_ip || $value =~ ^[0-9]+$ ]] || fail "$name must be an integer, got '$value'"
        launch[$name]="$value"
    fi
    shift
done

machines="${launch[--num_machines]}"
if [[ -z ${launch[--num_processes]:-} ]]; then
    # Without torch, finetune.py says what to install.
    gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0)"
    launch[--num_processes]=$((gpus > 0 ? gpus * machines : 1))
fi
((launch[--num_processes] >= 1)) || fail "--num_processes must be at least 1, got ${launch[--num_processes]}"

trap '' USR1 # only the training processes act on it: they save and stop; see the Slurm example

if ((launch[--num_processes] == 1)); then
    exec "$python" "$here/finetune.py" ${rest[@]+"${rest[@]}"}
fi

# Mistakes are reported once, before the processes start.
"$python" "$here/finetune.py" ${rest[@]+"${rest[@]}"} --check_only

if ((machines > 1)) && [[ -z ${launch[--main_process_ip]:-} ]]; then
    fail "--num_machines $machines needs --main_process_ip, the address of the first machine"
fi
: "${launch[--main_process_port]:=$((machines > 1 ? 29500 : 0))}"
words=()
for name in "${!launch[@]}"; do words+=("$name" "${launch[$name]}"); done
exec "$python" -m accelerate.commands.launch --multi_gpu --mixed_precision no --dynamo_backend no "${words[@]}" \
    "$here/finetune.py" ${rest[@]+"${rest[@]}"}
