#!/usr/bin/env bash
# A real Slurm for the tests (Debian and Ubuntu packages, about 10 s); nothing to do where it is installed. No daemon is started.
set -euo pipefail
command -v slurmctld slurmd munged sbatch ip unshare setpriv >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "the tests need slurmctld, slurmd, munge and iproute2; install your distribution's packages" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge iproute2 util-linux >/dev/null
