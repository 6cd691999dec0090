#!/bin/sh
# Install tmemfs from this checkout into a virtual environment: `setup.sh [--store-only | --vm | --bench | --corpus] VENV`.
# Debian packages that are missing need root; --store-only installs what `tmemfs demo` needs, without root and FUSE;
# --vm installs what the virtual machine of `make test-vm` needs beside all the rest, --bench the programs that `make bench` runs,
# --corpus those that `make corpus` captures: those from PyPI into VENV/corpus, where tmemfs never imports them. No service is
# started by its installation.
set -eu
python=${PYTHON:-/usr/bin/python3}
target=setup
packages="fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-dev python3-venv liblz4-dev libxxhash-dev util-linux mount fio stress-ng"
vm_packages="linux-image-amd64 qemu-system-x86 busybox-static e2fsprogs udev kmod stressapptest stress-ng"
bench_packages="postgresql redis-server g++ default-jdk-headless"
corpus_packages="postgresql redis-server chromium fonts-dejavu-core default-jdk-headless nodejs python3-venv"
policy=/usr/sbin/policy-rc.d

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

# Debian starts a service once it is installed, unless this file forbids it; one that is there already is left as it is.
forbid_services() {
    [ "$(id -u)" = 0 ] && [ ! -e "$policy" ] || return 0
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
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
elif [ "${1:-}" = --bench ]; then
    packages=$bench_packages target=bench
    forbid_services
    install_packages
    "$2/bin/pip" install --quiet --disable-pip-version-check --editable '.[plot]'
elif [ "${1:-}" = --corpus ]; then
    packages=$corpus_packages target=corpus
    forbid_services
    install_packages
    make_venv "$2/corpus"
    "$2/corpus/bin/pip" install --quiet --disable-pip-version-check 'pandas>=2.2' 'scikit-learn>=1.5'
else
    install_packages
    make_venv "$1"
    "$1/bin/pip" install --quiet --disable-pip-version-check --editable '.[test,lint]'
fi
