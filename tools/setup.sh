#!/bin/sh
# Install tmemfs from this checkout into a virtual environment: `setup.sh [--store-only] VENV`.
# Debian packages that are missing need root; --store-only installs what `tmemfs demo` needs, without root and FUSE.
set -eu
python=${PYTHON:-/usr/bin/python3}
packages="fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-dev python3-venv util-linux mount fio stress-ng"

installed() {
    [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

install_packages() {
    missing=""
    for package in $packages; do
        installed "$package" || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        echo "setup: these Debian packages are missing:$missing" >&2
        echo "setup: run 'sudo make setup'" >&2
        exit 2
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet=2
    # shellcheck disable=SC2086
    apt-get install --yes --quiet=2 --no-install-recommends $missing
}

make_venv() {
    [ -x "$1/bin/pip" ] && return 0
    "$python" -m venv "$1" || {
        echo "setup: $python cannot make a virtual environment: run 'sudo make setup', or apt-get install python3-venv" >&2
        exit 2
    }
}

if [ "${1:-}" = --store-only ]; then
    make_venv "$2"
    "$2/bin/pip" install --quiet --disable-pip-version-check lz4 zstandard xxhash trio
else
    install_packages
    make_venv "$1"
    "$1/bin/pip" install --quiet --disable-pip-version-check --editable '.[test,lint]'
fi
