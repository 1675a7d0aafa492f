# shellcheck shell=bash
# Sourced by quickstart.sh and run_tests.sh, which share an environment this way:
#
#   setup_env FOLDER CONSTRAINTS REQUIREMENTS…     files named demo.txt are installed with --no-deps
#
# sets ENV_PYTHON. A file is installed once, and again when it, Python or torch changes. CONSTRAINTS is a file for pip's
# --constraint, or "", or the word newest: then every package but torch is upgraded, once a day.
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

# install_once NAME VERSION PIP-ARGUMENTS…: run pip unless NAME was installed here with the same VERSION, any text
install_once() {
  local stamp="$ENV_DIR/.installed-${1//\//-}" log="$ENV_DIR/pip.log"
  [[ -f $stamp && $(<"$stamp") == "$2" ]] && return
  echo "installing $1 into $ENV_DIR (log: $log)"
  # Python compiles what it imports; compiling everything takes half of the time of an installation.
  if ! "$ENV_PYTHON" -m pip install --disable-pip-version-check --no-compile "${@:3}" >>"$log" 2>&1; then
    echo "error: pip could not install $1; its last lines, from $log:" >&2
    tail -n 5 "$log" >&2
    return 1
  fi
  echo "$2" >"$stamp"
}

setup_env() {
  local constraints=$2 options=() version="" file python torch=()
  unset PYTHONDONTWRITEBYTECODE # set in many containers; every process would compile all that it imports
  ENV_DIR=$1 ENV_PYTHON=$1/bin/python
  if ! "$ENV_PYTHON" -c '' >/dev/null 2>&1; then
    python=$(find_python) || return 1
    echo "creating $ENV_DIR with $("$python" --version)"
    "$python" -m venv --clear "$ENV_DIR" || return 1
  fi
  if [[ -z ${TORCH_SPEC:-} ]] && ! nvidia-smi >/dev/null 2>&1; then
    TORCH_SPEC=torch==2.13.0
    [[ ! -f $constraints ]] || TORCH_SPEC=$(grep '^torch==' "$constraints")
  fi
  if [[ -n ${TORCH_SPEC:-} ]]; then # first and on its own: the packages after it keep the torch that is there
    read -ra torch <<<"$TORCH_SPEC"
    install_once torch "$("$ENV_PYTHON" --version) $TORCH_SPEC" "${torch[@]}" || return 1
  fi
  if [[ $constraints == newest ]]; then
    "$ENV_PYTHON" -m pip freeze --disable-pip-version-check | grep '^torch==' >"$ENV_DIR/torch.txt"
    options=(--upgrade --upgrade-strategy eager --constraint "$ENV_DIR/torch.txt") version=$(date +%F)
  elif [[ -n $constraints ]]; then
    options=(--constraint "$constraints") version=$(<"$constraints")
  fi
  for file in "${@:3}"; do
    if [[ ${file##*/} == demo.txt ]]; then
      install_once "$file" "$(<"$file")" --no-deps --requirement "$file" || return 1
    else
      install_once "$file" "$(<"$file")$version" ${options[@]+"${options[@]}"} --requirement "$file" || return 1
    fi
  done
}
