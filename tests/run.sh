#!/usr/bin/env bash
# Runs the lint, the type check and the tests, in an environment of the checkout's own.
#
#   bash tests/run.sh                        everything, with python3
#   PYTHON=python3.12 bash tests/run.sh      everything, with another interpreter (3.10 or newer)
#   bash tests/run.sh tests/test_values.py -k smoothing    arguments go to pytest
#
# Needs Python with venv and pip, a C compiler, and on the first call a package index and disk: with
# a CUDA build of torch 6 GB, and 3 GB more in TMPDIR while it is installed. The first call makes
# .venv/pyX.Y; later calls use it again, without network, until the dependencies in
# pyproject.toml, the tested versions in tests/constraints-pyX.Y.txt or the interpreter change.
#
# The exit status is 0 only if every step passed. The tests run even when a step before them
# failed, so that one run shows everything; pytest's summary is always the last output.
#
#   CCE_TP_TEST_WORKERS   test processes in a run without pytest arguments
#                         (default: one per core, at most 4; 0: no extra process)
#   CCE_TP_TEST_ONCE      "elsewhere": skip the tests marked `once`, which take long and show what
#                         hardly depends on the interpreter and the packages (default: run them)
#   CCE_TP_TEST_ONLY      "environment": make the environment and run nothing
set -u -o pipefail

cd "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1

fail() {
    printf 'tests/run.sh: %s\n' "$*" >&2
    exit 1
}

python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    fail "cannot run the interpreter '$python'; set PYTHON to one that runs"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "'$python' is Python $version, but 3.10 or newer is needed"

environment=$PWD/.venv/py$version
constraints=tests/constraints-py$version.txt
stamp=$environment/stamp

# What the environment depends on, as one hash. Tool settings in pyproject.toml do not count.
environment_key() {
    "$python" - "$constraints" <<'PYTHON'
import hashlib, os, re, sys

recipe = 1  # raise when what make_environment below installs changes
digest = hashlib.sha256()
for part in (recipe, sys.version, os.path.realpath(sys.executable), sys.base_prefix, os.getcwd()):
    digest.update(repr(part).encode())
with open("pyproject.toml", encoding="utf-8") as file:
    tables = re.split(r"^(?=\[)", file.read(), flags=re.MULTILINE)
for table in tables:
    if table.startswith(("[build-system]", "[project", "[tool.hatch")):
        digest.update(table.encode())
if os.path.exists(sys.argv[1]):
    with open(sys.argv[1], "rb") as file:
        digest.update(file.read())
print(digest.hexdigest())
PYTHON
}

# Free space for a path, as people read it.
free_disk() {
    df -h --output=avail "$1" | tail -n 1 | tr -d ' '
}

# The stamp is removed first and written last: an environment that was left half made, by an
# error or an interruption, is never taken for a whole one.
make_environment() {
    echo "== environment: making ${environment#"$PWD"/} (needs the package index, takes minutes)"
    rm -f "$stamp"
    rm -rf "$environment"
    "$python" -m venv "$environment" || fail "could not make a virtual environment"
    # Python compiles what the tests import, a small part of it, as they do so.
    local options=(--no-compile --quiet --disable-pip-version-check)
    options+=(--editable '.[megatron,launch,test]')
    if [[ -e $constraints ]]; then
        options+=(--constraint "$constraints")
    else
        echo "   no $constraints: the newest versions that pyproject.toml admits"
    fi
    "$environment/bin/python" -m pip install "${options[@]}" ||
        fail "could not install the project ($(free_disk "$environment") free for $environment," \
            "$(free_disk "${TMPDIR:-/tmp}") in ${TMPDIR:-/tmp})"
    "$environment/bin/python" -m pip check || fail "the installed packages do not fit together"
    printf '%s\n' "$key" >"$stamp" || fail "could not write $stamp"
}

key=$(environment_key) || fail "could not read pyproject.toml"
mkdir -p .venv || fail "could not make .venv"
if command -v flock >/dev/null; then
    # Two calls at once: the second waits for the environment that the first one makes.
    exec {lock}>"$environment.lock"
    flock "$lock"
    [[ -e $stamp && $(<"$stamp") == "$key" ]] || make_environment
    exec {lock}>&-
else
    [[ -e $stamp && $(<"$stamp") == "$key" ]] || make_environment
fi
case ${CCE_TP_TEST_ONLY:-} in
'') ;;
environment) exit 0 ;;
*) fail "CCE_TP_TEST_ONLY: expected nothing or 'environment', got '$CCE_TP_TEST_ONLY'" ;;
esac

# Nothing from outside the environment, no look-up of newer versions of the type checker, and
# one thread per process: the tests start several ranks, each its own process. Those of them that
# come later need not compile our own modules again.
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

bin=$environment/bin
failed=()

step() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

"$bin/python" - <<'PYTHON'
import platform
from importlib.metadata import version

names = ("torch", "triton", "numpy", "megatron-core")
print(f"== Python {platform.python_version()},", ", ".join(f"{n} {version(n)}" for n in names))
PYTHON

step "ruff check" "$bin/ruff" check --output-format concise .
step "ruff format --check" "$bin/ruff" format --check .
step "pyright" "$bin/pyright" --pythonpath "$bin/python"

if ((${#failed[@]})); then
    printf '== FAILED before the tests:'
    printf ' [%s]' "${failed[@]}"
    printf '; the tests run all the same\n'
fi

pytest_options=()
if (($# == 0)); then
    # nproc counts threads, not cores, where the variables of OpenMP are set.
    workers=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 1)
    workers=${CCE_TP_TEST_WORKERS:-$((workers < 4 ? workers : 4))}
    # Each begins with a half of its own, so that few files set up their ranks twice.
    ((workers > 1)) && pytest_options+=(--numprocesses "$workers" --dist worksteal)
fi
echo "== pytest"
"$bin/python" -m pytest "${pytest_options[@]}" "$@"
status=$?

((${#failed[@]} == 0)) || exit 1
exit "$status"
