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
# --signal tells the run five minutes before its time is up: it saves and ends, and the same job, queued again, resumes.
set -euo pipefail

usage() {
    cat <<'TEXT'
Options of the launcher:
  --num_processes N       processes in all, one per GPU (default: the visible GPUs, at least 1)
  --num_machines N        machines (default: 1); start this script once on each, with the options below
  --machine_rank R        0 on the first machine, then 1, 2, …
  --main_process_ip IP    address of the first machine
  --main_process_port P   a free port there (default: a free one on one machine, 29500 on several)

TEXT
    FINETUNE_PROG="bash launch_finetune.sh" "$python" "$here/finetune.py" --help
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
num_processes="" num_machines=1 machine_rank=0 main_process_ip="" main_process_port=""
rest=()

while [ $# -gt 0 ]; do
    name="${1%%=*}"
    case "$name" in
        --num_processes|--num_machines|--machine_rank|--main_process_ip|--main_process_port)
            if [ "$1" != "$name" ]; then
                value="${1#*=}"
                shift
            elif [ $# -ge 2 ]; then
                value="$2"
                shift 2
            else
                echo "error: $name needs a value" >&2
                exit 2
            fi
            case "$name" in
                --main_process_ip) ;;
                *) [[ "$value" =~ ^[0-9]+$ ]] || { echo "error: $name must be a whole number, found '$value'" >&2; exit 2; } ;;
            esac
            printf -v "${name#--}" '%s' "$value"
            ;;
        -h|--help)
            usage
            exit 0
            ;;
        *)
            rest+=("$1")
            shift
            ;;
    esac
done

export FINETUNE_PROG="bash launch_finetune.sh"
if [ -z "$num_processes" ]; then
    gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
    num_processes=$(( gpus > 0 ? gpus * num_machines : 1 ))
fi
if [ "$num_processes" -lt 1 ]; then
    echo "error: --num_processes must be at least 1, found $num_processes" >&2
    exit 2
fi

trap '' USR1 # only the training processes act on it: they save and end; see the Slurm example

if [ "$num_processes" -eq 1 ]; then
    exec "$python" "$here/finetune.py" ${rest[@]+"${rest[@]}"}
fi

# Mistakes are reported once, before the processes start.
"$python" "$here/finetune.py" ${rest[@]+"${rest[@]}"} --check_only

if [ "$num_machines" -gt 1 ] && [ -z "$main_process_ip" ]; then
    echo "error: --num_machines $num_machines needs --main_process_ip, the address of the machine of rank 0" >&2
    exit 2
fi
[ -n "$main_process_port" ] || main_process_port=$([ "$num_machines" -gt 1 ] && echo 29500 || echo 0)
distributed=(--multi_gpu --num_processes "$num_processes" --num_machines "$num_machines" --machine_rank "$machine_rank"
    --main_process_port "$main_process_port" --mixed_precision no --dynamo_backend no)
[ -z "$main_process_ip" ] || distributed+=(--main_process_ip "$main_process_ip")
exec "$python" -m accelerate.commands.launch "${distributed[@]}" "$here/finetune.py" ${rest[@]+"${rest[@]}"}
