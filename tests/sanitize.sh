#!/bin/sh
# The suites that reach the C code, under AddressSanitizer with UndefinedBehaviorSanitizer and under ThreadSanitizer:
#
#     sh tests/sanitize.sh [address] [thread]      both where none is named
#
# Each is built into an environment of its own below .sanitize, where weights, KV, activations and scratch are allocated
# with poisoned bytes around them (_ext/pages.c). Before its suites run, planted faults must be reported
# (tests/planted.py): a sanitizer that finds nothing may as well be off. Needs gcc with its sanitizer libraries.
set -eu
cd "$(dirname "$0")/.."
home=$PWD/.sanitize
python=$home/venv/bin/python
# TOKENIZERS_PARALLELISM: its threads meet in Rust, which is not instrumented, and look like races.
export CC="${CC:-gcc}" OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
unset PYTHONPATH PACE_ISA
if [ ! -x "$home/venv/bin/meson" ]; then
    python3 -m venv "$home/venv"
    "$python" -m pip install --quiet --disable-pip-version-check ".[test]" meson-python meson ninja "Cython>=3.1"
fi
export PATH="$home/venv/bin:$PATH"

build() { # name, value of -Db_sanitize
    "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --upgrade \
        --target "$home/$1/site" . "-Cbuilddir=$home/$1/build" "-Csetup-args=-Db_sanitize=$2" \
        -Csetup-args=-Dbuildtype=debugoptimized -Csetup-args=-Db_lundef=false \
        -Csetup-args=-Dc_args=-fno-omit-frame-pointer
}

library() { $CC "-print-file-name=lib$1.so"; }

planted() { # fault, words of the report
    if out=$(run "$python" tests/planted.py "$1" 2>&1); then
        echo "planted $1: no report" >&2
        exit 1
    fi
    echo "$out" | grep -q "$2" || { echo "$out" >&2; echo "planted $1: not '$2'" >&2; exit 1; }
    echo "planted $1: reported"
}

suite() { # what is left out, test files; --capture=sys: a report goes to the terminal, not down with pytest
    run "$python" -m pytest -q -p no:cacheprovider -p no:faulthandler --capture=sys -m "not slow and not live" -k "not ($1)" \
        $2
}

# These measure memory or time, replace malloc, or want a fault of their own.
unfit="pool_maps_ahead or importing_changes_nothing or burns_no_cpu or deltas_join"
unfit="$unfit or allocates_nothing or growth_that_failed or faulthandler_speaks"

address() {
    build address address,undefined
    run() {
        env PYTHONPATH="$home/address/site" LD_PRELOAD="$(library asan) $(library ubsan)" PYTHONMALLOC=malloc \
            UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 "$@"
    }
    planted overflow heap-buffer-overflow
    planted misaligned "misaligned address"
    suite "$unfit" "tests/ext tests/test_ops.py tests/test_invariance.py tests/engine/test_law1.py
        tests/models/test_executor.py tests/llm tests/test_async_llm.py"
}

thread() {
    build thread thread
    # Without -R the kernel may map the interpreter where gcc 12's shadow memory lies.
    run() {
        setarch -R env PYTHONPATH="$home/thread/site" LD_PRELOAD="$(library tsan)" \
            TSAN_OPTIONS=halt_on_error=1:exitcode=66:die_after_fork=0 "$@"
    }
    planted race "data race"
    # A forked child may not start threads there.
    suite "$unfit or forked_child_gets" "tests/ext/test_threads.py tests/ext/test_sampling.py tests/ext/test_sampling_rows.py
        tests/ext/test_logprobs.py tests/test_invariance.py tests/llm tests/test_async_llm.py"
}

for name in ${*:-address thread}; do
    "$name"
done
