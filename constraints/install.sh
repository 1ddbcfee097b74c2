#!/usr/bin/env bash
# install.sh VENV LOCK [DEV_LOCK]: a virtual environment with exactly the packages of the lock files, and this package,
# editable. Run by the Makefile. VENV/.ready-run and VENV/.ready-dev mark an environment that was finished; without a
# mark (first time, or killed half-way) it is built anew, with one it is brought up to date.
#
# No CUDA package can come in: `--no-deps` installs what the locks list and nothing else, so the several GB that torch
# or a release newer than the pinned one would draw in never start to download. What `--no-deps` cannot help is a torch
# whose own file is the CUDA build (the default on Linux without pip being told where CPU builds are): it would not even
# import without those packages. So pip is first asked what it would take, which downloads only the description.
set -euo pipefail

venv=$1 lock=$2 dev=${3-}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PYTHONNOUSERSITE=1
unset PYTHONPATH PYTHONHOME
python=${PYTHON:-python3}
started=$SECONDS
say() { printf '%s: %s\n' "$venv" "$*"; }
die() { printf '%s: %s\n' "$venv" "$*" >&2; exit 1; }
pin() { grep -E "^$1==" "$lock" || die "$lock does not pin $1"; }

ready=
[ ! -e "$venv/.ready-run" ] && [ ! -e "$venv/.ready-dev" ] || ready=yes
rm -f "$venv/.ready-run" "$venv/.ready-dev"
if [ -z "$ready" ]; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.version_info >= (3, 11))') ||
        die "no Python found as '$python': install Python 3.11 or newer, or name one with PYTHON=..."
    [ "${version#* }" = True ] ||
        die "'$python' is Python ${version% *}, and 3.11 or newer is needed: name another one with PYTHON=..."
    say "new virtual environment, Python ${version% *}"
    "$python" -m venv --clear "$venv" ||
        die "'$python -m venv' failed (its message is above): on Debian and Ubuntu, install python3-venv"
fi
# Byte code is left to the first import, which needs a small part of these packages: half the time of an installation.
pip() { "$venv/bin/python" -m pip "$@"; }
install() { pip install -qq --progress-bar off --no-compile "$@"; }

torch=$(pin torch)
if [ "$(pip freeze 2>/dev/null | sed -n 's/^\(torch==[^+]*\).*/\1/p')" != "$torch" ]; then
    say "$torch, the largest package"
    if [ -n "${ALLOW_CUDA-}" ]; then
        install "$torch" -c "$lock"
    else
        report=$(pip install -qq --dry-run --no-deps --ignore-installed --report - "$torch") ||
            die "pip cannot find $torch (its message is above): Python ${version-} needs a build of it"
        cuda=$("$venv/bin/python" -c '
import json, sys
from pip._vendor.packaging.requirements import Requirement
found = json.load(sys.stdin)["install"][0]["metadata"].get("requires_dist", ())
needs = [need for need in map(Requirement, found) if not need.marker or need.marker.evaluate({"extra": ""})]
print(*(need.name for need in needs if need.name.startswith(("nvidia", "cuda", "triton"))))' <<<"$report")
        [ -z "$cuda" ] || die "here pip finds only a CUDA build of $torch, which needs $cuda" \
            "(several GB). Tell pip where PyTorch's CPU builds are (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS; PyTorch's" \
            "installation page has the address), or set ALLOW_CUDA=1 to take the CUDA build."
        install --no-deps "$torch"
    fi
fi

say "the packages of $lock${dev:+ and $dev}"
install --no-deps "$(pin setuptools)"
# One package of the lock is a source package; it is built with the pinned setuptools, in this environment.
install --no-deps --no-build-isolation -r "$lock" ${dev:+-r "$dev"}
say "sink_circuits, editable"
install --no-deps --no-build-isolation -e .
check=$(pip check 2>&1) || die "the locked packages do not fit together, or not the ranges of pyproject.toml:
$check"
"$venv/bin/python" -c 'import torch' || die "$torch does not import (its message is above)"
pwd -P >"$venv/.root"
touch "$venv/.ready-run"
[ -z "$dev" ] || touch "$venv/.ready-dev"
say "ready after $((SECONDS - started)) s"
