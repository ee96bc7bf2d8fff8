#!/usr/bin/env bash
# Debian's Slurm, whose real daemons the launch tests start; accounting (sacct) needs the last two packages.
# Needs root, or sudo without a password; says so and goes on otherwise: the tests that need Slurm fail then.
set -euo pipefail

packages=(slurm-wlm munge slurmdbd mariadb-server)
dpkg --status "${packages[@]}" >/dev/null 2>&1 && exit 0
echo "setup: ${packages[*]} ..." >&2
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo -n)
install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}")
if ! { "${as_root[@]}" apt-get update && "${as_root[@]}" "${install[@]}"; } >/dev/null; then
    echo "setup: the tests that need Slurm will fail; as root: apt-get install ${packages[*]}" >&2
fi
