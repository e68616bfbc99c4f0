#!/bin/sh
# Provides the browser that tests of pages need: installs Debian's chromium if there is none and we are root. Fails only if
# OLMOSCOPE_TEST_BROWSER is `required`; otherwise those tests are skipped, and say so.
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null && exit 0
fi
echo "no browser: tests of pages are skipped; install one with \`apt-get install chromium\` (as root, make test does it)" >&2
[ "${OLMOSCOPE_TEST_BROWSER:-}" != required ]
