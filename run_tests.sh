#!/usr/bin/env bash
# Run the whole test suite in its own environment (.venv, made on the first run and shared with quickstart.sh).
#
#   bash run_tests.sh [--min | --max] [pytest arguments]
#
#   bash run_tests.sh                       linters, import contracts, type checker and all tests
#   bash run_tests.sh tests/test_files.py   one file
#   bash run_tests.sh --min                 on the oldest releases allowed (requirements/min.txt), in .venv-min
#   bash run_tests.sh --max                 on the newest releases allowed, torch aside, in .venv-max
#
# PYTHON and TORCH_SPEC choose interpreter and torch; see tools/setup_env.sh.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
source tools/setup_env.sh

environment=.venv constraints=""
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
if [[ ${1:-} == --min ]]; then
  environment=.venv-min constraints=requirements/min.txt
  shift
elif [[ ${1:-} == --max ]]; then
  environment=.venv-max constraints=newest
  shift
fi
setup_env "$environment" "$constraints" requirements.txt requirements/test.txt requirements/demo.txt || exit 1

failed=()
"$ENV_PYTHON" -m ruff check . || failed+=("ruff check")
"$ENV_PYTHON" -m ruff format --check . || failed+=("ruff format")
# Not on the oldest releases: the stubs in old safetensors lack names that the module itself has.
if [[ $environment != .venv-min ]]; then
  "$ENV_PYTHON" -m mypy || failed+=("mypy")
fi
"$environment/bin/lint-imports" --no-cache || failed+=("lint-imports")
"$ENV_PYTHON" -m codespell_lib || failed+=("codespell")
"$environment/bin/shellcheck" --external-sources ./*.sh tools/*.sh benchmarks/gpu/*.sh .ci/run || failed+=("shellcheck")
if [[ ! -f demo/SmolLM2-135M-Instruct/model.safetensors ]]; then
  "$ENV_PYTHON" -m tools.prepare_demo || failed+=("tools.prepare_demo")
fi
"$ENV_PYTHON" -m pytest "$@" || failed+=("pytest")
if ((${#failed[@]})); then
  printf 'failed: %s\n' "$(IFS=,; echo "${failed[*]}")"
  exit 1
fi
