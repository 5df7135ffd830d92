#!/usr/bin/env bash
# clang-format over the C++ and CUDA files that git knows or would add; `--fix` rewrites them.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=(--dry-run -Werror)
if [[ ${1:-} == --fix ]]; then mode=(-i); fi
git ls-files -z --cached --others --exclude-standard -- '*.h' '*.cc' '*.cu' '*.cuh' |
  xargs -0 --no-run-if-empty clang-format --style=file "${mode[@]}"
