#!/bin/sh
# The two ends of the ISA ladder under emulation (Debian's qemu-user): on an AVX2-only CPU the embedded model generates,
# on a CPU below AVX2 the import fails with one clear line and no SIGILL.
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/pace ] || { python3 -m venv .venv && .venv/bin/python -m pip install --quiet .; }
python=$(.venv/bin/python -c 'import os, sys; print(os.path.realpath(sys.executable))')
path=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')
echo "Haswell:"
PYTHONPATH=$path qemu-x86_64 -cpu Haswell "$python" -m pace generate --model demo --prompt "import os" --max-tokens 8 --temperature 0 --threads 1
echo "Nehalem:"
if out=$(PYTHONPATH=$path qemu-x86_64 -cpu Nehalem "$python" -c "import pace" 2>&1); then
    echo "pace imported on Nehalem" >&2
    exit 1
fi
echo "$out" | grep "ImportError: pace needs an x86-64 CPU with AVX2"
