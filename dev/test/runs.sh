#!/bin/sh
# What can happen to a run and its files: signals, readers that end, two runs at once, a forgotten
# --resume, disks and limits, numbers that overflow. No run is lost by it, and no file. Then what
# generation prints, and where. Part of `make test`, or alone:
#     sh dev/test/runs.sh            with ./train_gpt2_mla, started by the command in $RUN if set
# The last line is `N passed, M failed`.
export LC_ALL=C ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1
program=$PWD/train_gpt2_mla
source=$PWD/train_gpt2_mla.c
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
passed=0 failed=0

holds() {  # what, then a command that must succeed
    what=$1; shift
    if "$@" >said 2>&1; then passed=$((passed + 1)); return; fi
    failed=$((failed + 1)); echo "FAILED runs: $what: $*"; sed 's/^/    /' said | head -n 5
}

run() { $RUN "$program" "$@"; }
says() { grep -q -e "$2" "$1"; }
lacks() { ! grep -q -e "$2" "$1"; }
step_in() { grep -ao '"step":"[0-9]*"' "$1" | head -n 1 | tr -dc 0-9; }
opens() { run --eval --load "$1" --val-data text; }

printf 'To be, or not to be, that is the question.\n' >text
tiny='--attention mha --layers 1 --heads 2 --channels 8 --seq-len 8 --train-data text'
tiny="$tiny --sample-every 0"
endless="$tiny --steps 100000000"

speed=$(run $tiny --steps 30 | sed -n 's/.*, \([0-9]*\) tokens.s$/\1/p')
micro_batches() { echo $((speed * $1 / 64000 + 1)); }  # for a step of so many milliseconds

begin() {  # starts a run in the background, and waits for its first step; $started is its process
    rm -f out
    $RUN "$program" "$@" >out 2>err & started=$!
    until grep -qs '^step' out || ! kill -0 $started 2>/dev/null; do :; done
}
ends() {  # the status of the run in the background
    wait $started
    found=$?
    [ $found = "$1" ] || { echo "exit status $found"; cat err; false; }
}

# --- Signals. All that announce an end save; two that come together are one.

for signal in HUP INT USR1 USR2 TERM XCPU XFSZ; do
    if [ $signal = HUP ] && sh -c 'kill -s HUP $$' 2>/dev/null; then
        echo "runs: not run: signal HUP (ignored here, as nohup has it)"; continue
    fi
    rm -f m m.csv
    begin $endless --save m --log m.csv
    kill -s $signal $started
    wait $started
    status=$? number=$((status - 128))
    holds "signal $signal: exit status" [ "$(kill -l $status)" = $signal ]
    step=$(sed -n "s/^stopped by signal $number (.*) after step \([0-9]*\); the same.*/\1/p" out)
    holds "signal $signal: saved" [ "$(step_in m)" = "$step" ]
    holds "signal $signal: a row a step" [ "$(grep -c '^[0-9]' m.csv)" = "$step" ]
    holds "signal $signal: said at once" says err '^train_gpt2_mla: stopping after this step; again'
done
holds "no file is left behind" [ "$(echo m*)" = "m m.csv" ]
rm m; begin $endless --grad-accum $(micro_batches 500) --save m; sleep 0.1
for i in 1 2 3; do kill $started; sleep 0.05; done
holds "a signal that comes twice is one: exit status" ends 143
holds "a signal that comes twice is one: saved" opens m
rm -f m out; (trap '' HUP; exec $RUN "$program" $endless --save m >out 2>err) & started=$!
until grep -qs '^step' out; do :; done
kill -s HUP $started; sleep 0.1; kill $started
holds "nohup: goes on" ends 143

# A validation of half a minute or more is cut short; a second signal, a second later, ends at once.
cp text long; i=0; while [ $i -lt 19 ]; do cat long long >more; mv more long; i=$((i + 1)); done
rm m
begin $tiny --steps 1000000 --val-data long --val-every 1 --val-batches 0 --batch-size 1 --save m
before=$(date +%s); kill $started
holds "validation is cut short: exit status" ends 143
holds "validation is cut short: soon" [ $(($(date +%s) - before)) -lt 10 ]
holds "validation is cut short: said" says out '^val  1/1000000 | cut short$'
rm long
holds "validation is cut short: saved" opens m
rm m out
$RUN "$program" $tiny --steps 9 --grad-accum 65536 --batch-size 64 --save m >out 2>err & started=$!
until grep -qs threads out || ! kill -0 $started; do sleep 0.1; done
sleep 0.3; kill $started; sleep 1.2; kill $started
holds "a second signal a second later: exit status" ends 143
holds "a second signal a second later: unsaved" [ ! -e m ]
holds "a second signal a second later: the next run begins" run $tiny --steps 1 --save m
rm m; begin $endless --grad-accum $(micro_batches 4000) --save m; sleep 0.1
for i in 1 2 3; do kill -s XCPU $started; sleep 0.6; done
wait $started
holds "the limit of time comes again and again: exit status" [ "$(kill -l $?)" = XCPU ]
holds "the limit of time comes again and again: saved" opens m
rm m; $RUN "$program" $tiny --steps 1 --val-data text --val-batches 0 --save m >out
cp text long; i=0; while [ $i -lt 19 ]; do cat long long >more; mv more long; i=$((i + 1)); done
begin $tiny --steps 1 --val-data long --batch-size 1 --save m
kill $started
holds "the last validation is cut short: exit status" ends 143
holds "the last validation is cut short: said" says out '^the last validation was stopped by sig'
rm long

rm -f m m.csv; run $tiny --steps 20 --val-data text --save m --log m.csv >out
cp m whole; cp m.csv whole.csv
sed -i 's/"validated":"20"/"validated":"00"/' m  # as if the last validation had been cut short
sed -i '$ s/^\([0-9]*,[^,]*,[^,]*,[^,]*\),[^,]*,/\1,,/' m.csv
run $tiny --steps 20 --val-data text --save m --log m.csv --resume >out
holds "a validation that was cut short is made up" says out '^val  20/20 | loss '
holds "a validation that was cut short comes into the log" cmp m.csv whole.csv
holds "a validation that was cut short: the checkpoint is the same" cmp m whole
run $tiny --steps 20 --val-data text --save m --resume >out
holds "one that was made is not made again" lacks out '^val  20/20'

# A run with --precision bf16, killed and resumed, ends in the same bits; not in another precision.
bf16="$tiny --steps $((speed / 100 + 20)) --precision bf16 --save m"
rm -f m; run $bf16 >out; mv m whole
begin $bf16; kill $started; wait $started
run ${bf16% --prec*} --save m --resume >out 2>err
holds "bf16: not in float32" says err 'm: its run had precision bf16; this one has fp32 (--load'
run $bf16 --resume >out
holds "bf16: resumed, the same bits" cmp m whole
run $tiny --steps $((speed / 100 + 20)) --save single >out
holds "bf16: not the bits of float32" sh -c '! cmp -s m single'
rm -f m single

# --- A reader of standard output that ends, or is not there

mkfifo pipe
head -n 1 pipe >line & reader=$!
$RUN "$program" $endless --print-every 1 --save m >pipe 2>err & started=$!
wait $reader; sleep 0.3; kill -s INT $started
holds "no reader, then a signal: exit status" ends 130
holds "no reader, then a signal: saved" opens m
holds "no reader: said once" \
    [ "$(grep -c 'standard output: cannot write: .*; the run goes on$' err)" = 1 ]
rm m; { run $tiny --steps 9000 --print-every 1 --save m; echo $? >status; } 2>err | head -n 1 >line
holds "a reader that ends: the run goes on" [ "$(step_in m)" = 9000 ]
holds "a reader that ends: exit status" [ "$(cat status)" = 1 ]
rm m; (exec 3<pipe; read -r line <&3; sleep 4) & reader=$!
$RUN "$program" $endless --print-every 1 --save m >pipe 2>err & started=$!
sleep 1; kill $started; sleep 1
holds "a reader that does not read: saved" opens m
wait $reader
holds "a reader that does not read: exit status" ends 143
rm m; exec 3<>pipe  # now a pipe that is full before the line of the step at hand is written
$RUN "$program" $endless --grad-accum $(micro_batches 2500) --save m >pipe 3<&- 2>err & started=$!
sleep 0.5; timeout 1 cat /dev/zero >pipe; kill $started
for i in 1 2 3 4 5 6 7 8 9; do [ -e m ] || sleep 1; done
holds "a full pipe: saved" opens m
exec 3<&-; wait $started 2>/dev/null
rm -f m m.csv; run $tiny --steps 3 --save m --log m.csv >&- 2>&- <&-
holds "all closed: the log has rows only" [ "$(grep -vc '^#' m.csv)" = 4 ]
holds "all closed: saved" opens m
run $tiny --steps 3 --log only.csv >&- 2>&- <&-
holds "all closed, a log alone: rows only" [ "$(grep -vc '^#' only.csv)" = 4 ]

# --- Two runs, one file. A run that was killed is in nobody's way.

rm m m.csv; begin $endless --save m --save-every 9 --log m.csv --val-data text --save-best b
until [ -e m ]; do :; done
first=$started
taken() {  # file, options
    file=$1; shift
    run $endless --val-data text "$@" >out 2>err2
    [ $? = 1 ] && [ ! -s out ] &&
        says err2 "^train_gpt2_mla: $file: another run (process [0-9]*) is writing it; end that, or"
}
holds "two runs: --save" taken m --save m
holds "two runs: --save by another name" taken ./m --save ./m
holds "two runs: --log" taken m.csv --log m.csv
holds "two runs: --save-best" taken b --save-best b
holds "two runs: --resume" taken m --save m --resume --save-best c
kill -s KILL $first; wait $first 2>/dev/null
holds "a killed run: the next begins" run $tiny --steps 1 --save m --log m.csv
holds "a killed run: its lock goes with the next" [ ! -e m.lock -a ! -e m.csv.lock ]

# --- A forgotten --resume

rm -f m* b*
run $tiny --steps 20 --save m --log m.csv >out
begin $endless --save m --log m.csv; kill $started; wait $started; stopped=$(step_in m)
holds "without --resume: said" \
    says out '^m: holds step 20; the first save keeps it as m.old (to go on from it: --resume)$'
holds "without --resume: the old one is kept" [ "$(step_in m.old)" = 20 ]
holds "without --resume: said of the log" \
    says out '^m.csv: exists; the first step keeps it as m.csv.old$'
holds "without --resume: the old log is kept" [ "$(tail -n 1 m.csv.old | cut -d, -f1)" = 20 ]
holds "without --resume: said at the end" says out '^m.old has step 20 of before: to go on from it'
run $tiny --steps 4 --save m >out
holds "without --resume again: nothing is lost" \
    [ "$(step_in m.old) $(step_in m.old2) $(step_in m)" = "20 $stopped 4" ]
run $tiny --steps 9 --save m >out; kept=$(step_in m.old3)
run $tiny --steps 9 --save m --resume >out
holds "with --resume nothing is put aside" [ "$kept" = 4 -a ! -e m.old4 ]
rm -f m*; begin $endless --save m --log m.csv; sleep 0.5; kill $started; wait $started
begin $endless --save m --log m.csv --resume; kill $started; wait $started
holds "--resume puts nothing aside" [ ! -e m.old -a ! -e m.csv.old ]
holds "no loss in a log's rows without a validation" \
    awk -F, '/^[0-9]/ && $5 != "" { bad = 1 } END { exit bad }' m.csv
holds "--resume: the log's seconds go on" \
    awk -F, '/^[0-9]/ { bad += $7 < last; last = $7 } END { exit bad || last < 0.5 }' m.csv

for run in '--log fresh.csv' '--save m --log m.csv --resume'; do
    begin $endless $run; log=${run#*--log }; log=${log% *}
    : >$log; sleep 0.2; kill $started; wait $started
    holds "$log is emptied: no holes" [ "$(tr -d '\0' <$log | wc -c)" = "$(wc -c <$log)" ]
done
rm m.csv; begin $endless --save m --log m.csv; kill $started; wait $started; cp m.csv was
slow="$tiny --steps 9 --grad-accum 65536 --batch-size 64"
$RUN "$program" $slow --save m --log m.csv >out 2>err & started=$!
until grep -qs threads out; do :; done; kill -s KILL $started; wait $started 2>/dev/null
holds "killed before its first step: log and checkpoint stay" cmp m.csv was
rm -f m m.*; begin $endless --save m --log m.csv; rm m.csv; sleep 0.2; kill $started; wait $started
holds "a log that was removed: said" \
    says err 'm.csv: cannot write: No such file or directory; the run goes on without it$'
rm -f m m.*; begin $endless --save m --log m.csv; kill $started; wait $started
awk 'NR == 3 { $0 = sprintf("# %3000s", "") } 1' m.csv >long.csv; cp long.csv m.csv
run $endless --save m --log m.csv --resume >out 2>err
holds "a log with a long line: line" \
    says err '^train_gpt2_mla: m.csv: a line of over 2046 bytes; will not go on with it$'
holds "a log with a long line: as it was" cmp m.csv long.csv
rm -f m m.*; begin $endless --save m --log m.csv; kill $started; wait $started; printf 1 >>m.csv
begin $endless --save m --log m.csv --resume; kill $started; wait $started
holds "a row that was cut short goes" awk -F, '/^[0-9]/ && $1 != ++n { exit 1 }' m.csv
rm -f m m.*; begin $endless --save m --log m.csv; kill $started; wait $started
grep -v '^#' m.csv >older.csv  # as earlier versions began it; the next rows are of steps not saved
cp older.csv m.csv; step=$(step_in m)
printf '%d,1,1,1,,1,9\n%d,' $((step + 1)) $((step + 2)) >>m.csv
begin $endless --save m --log m.csv --resume; kill $started
holds "an older log: exit status" ends 143
head -n $(wc -l <older.csv) m.csv >kept
holds "an older log goes on as it is" cmp older.csv kept
holds "a log's rows of steps that are not done go" [ "$(grep -c "^$((step + 1))," m.csv)" = 1 ]
begin $endless --save m; rm m; kill $started
holds "a checkpoint that was removed: exit status" ends 143
holds "a checkpoint that was removed: saved all the same" [ -e m ]
holds "a checkpoint that was removed: no complaint" lacks err 'not written'
holds "a checkpoint that was removed: not said to be kept" lacks out ' of before: '
rm -f m*; run $tiny --steps 20 --save other >out
begin $endless --save m --save-every 200; until [ -e m ]; do :; done; mv other m
until [ -e m.old ] || ! kill -0 $started; do :; done; kill $started; wait $started
holds "a checkpoint put there during the run: is kept" [ "$(step_in m.old)" = 20 ]
holds "a checkpoint put there during the run: said" \
    says err '^train_gpt2_mla: m: not what this run saved; kept as m.old$'
holds "a checkpoint put there during the run: said at the end" \
    says out '^m.old has step 20 of before'
holds "what the run itself saved is not kept" [ ! -e m.old2 ]
rm -f m*; begin $endless --save m; ln -s elsewhere m.tmp; kill $started; wait $started
holds "a link put at m.tmp during the run: not followed" [ ! -e elsewhere -a -h m.tmp ]
holds "a link put at m.tmp during the run: saved" opens m

# --- What the user has set

rm -f m*; run $tiny --steps 1 --save m >out; chmod 444 m; cp m was
run $tiny --steps 2 --save m >out 2>err
holds "read-only: exit status" [ $? = 1 ]
holds "read-only: line" says err '^train_gpt2_mla: m: exists and is read-only; will not replace it$'
holds "read-only: as it was" cmp m was
chmod 600 m; run $tiny --steps 2 --save m >out
holds "mode 600 is kept" [ "$(ls -l m | cut -c1-10)" = -rw------- ]
mkdir there; mv m there; ln -s there/m m; run $tiny --steps 3 --save m >out
holds "a link stays one" [ -h m -a "$(step_in there/m)" = 3 ]
ln -s nowhere/m dangling; run $tiny --steps 3 --save dangling >out 2>err
holds "a link to nothing: line" says err '^train_gpt2_mla: dangling: a link that leads to no file: '

chmod 600 m.csv 2>/dev/null || { run $tiny --steps 1 --log m.csv >out; chmod 600 m.csv; }
run $tiny --steps 1 --log m.csv >out
holds "a log's mode 600 is kept" [ "$(ls -l m.csv | cut -c1-10)" = -rw------- ]
echo mine >n.lock; run $tiny --steps 1 --save n >out 2>err
holds "a file of the lock's name: exit status" [ $? = 1 ]
holds "a file of the lock's name: line" says err 'n.lock: exists and is no lock of this program$'
holds "a file of the lock's name: as it was" [ "$(cat n.lock)" = mine ]
run $tiny --steps 5 --save a --log a.csv >out; run $tiny --steps 6 --save b --log b.csv >out
cp b.csv was; run $tiny --steps 5 --save a --resume --log b.csv >out
holds "another run's log, nothing to do: as it was" cmp b.csv was
begin $endless --save c; kill $started; wait $started
run $endless --save c --resume --log b.csv >out 2>err
holds "another run's log, --resume: exit status" [ $? = 1 ]
holds "another run's log, --resume: line" says err 'b.csv: the log of a run with other settings'
holds "another run's log, --resume: as it was" cmp b.csv was
begin $endless --save b --save-every 200; echo mine >b.old; kill $started; wait $started
holds "a file that took the name meanwhile: as it was" [ "$(cat b.old)" = mine ]
holds "a file that took the name meanwhile: the next is taken" [ "$(step_in b.old2)" = 6 ]

# --- Disks and limits. The run outlives its log, and a save that fails.

rm -f m m.* there/*
( ulimit -f 128 && run $tiny --steps 1000000 --save m --log m.csv >out 2>err
echo $? >status )
holds "file-size limit: the log" \
    says err 'm.csv: cannot write: File too large; the run goes on without'
holds "file-size limit: exit status" [ "$(cat status)" = 1 ]
holds "file-size limit: said" \
    says out '^stopped by signal 25 (File size limit exceeded) after step '
holds "file-size limit: saved" opens m
mkdir full
cat >on_disk <<'END'
mount -t tmpfs -o size=$1 disk full; shift
"$@"; status=$?; cp full/* kept/ 2>/dev/null; exit $status
END
disk() { rm -rf kept; mkdir kept; unshare -rm sh on_disk "$@" >out 2>err; }
if disk 40k true; then
    disk 16k $RUN "$program" $tiny --steps 2000 --save m --log full/m.csv
    holds "log's disk full: exit status" [ $? = 1 ]
    holds "log's disk full: line" says err \
        '^train_gpt2_mla: full/m.csv: cannot write: No space left.*; the run goes on without it$'
    holds "log's disk full: saved, to the end" [ "$(step_in m)" = 2000 ]
    disk 16k $RUN "$program" $tiny --steps 40 --save-every 5 --save full/m
    holds "save's disk full: exit status" [ $? = 1 ]
    holds "save's disk full: tried at each save" \
        [ "$(grep -c '^train_gpt2_mla: full/m: not written: No space' err)" = 9 ]
    holds "save's disk full: the run goes on" says out '^step 40/40'
    holds "save's disk full: not called saved" lacks out '^saved'
    disk 8k $RUN "$program" $tiny --steps 9 --val-data text --save-best full/b
    holds "best's disk full: exit status" [ $? = 1 ]
    holds "best's disk full: not called saved" lacks out 'saved full/b'
    disk 8k $RUN "$program" $tiny --steps 0 --vocab-size 256 --save full/m
    holds "initial model, disk full: exit status" [ $? = 1 ]
    cat >held <<'END'
>full/m; mount --bind full/m full/m; "$@"; status=$?; umount full/m; exit $status
END
    disk 400k sh held $RUN "$program" $tiny --steps 40 --save-every 5 --save full/m
    holds "a name that cannot be had: exit status" [ $? = 1 ]
    holds "a name that cannot be had: said" says err \
        '^train_gpt2_mla: full/m: not written: .* (the checkpoint is full/m.old)$'
    holds "a name that cannot be had: the last is kept" \
        [ "$(cd kept; echo m.*) $(step_in kept/m.old)" = "m.old 40" ]
else echo "runs: not run: full disk (no right to mount one here)"; fi

# --- Numbers that overflow

wild="$tiny --learning-rate 1000 --weight-decay 1000 --schedule constant --grad-clip 0"
rm -f m m.*; run $wild --steps 50 --save m --save-every 1 >out 2>err
holds "overflow: exit status" [ $? = 1 ]
holds "overflow: the last checkpoint has a loss" opens m
holds "overflow: said" \
    says err ' not saved (a lower --learning-rate may help)$'
run $wild --steps 50 --save m --save-every 1 --resume >out 2>err2
holds "overflow: resumed, it ends as before" [ $? = 1 -a "$(cat err2)" = "$(cat err)" ]
rm -f m*; run $tiny --steps 20 --save m >out; cp m was
run $wild --steps 3 --val-data text --save m >out 2>err
holds "overflow at the end: exit status" [ $? = 1 ]
holds "overflow at the end: a good checkpoint is not replaced" cmp m was
run $wild --steps 3 --val-data text >out 2>err
holds "overflow, nothing to save: exit status" [ $? = 1 ]
run $wild --steps 50 >out 2>err
holds "overflow, neither validated nor saved: exit status" [ $? = 1 ]
holds "overflow, neither validated nor saved: line" says err 'stopped, and not saved (a lower '
length=$(od -An -tu4 -N4 m | tr -d ' ') data=$(wc -c <m)
numbers=$(((data - 8 - length) / 4))  # to become the largest that there are
{ head -c $((8 + length)) m
awk -v n=$numbers 'BEGIN { while (n--) printf "\377\377\177\177" }'; } >huge
run --eval --load huge --val-data text >out 2>err
holds "weights that overflow, --eval: exit status" [ $? = 1 ]
holds "weights that overflow, --eval: line" says err '^train_gpt2_mla: huge: its loss is no number$'
run --generate 3 --load huge >out 2>err
holds "weights that overflow, --generate: exit status" [ $? = 1 ]
holds "weights that overflow, --generate: line" \
    says err "^train_gpt2_mla: the model's logits are no finite numbers"
${CC:-cc} -Ofast -fsyntax-only -w "$source" 2>err
holds "-Ofast is refused" says err 'use -O3'

# --- What a run prints

run $tiny --steps 4000 >out
holds "in a file, some 100 lines" \
    [ "$(grep -c '^step' out)" -ge 80 -a "$(grep -c '^step' out)" -le 120 ]
holds "without --save: said" says out '^the model is gone: nothing is kept without --save FILE$'
run $tiny --steps 20 --print-every 7 >out
holds "--print-every" [ "$(sed -n 's/^step \([0-9]*\).*/\1/p' out | tr '\n' ' ')" = "1 7 14 20 " ]
for columns in 40 60 80 100; do
    command="stty cols $columns; $RUN $program $tiny --steps 300 --learning-rate 1e-4"
    script -qec "$command" /dev/null </dev/null >typed 2>&1 && says typed 'step 300/300' ||
        { echo "runs: not run: a terminal of $columns columns (no script command)"; break; }
    tr '\r' '\n' <typed | sed 's/\x1b\[K//g' |
        awk -v n=$columns '/^step/ { bad += length($0) >= n } END { exit bad > 0 }'
    holds "a terminal of $columns columns: lines fit" [ $? = 0 ]
    holds "a terminal of $columns columns: one line" \
        [ "$(grep -c 'step 299/300' typed)" -le 1 -a "$(grep -c '^.*step' typed)" -le 3 ]
done
run $tiny --steps 60 --val-data text --val-every 10 --save-best b --learning-rate 0.02 >out
best=$(sed -n 's/^val .* loss \([0-9.]*\) .*/\1/p' out | sort -n | head -n 1)
at=$(grep "loss $best " out | head -n 1 | tr -dc '0-9/ ' | tr / ' ' | awk '{ print $1 }')
holds "lowest validation loss: said" \
    says out "^lowest validation loss $(printf %.4f "$best") (of .*), after step $at: saved b$"
holds "--save-best: its loss" [ "$(opens b | sed -n 's/^loss \([0-9.]*\) .*/\1/p')" = "$best" ]
# The last validation takes all of this, which is easy but for the part that those before it take.
{ head -c 150 /dev/zero | tr '\0' z; for i in 1 2 3 4 5 6 7; do cat text text text text; done; } \
    >other
parts="$tiny --schedule constant --learning-rate 0.02"
parts="$parts --val-data other --val-batches 2 --val-every 10"
run $parts --steps 110 | sed -n 's/^val .* loss \([0-9.]*\) .*/\1/p' | head -n 10 | sort -n >losses
run $parts --steps 100 --save-best b --save m >out
in_best() { grep -ao '"val_loss":"[0-9.]*' "$1" | tr -dc '0-9.\n' | awk '{ printf "%.8f", $1 }'; }
holds "--save-best compares like with like" awk -v a="$(in_best b)" -v b="$(head -n 1 losses)" \
    'BEGIN { exit !((a - b) ^ 2 < 1e-12) }'

# A resumed run knows its lowest loss; a best that is not its own is put aside.
validated() {  # as begin, to the end of a validation; then stops the run
    begin $endless --val-every 5 "$@"
    until grep -qs '^val' out; do :; done; kill $started; wait $started
}
rm -f m* b*; begin $endless --val-data text --val-every 5 --save m --save-best b
until [ -e b ]; do :; done; kill $started; wait $started
sed -i 's/"best_val_loss":"[0-9]/"best_val_loss":"0/' m; cp b before  # better than any to come
validated --val-data text --save m --save-best b --resume
holds "--save-best goes on from the best there is" cmp b before
holds "--save-best that is the run's own is not put aside" [ ! -e b.old ]
validated --val-data other --save m --save-best b --resume
holds "a best on other data is put aside" cmp b.old before
rm -f m* b*; validated --val-data text --save m --save-best b; cp b early
begin $endless --val-data text --val-every 5 --save m --save-best b --resume
until [ "$(step_in b)" != "$(step_in early)" ]; do sleep 0.02; done; kill $started; wait $started
cp early b; validated --val-data text --save m --save-best b --resume
holds "a best from before the lowest loss is put aside" \
    says out "^b: holds step $(step_in early); the first save keeps it as b.old$"
rm -f m* b*; run $tiny --steps 9 --val-data text --save-best b --seed 2 >out; cp b before
validated --val-data text --save m
validated --val-data text --save m --save-best b --resume
holds "another run's best is put aside" cmp b.old before
sed -i 's/"best_val_loss":"[0-9]/"best_val_loss":"0/' m
validated --val-data other --save m --resume
holds "a lowest loss on other data is not kept" says out '^lowest validation loss [1-9]'
rm -f b*; begin $endless --val-data text --val-every 1000000 --save-best b
kill $started; wait $started
holds "--save-best alone, stopped too soon: said" says out '^the model is gone'

# --- Generation

run $tiny --steps 3000 --learning-rate 0.02 --save m >out
generate() { run --load m --generate 8 --temperature 0 "$@" 2>err; }
generate --prompt 'To' >out
holds "only the text is on standard output" [ "$(cat out)" = "To be, or" ]
holds "the report is on standard error" says err '^prompt 2 tokens x 1'
printf 'To' >prompt
holds "--prompt-file" [ "$(generate --prompt-file prompt)" = "To be, or" ]
holds "--prompt-file -" [ "$(generate --prompt-file - <prompt)" = "To be, or" ]
holds "--stop" [ "$(generate --prompt To --stop 'e, or' --stop ', o')" = "To be, o" ]
holds "--stop, each sequence by itself" \
    [ "$(generate --prompt To --batch-size 2 --stop 'e,' | tr '\n' '|')" = "To be,|To be,|" ]
nucleus() { run --load m --generate 8 --temperature 5 --top-p 0.000001 --prompt To 2>err; }
holds "--top-p" [ "$(nucleus)" = "To be, or" ]
holds "--name=value" \
    [ "$(run --load=m --generate=8 --temperature=0 --prompt=To 2>err)" = "To be, or" ]

run --attention mla --kv-heads 1 --nope-dim 12 --layers 1 --heads 2 --channels 8 --steps 0 \
    --vocab-size 256 --save all >out
run --load all --generate 0 --prompt To >out 2>err
holds "whatever the model, only the text is on standard output" [ "$(cat out)" = To ]
echo "$passed passed, $failed failed"
[ $failed = 0 ]
