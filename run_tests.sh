#!/usr/bin/env bash
# Run the test suite in its own environment (.venv, created on the first run and shared with quickstart.sh).
#
#   bash run_tests.sh [--fast] [--min | --max] [pytest arguments]
#
#   bash run_tests.sh                       linters, import contracts, type checker and all tests
#   bash run_tests.sh --fast                the same without the tests marked slow and with fewer fuzzing examples
#   bash run_tests.sh tests/test_files.py   one file
#   bash run_tests.sh --min                 on the oldest releases allowed (requirements/min.txt), in .venv-min
#   bash run_tests.sh --max                 on the newest releases allowed, torch aside, in .venv-max
#
# PYTHON and TORCH_SPEC choose interpreter and torch; see tools/setup_env.sh.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
source tools/setup_env.sh

environment=.venv constraints="" selection=()
while (($#)); do
  case $1 in
    -h | --help)
      sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --fast) selection=(-m "not slow" --hypothesis-profile=fast) ;;
    --min) environment=.venv-min constraints=requirements/min.txt ;;
    --max) environment=.venv-max constraints=newest ;;
    *) break ;;
  esac
  shift
done
setup_env "$environment" "$constraints" requirements.txt requirements/test.txt requirements/demo.txt || exit 1

failed=()
# check NAME COMMAND…: run the command and note a failure; the checks after it still run
check() {
  "${@:2}" || failed+=("$1")
}
check "ruff check" "$ENV_PYTHON" -m ruff check .
check "ruff format" "$ENV_PYTHON" -m ruff format --check .
# Not on the oldest releases: the stubs in old safetensors lack names that the module itself has.
[[ $environment == .venv-min ]] || check mypy "$ENV_PYTHON" -m mypy
check lint-imports "$environment/bin/lint-imports" --no-cache
check codespell "$ENV_PYTHON" -m codespell_lib
check shellcheck "$environment/bin/shellcheck" --external-sources ./*.sh tools/*.sh benchmarks/gpu/*.sh .ci/run
check tools.prepare_demo "$ENV_PYTHON" -m tools.prepare_demo
check pytest "$ENV_PYTHON" -m pytest -n 2 ${selection[@]+"${selection[@]}"} "$@"
if ((${#failed[@]})); then
  printf 'failed: %s\n' "$(IFS=,; echo "${failed[*]}")"
  exit 1
fi
