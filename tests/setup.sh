# Sourced by tests/run.sh and examples/arithmetic/run.sh from the repository root. Makes the virtual
# environment .venv (or the folder that ERPD_VENV names), installs requirements.txt and that of the
# examples (or the file that erpd_requirements names: tests/vllm.sh) where they changed since the
# last time, and sets PYTHON to the environment's interpreter. Bash 3.2 will do.

erpd_fail() {
  echo "error: $*" >&2
  exit 2
}

erpd_venv=${ERPD_VENV:-.venv}
case $erpd_venv in /*) ;; *) erpd_venv=$PWD/$erpd_venv ;; esac
PYTHON=$erpd_venv/bin/python
erpd_stamp=$erpd_venv/requirements-installed.txt # a copy of the requirements that are in it

if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
  erpd_python=
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      erpd_python=$candidate
      break
    fi
  done
  [ -n "$erpd_python" ] || erpd_fail "no Python 3.11 or newer found; install one, or put it on PATH"
  "$erpd_python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
    erpd_fail "$erpd_python lacks the venv module; install it" \
      "(Debian, Ubuntu: apt install python3-venv)"
  echo "setup: making $erpd_venv with $("$erpd_python" --version)"
  "$erpd_python" -m venv "$erpd_venv" ||
    erpd_fail "$erpd_venv: cannot make it; check path and free space"
fi

if [ -z "${erpd_requirements:-}" ]; then
  erpd_requirements=$erpd_venv/requirements-wanted.txt
  cat requirements.txt examples/requirements.txt >"$erpd_requirements"
fi
if ! cmp -s "$erpd_requirements" "$erpd_stamp"; then
  echo "setup: installing $erpd_requirements into $erpd_venv (torch: minutes the first time)"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$erpd_requirements" ||
    erpd_fail "pip could not install a package of $erpd_requirements; its name is above;" \
      "check network and free space"
  cp "$erpd_requirements" "$erpd_stamp"
fi
echo "setup: $("$PYTHON" --version) in $erpd_venv"
