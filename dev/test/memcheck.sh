#!/bin/sh
# Runs every kind of attention and every mode of the program briefly, twice: under valgrind (errors,
# leaks) and under ThreadSanitizer (data races; clang with its OpenMP runtime and Archer, which
# tells the sanitizer of OpenMP's barriers). Both need some minutes:
#     sh dev/test/memcheck.sh
#     sh dev/test/memcheck.sh 'mla decoupled --kv-heads 2' 'mha rope'      these kinds only
# The last line is `N runs, M with errors`.
program=$PWD/train_gpt2_mla.c
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cp README.md "$work/text"
cd "$work" || exit 1
runs=0 bad=0

check() {
    runs=$((runs + 1))
    if $under ./program "$@" >out 2>err; then return; fi
    bad=$((bad + 1))
    echo "FAILED $name: $*"; tail -n 30 err
}

[ $# -gt 0 ] || set -- 'mha learned' 'mha rope' 'mha decoupled' 'gqa learned' 'gqa rope' \
    'mqa learned' 'mqa rope' 'mla learned' 'mla decoupled' 'mla decoupled --kv-heads 2' \
    'mla decoupled --q-rank 0 --latent-norm rmsnorm' 'mla decoupled --latent-norm none' \
    'mla decoupled --nope-dim 10 --rope-dim 6 --q-rank 0'

all_kinds() {
    for kind in "$@"; do
        echo "$name: $kind"
        set -- $kind
        attention=$1 position=$2; shift 2
        options="--attention $attention --position $position $* --layers 2 --heads 4 --channels 48
            --seq-len 40 --batch-size 3 --grad-accum 2 --dropout 0.1 --steps 2 --train-data text
            --val-data text --val-batches 2 --sample-every 2 --save m --log l.csv"
        rm -f m l.csv
        check $options --save-every 1
        check $options --resume
        check --load m --eval --val-data text --seq-len 40
        modes=full; [ $attention = mla ] && modes='full latent absorbed'
        for mode in $modes; do
            check --load m --generate 30 --batch-size 2 --prompt 'How to' --top-k 9 --cache $mode
        done
    done
}

[ "$(uname -m)" = x86_64 ] && arch='-mavx2 -mfma'  # valgrind does not know AVX-512
flags='-g -O1 -std=c11 -ffp-contract=fast -Wno-unknown-pragmas'
export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive  # waiting threads leave the processor to others

gcc $flags $arch -fopenmp "$program" -o program -lm || exit 1
name=valgrind
under='valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite,indirect'
all_kinds "$@"

# No -march: ThreadSanitizer looks at accesses of up to 16 bytes only.
sanitize='clang -Wno-pass-failed -fsanitize=thread -fopenmp'
$sanitize $flags "$program" -o program -lm || exit 1
archer=$(ls /usr/lib/llvm-*/lib/libarcher.so | tail -n 1)
[ -n "$archer" ] || {
    echo "libarcher.so not found: expected with LLVM's OpenMP (libomp-dev)"; exit 1
}
echo 'called_from_lib:libomp.so' >suppressions
export OMP_NUM_THREADS=4 OMP_TOOL_LIBRARIES=$archer
export TSAN_OPTIONS='suppressions=suppressions exitcode=9'
name=ThreadSanitizer under=
all_kinds "$@"
# Products that all threads share: of many rows, some with more terms than KC, and a large gradient
# (the head's).
check --layers 1 --channels 72 --heads 4 --vocab-size 9000 --batch-size 16 --seq-len 64 --steps 2 \
    --sample-every 0 --train-data text

# Caches of several chunks. Then a race put in on purpose, threads that project up into the same
# place, must be reported.
./program --layers 1 --heads 16 --channels 256 --seq-len 600 --steps 0 --save long >out || exit 1
prompt=$(head -c 590 text)
for mode in full latent absorbed; do
    check --load long --generate 3 --cache $mode --prompt "$prompt"
done
sed 's/cache->kv + (long)thread \* rows \* CHUNK/cache->kv/' "$program" >racy.c
! cmp -s "$program" racy.c || { echo "no race put in: sed did not find its line"; exit 1; }
$sanitize $flags racy.c -o racy -lm || exit 1
./racy --load long --generate 3 --cache latent --prompt "$prompt" >out 2>&1
if ! grep -aq 'data race' out; then
    bad=$((bad + 1)); echo "FAILED ThreadSanitizer: did not report a race put in on purpose"
fi

echo "$runs runs, $bad with errors"
[ $bad = 0 ]
