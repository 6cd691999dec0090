#!/bin/sh
# Install tmemfs from this checkout into a virtual environment: `setup.sh [--store-only | --vm] VENV`.
# Debian packages that are missing need root; --store-only installs what `tmemfs demo` needs, without root and FUSE;
# --vm installs what the virtual machine of `make test-vm` needs beside all the rest.
set -eu
python=${PYTHON:-/usr/bin/python3}
target=setup
packages="fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-dev python3-venv util-linux mount fio stress-ng"
vm_packages="linux-image-amd64 qemu-system-x86 busybox-static e2fsprogs udev kmod stressapptest stress-ng"

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
        echo "setup: run 'sudo make $target'" >&2
        exit 2
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet=2
    # shellcheck disable=SC2086
    apt-get install --yes --quiet=2 --no-install-recommends $missing >/dev/null
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
elif [ "${1:-}" = --vm ]; then
    packages=$vm_packages target=test-vm
    install_packages
    "$2/bin/pip" install --quiet --disable-pip-version-check 'virtme-ng>=1.33'
else
    install_packages
    make_venv "$1"
    "$1/bin/pip" install --quiet --disable-pip-version-check --editable '.[test,lint]'
fi
