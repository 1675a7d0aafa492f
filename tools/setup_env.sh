# shellcheck shell=bash
# Sourced by quickstart.sh and run_tests.sh, which share one environment this way. Call:
#
#   setup_env FOLDER CONSTRAINTS REQUIREMENTS…     files named demo.txt are installed with --no-deps
#
# and use $ENV_PYTHON afterwards. Each file is installed once, and again when it, Python or torch changes. CONSTRAINTS is
# a file for pip's --constraint, or "", or the word newest: then every package but torch is upgraded, once a day.
#   PYTHON      interpreter that creates the environment (default: the first suitable one on PATH, 3.10 or newer)
#   TORCH_SPEC  pip's arguments for torch, options included. Without an NVIDIA GPU the default is torch==2.13.0. If that
#               brings CUDA libraries that you do not need, give the index of the CPU wheels:
#               TORCH_SPEC="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.10 or newer with venv found; install one, or name it: PYTHON=/path/to/python3 bash $0" >&2
  return 1
}

# install_once NAME TEXT PIP-ARGUMENTS… : runs pip unless NAME was installed here for the same TEXT
install_once() {
  local name=$1 text=$2 stamp="$ENV_DIR/.installed-${1//\//-}" terminal=""
  shift 2
  if [[ -t 1 ]]; then
    terminal=1
  fi
  if [[ -f $stamp && $(<"$stamp") == "$text" ]]; then
    return
  fi
  echo "installing $name into $ENV_DIR (log: $ENV_DIR/pip.log)"
  # To compile all modules takes half of the time of an installation; setup_env lets Python keep those that it imports.
  # All of pip's output goes to the log; a terminal shows, in one line, which package is being fetched or installed.
  if ! "$ENV_PYTHON" -m pip install --disable-pip-version-check --no-compile "$@" 2>&1 | tee -a "$ENV_DIR/pip.log" |
    awk -v terminal="$terminal" '
      terminal && /^(Collecting|Downloading|Installing collected)/ { printf "\r\033[K  %s", substr($0, 1, 70); fflush() }
      END { if (terminal) printf "\r\033[K" }'; then
    echo "error: pip could not install $name; its last lines, from $ENV_DIR/pip.log:" >&2
    tail -n 5 "$ENV_DIR/pip.log" >&2
    return 1
  fi
  echo "$text" >"$stamp"
}

setup_env() {
  local constraints=$2 base file options python_version text torch
  unset PYTHONDONTWRITEBYTECODE # which many containers set: every process would compile all that it imports
  ENV_DIR=$1
  ENV_PYTHON=$ENV_DIR/bin/python
  shift 2
  if ! "$ENV_PYTHON" -c '' >/dev/null 2>&1; then
    base=$(find_python) || return 1
    echo "creating $ENV_DIR with $("$base" --version)"
    "$base" -m venv --clear "$ENV_DIR" || return 1
  fi
  python_version=$("$ENV_PYTHON" --version)
  options=()
  text=""
  if [[ $constraints == newest ]]; then
    options=(--upgrade --upgrade-strategy eager --constraint "$ENV_DIR/torch.txt")
    text=$(date +%F)
  elif [[ -n $constraints ]]; then
    options=(--constraint "$constraints")
    text=$(<"$constraints")
  fi
  # First and on its own: what is installed later then finds torch and keeps it.
  if [[ -z ${TORCH_SPEC:-} ]] && ! nvidia-smi >/dev/null 2>&1; then
    TORCH_SPEC=torch==2.13.0
    if [[ -f $constraints ]]; then
      TORCH_SPEC=$(grep '^torch==' "$constraints")
    fi
  fi
  if [[ -n ${TORCH_SPEC:-} ]]; then
    read -ra torch <<<"$TORCH_SPEC" # several words are several arguments
    install_once torch "$python_version $TORCH_SPEC" "${torch[@]}" || return 1
  fi
  if [[ $constraints == newest ]]; then
    "$ENV_PYTHON" -m pip freeze --disable-pip-version-check | grep '^torch==' >"$ENV_DIR/torch.txt"
  fi
  for file in "$@"; do
    if [[ ${file##*/} == demo.txt ]]; then
      install_once "$file" "$(cat "$file")" --no-deps --requirement "$file" || return 1
    else
      install_once "$file" "$(<"$file")$text" ${options[@]+"${options[@]}"} --requirement "$file" || return 1
    fi
  done
}
