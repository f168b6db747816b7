#!/usr/bin/env bash
# Install what the tests need, and run them: bash tests/run.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# A Python that belongs to the system refuses pip: then a virtual environment beside this checkout takes its place.
if ! "$python" -m pip install -q -r requirements.txt -r tests/requirements.txt; then
    "$python" -m venv .venv
    python=.venv/bin/python
    "$python" -m pip install -q -r requirements.txt -r tests/requirements.txt
fi

# For tests of the browser page: a browser, and a Vulkan driver in software. Only where apt and the right to use it are.
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] && ! { command -v chromium && ls /usr/share/vulkan/icd.d/lvp*; } >/dev/null 2>&1
then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium \
        mesa-vulkan-drivers; } >/dev/null 2>&1 || echo "no browser or Vulkan driver could be installed"
fi

exec "$python" -m pytest -q -n 2 --dist worksteal tests "$@"  # each test runs on one thread
