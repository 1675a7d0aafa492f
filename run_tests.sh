#!/usr/bin/env bash
# Run the whole test suite in its own environment (.venv, made on the first run and shared with quickstart.sh).
#
#   bash run_tests.sh [--min] [pytest arguments]
#
#   bash run_tests.sh                       linter, formatter, type checker and all tests
#   bash run_tests.sh tests/test_utils.py   one file
#   bash run_tests.sh --min                 on the oldest releases allowed (constraints-min.txt), in .venv-min
#
# PYTHON and TORCH_SPEC choose interpreter and torch; see setup_env.sh.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
source setup_env.sh

environment=.venv constraints=""
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
if [[ ${1:-} == --min ]]; then
  environment=.venv-min constraints=constraints-min.txt
  shift
fi
setup_env "$environment" "$constraints" requirements.txt requirements-test.txt requirements-demo.txt || exit 1

failed=()
"$ENV_PYTHON" -m ruff check . || failed+=("ruff check")
"$ENV_PYTHON" -m ruff format --check . || failed+=("ruff format")
# Not on the oldest releases: the stubs in old safetensors lack names that the module itself has.
if [[ -z $constraints ]]; then
  "$ENV_PYTHON" -m mypy || failed+=("mypy")
fi
if [[ ! -f demo/SmolLM2-135M-Instruct/model.safetensors ]]; then
  "$ENV_PYTHON" prepare_demo.py || failed+=("prepare_demo.py")
fi
"$ENV_PYTHON" -m pytest "$@" || failed+=("pytest")
if ((${#failed[@]})); then
  printf 'failed: %s\n' "$(IFS=,; echo "${failed[*]}")"
  exit 1
fi
