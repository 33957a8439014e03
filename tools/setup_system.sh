#!/usr/bin/env bash
# Brings what a virtual environment cannot hold: git, a C++ compiler, Python with its headers and venv.
#   tools/setup_system.sh [googletest] [make]     these two as well
# What is missing comes from apt-get, as root or by a sudo that asks nothing; elsewhere one line says what to install.
# Where nothing is missing it says nothing. PYTHON and CXX name another interpreter and compiler.
set -euo pipefail
python=${PYTHON:-python3}
package=$(basename "$python") # Debian names its packages so: python3-dev, python3.12-dev

compiles() { "${CXX:-c++}" -std=c++20 -fsyntax-only -x c++ - <<<"#include <$1>" 2>/dev/null; }

missing() {
  command -v git >/dev/null || echo git
  compiles span || echo g++
  command -v "$python" >/dev/null || echo "$package"
  "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$package-venv"
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null) || true
  [ -f "$include/Python.h" ] || echo "$package-dev"
  for extra in "$@"; do
    case $extra in
      googletest) [ -f /usr/src/googletest/CMakeLists.txt ] || compiles gtest/gtest.h || echo googletest ;;
      *) command -v "$extra" >/dev/null || echo "$extra" ;;
    esac
  done
}

fail() {
  echo "torch_fp8: this machine lacks $1, and $2; have it installed (Debian: apt-get install $1), then run make again" >&2
  exit 1
}

packages=$(missing "$@" | xargs)
if [ -n "$packages" ]; then
  command -v apt-get >/dev/null || fail "$packages" "there is no apt-get to install it with"
  root=(env DEBIAN_FRONTEND=noninteractive)
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || fail "$packages" "only root may install it"
    root=(sudo -n "${root[@]}")
  fi
  echo "Installing $packages"
  # shellcheck disable=SC2086  # a list
  log=$({ "${root[@]}" apt-get update -qq && "${root[@]}" apt-get install -y -qq $packages; } 2>&1) ||
    { echo "$log" >&2; fail "$packages" "apt-get could not install it"; }
  packages=$(missing "$@" | xargs)
  [ -z "$packages" ] || fail "$packages" "apt-get has not brought it"
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "torch_fp8: Python 3.10 or newer is needed, $python is $("$python" -V); make PYTHON=python3.12 takes another" >&2; exit 1; }
