#!/usr/bin/env bash
# Installs Debian's headless Chromium for the tests of pages, unless a Chromium is installed or CHROMIUM names one.
set -euo pipefail
[ -n "${CHROMIUM:-}" ] && exit 0
for name in chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "the tests need a Chromium; install your distribution's, or name one in CHROMIUM" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium-headless-shell >/dev/null || # Ubuntu's chromium is a snap, which cannot be controlled over a pipe
    { echo "there is no package chromium-headless-shell here; install a Chromium, and name it in CHROMIUM" >&2; exit 1; }
