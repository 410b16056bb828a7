#!/bin/sh
# Makes or refreshes a virtual environment that holds this checkout.
#
#   sh scripts/environment.sh .venv editable       the checkout itself, with the development tools
#   sh scripts/environment.sh .venv-demo wheel     a wheel built from the checkout, as a user has it
#
# PYTHON       the interpreter to start from (python3)
# TORCH_INDEX  where torch comes from: a package index, or "default" for pip's own configuration.
#              Unset or "auto", it is PyTorch's index of CPU builds on Linux without an NVIDIA
#              driver, if that index answers, and pip's own configuration everywhere else.
#
# An environment that is newer than everything it was made from is left alone.
set -eu
cd "$(dirname "$0")/.."

environment=$1
form=$2
python=${PYTHON:-python3}
cpu_index=https://download.pytorch.org/whl/cpu
stamp=$environment/.ready

say() {
    echo "$environment: $*"
}

fail() {
    echo "$*" >&2
    exit 1
}

is_current() {
    inputs="pyproject.toml constraints.txt scripts/environment.sh"
    [ "$form" = editable ] || inputs="$inputs README.md LICENSE spectral_surgery"
    [ -e "$stamp" ] && "$environment/bin/python" -c '' 2>/dev/null &&
        [ -z "$(find $inputs -newer "$stamp" -type f ! -name '*.pyc')" ]
}

check_python() {
    remedy="install Python 3.11 or later and name it, for example make test PYTHON=python3.12"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        fail "$python was not found or does not run: $remedy."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is Python $version, which is too old: $remedy."
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv or ensurepip module, so it cannot make an environment:" \
            "on Debian or Ubuntu, run apt install python$version-venv."
}

pip() {
    "$environment/bin/python" -m pip --quiet --quiet --disable-pip-version-check --no-input "$@"
}

has_nvidia_driver() {
    command -v nvidia-smi >/dev/null 2>&1 || [ -e /proc/driver/nvidia ]
}

# Succeeds if the index $1 answers within five seconds. The thread is there because the timeout of
# a connection does not cover the look-up of a name.
answers() {
    "$python" - "$1/torch/" <<'EOF'
import sys
import threading
import urllib.request

answered = threading.Event()


def ask():
    with urllib.request.urlopen(sys.argv[1], timeout=5):
        answered.set()


threading.excepthook = lambda failure: None
threading.Thread(target=ask, daemon=True).start()
sys.exit(0 if answered.wait(5) else 1)
EOF
}

has_pinned_torch() {
    pin=$("$environment/bin/python" -c '
from importlib.metadata import version
print("torch==" + version("torch").partition("+")[0])' 2>/dev/null) &&
        grep -qxF "$pin" constraints.txt
}

choose_index() {
    index=${TORCH_INDEX:-auto}
    [ "$index" = auto ] || return 0
    index=default
    if [ "$(uname -s)" != Linux ] || has_nvidia_driver; then
        return 0
    elif answers "$cpu_index"; then
        index=$cpu_index
    else
        say "$cpu_index does not answer"
    fi
}

# Without its dependencies, because an index of torch builds lacks the pinned versions of those.
install_torch() {
    if has_pinned_torch; then
        return
    fi
    choose_index
    if [ "$index" = default ]; then
        say "installing torch from pip's default index"
        pip install --constraint constraints.txt --no-deps torch
    else
        say "installing torch from $index"
        pip install --constraint constraints.txt --no-deps --index-url "$index" torch
    fi
}

install_checkout() {
    say "installing spectral-surgery and what it needs"
    if [ "$form" = editable ]; then
        pip install --constraint constraints.txt --editable '.[dev]'
    else
        rm -rf build/wheel
        pip wheel --no-deps --wheel-dir build/wheel .
        pip uninstall --yes spectral-surgery
        pip install --constraint constraints.txt "$(echo build/wheel/*.whl)[report]"
    fi
}

if is_current; then
    exit
fi
check_python
say "setting up with Python $version, which takes a few minutes the first time"
"$environment/bin/python" -m pip --version >/dev/null 2>&1 ||
    "$python" -m venv --clear "$environment"
# The stamp bears the time of the start, so that what changes meanwhile counts as newer.
touch "$environment/.started"
install_torch
install_checkout
mv "$environment/.started" "$stamp"
