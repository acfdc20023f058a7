#!/usr/bin/env bash
# A real Slurm for the tests (Debian and Ubuntu packages, about 10 s); nothing to do where it is installed. No daemon is started.
set -euo pipefail
missing=""
for tool in slurmctld slurmd munged sbatch ip unshare setpriv; do
    command -v "$tool" >/dev/null || missing+=" $tool"  # asked about several at once, it is content with one
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "the tests need$missing; install your distribution's packages of Slurm, munge, iproute2 and util-linux" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge iproute2 util-linux >/dev/null
