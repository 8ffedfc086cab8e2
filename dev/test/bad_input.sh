#!/bin/sh
# Every bad input that a person can give, and the line that answers it. A row is an exit status, the
# line, and the options that lead to it; the files it needs are made just above. Part of `make
# test`, or alone:
#     sh dev/test/bad_input.sh      with ./train_gpt2_mla, started by $RUN if that is set
# The last line is `N passed, M failed`.
export LC_ALL=C
# Built with a sanitizer, the program shall see its allocations refused, and may give up without
# freeing anything.
export ASAN_OPTIONS=allocator_may_return_null=1:detect_leaks=0
program=$PWD/train_gpt2_mla
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
passed=0 failed=0

# A row. $under: a command to start the program with, for some; $begun: the run had begun and may
# have printed, else nothing stands on standard output before a line that refuses something.
row() {
    status=$1 line=$2; shift 2
    $under $RUN "$program" "$@" </dev/null >out 2>err
    found=$? said=$(grep -v '^==.*AddressSanitizer failed to allocate' err)  # as it says besides
    case $line in *'N MB'* | *'N bytes'*)  # numbers that depend on what tensors there are
        said=$(echo "$said" |
            sed -E 's/[0-9.]+ (MB|bytes)/N \1/g; s/(expected|of) [0-9]+(:|$)/\1 N\2/');;
    esac
    if [ $found = "$status" ] && [ "$said" = "train_gpt2_mla: $line" ] &&
        [ -n "$begun" -o ! -s out ]; then passed=$((passed + 1)); return; fi
    failed=$((failed + 1))
    printf 'FAILED bad input: %s\n  expected %s: train_gpt2_mla: %s\n  found    %s: %s\n' \
        "$*" "$status" "$line" $found "$said"
}

holds() {  # what, then a command that must succeed
    what=$1; shift
    if "$@" >said 2>&1; then passed=$((passed + 1)); return; fi
    failed=$((failed + 1))
    echo "FAILED bad input: $what: $*"
}

int32() {  # numbers, as four bytes each
    for n in "$@"; do
        n=$((n & 4294967295))
        printf "\\$(printf %o $((n & 255)))\\$(printf %o $((n >> 8 & 255)))"
        printf "\\$(printf %o $((n >> 16 & 255)))\\$(printf %o $((n >> 24)))"
    done
}

zeros() { head -c "$1" /dev/zero; }

header() { int32 "$@"; zeros $((1024 - 4 * $#)); }  # of a token or tokenizer file

# A checkpoint like $1 with its header changed by the sed command $2 and, from byte $3 of the data
# on, $4 put in.
checkpoint() {
    length=$(od -An -tu4 -N4 "$1" | tr -d ' ')
    head -c $((8 + length)) "$1" | tail -c +9 | sed "$2" >json
    tail -c +$((9 + length)) "$1" >data
    int32 "$(wc -c <json)" 0
    cat json
    if [ $# -gt 2 ]; then
        head -c "$3" data; printf "$4"; tail -c +$(($3 + 1 + $(printf "$4" | wc -c))) data
    else cat data; fi
}

printf 'To be, or not to be, that is the question.\n' >text
tiny='--attention mha --layers 1 --heads 2 --channels 8 --seq-len 8'
$RUN "$program" $tiny --steps 0 --vocab-size 256 --save model >out || exit 1
$RUN "$program" $tiny --train-data text --batch-size 2 --steps 2 --sample-every 0 --save run \
    --log log.csv >out || exit 1

# The command line

row 2 '--layer: no such option; --help lists them' --layer 3
row 2 'train: no such option; --help lists them' train
row 2 '--layers: its value is missing' --layers
row 2 '--layers: its value is missing' --layers --heads 2
row 2 '--save: its value is missing' --save --steps 5
row 2 '--layers: given twice' --layers 3 --layers 3
row 2 "--layers: 'x', expected a whole number from 1 to 1000" --layers x
row 2 "--layers: '', expected a whole number from 1 to 1000" --layers ''
row 2 "--layers: '3.5', expected a whole number from 1 to 1000" --layers 3.5
row 2 "--layers: '-1', expected a whole number from 1 to 1000" --layers -1
row 2 "--layers: '0', expected a whole number from 1 to 1000" --layers 0
row 2 "--layers: '99999999999999999999', expected a whole number from 1 to 1000" \
    --layers 99999999999999999999
row 2 "--seed: '-1', expected a whole number from 0 to 9e+15" --seed -1
row 2 "--learning-rate: 'nan', expected a number from 0 to 1000" --learning-rate nan
row 2 "--learning-rate: 'inf', expected a number from 0 to 1000" --learning-rate inf
row 2 "--learning-rate: '1e-3x', expected a number from 0 to 1000" --learning-rate 1e-3x
row 2 "--grad-clip: '-1', expected a number from 0 to 1000000000" --grad-clip -1
row 2 "--dropout: '1', expected a number from 0 to 0.99" --dropout 1
row 2 "--attention: 'mlaa', expected one of mha, gqa, mqa, mla" --attention mlaa
row 2 "--cache: 'half', expected one of full, latent, absorbed" --cache half
row 2 '--load: empty, expected a file name' --load ''
row 2 '--min-lr 1: expected at most the learning rate, 0.1' \
    --min-lr 1 --learning-rate 0.1 --train-data text
row 2 '--eval: expected --load FILE too' --eval
row 2 '--eval: expected --val-data FILE too' --eval --load model --train-data text
row 2 '--generate: expected --load FILE too' --generate 5
row 2 '--eval and --generate: expected one of them' --eval --generate 5 --load model
no_data='no data: run this in the repository, run `make shakespeare` first, or name a text with'
row 1 "$no_data --train-data (--eval: --val-data) FILE" --eval --load model
row 2 '--prompt: expected --generate N too' --prompt hello
row 2 '--layer=3: no such option; --help lists them' --layer=3
row 2 "--layers: '', expected a whole number from 1 to 1000" --layers=
row 2 "--resume: '1', expected no value" --resume=1
row 2 '--layers: given twice' --layers=3 --layers 3

# What a mode would ignore

for option in save log learning-rate steps save-best print-every val-every resume; do
    value=1; [ $option = resume ] && value=
    row 2 "--$option: not with --generate" --load model --generate 2 --$option $value
    row 2 "--$option: not with --eval" --load model --eval --val-data text --$option $value
done
row 2 '--val-data: not with --generate' --load model --generate 2 --val-data text
row 2 '--temperature: not with --eval' --load model --eval --val-data text --temperature 1
row 2 '--seed: not with --eval' --load model --eval --val-data text --seed 1
row 2 '--cache: expected --generate N too' $tiny --train-data text --cache full
row 2 '--stop: expected --generate N too' $tiny --train-data text --stop x
row 2 '--save-best: expected --val-data FILE too' $tiny --train-data text --save-best best
row 2 '--val-data: expected --train-data FILE too' --val-data text
row 2 '--save-every: expected --save FILE too' --save-every 5
row 2 '--resume: expected --save FILE, the run to go on with, and no --load' --resume
row 2 '--resume: expected --save FILE, the run to go on with, and no --load' \
    --resume --save run --load run

row 2 '--steps 0: expected no --log' $tiny --train-data text --steps 0 --log z
row 2 '--steps 0: expected no --save-best' \
    $tiny --train-data text --val-data text --steps 0 --save-best z
row 2 '--load m.tmp: --save m writes it' --load m.tmp --save m --train-data text
row 2 '--load ./m.tmp2: --save m writes it' --load ./m.tmp2 --save m --train-data text
row 1 'a?b: cannot open: No such file or directory' --load 'a
b' --train-data text

# The model's shape

row 2 'options: heads 3 does not divide channels 128' --heads 3 --train-data text
row 2 'options: kv-heads 3 does not divide heads 4' \
    --attention gqa --heads 4 --kv-heads 3 --train-data text
row 2 'options: kv-heads 2: mha has 4 (gqa and mla let you choose)' \
    --attention mha --kv-heads 2 --train-data text
row 2 'options: kv-heads 2: mqa has 1 (gqa and mla let you choose)' \
    --attention mqa --kv-heads 2 --train-data text
row 2 'options: position rope does not go with attention mla (expected learned or decoupled)' \
    --attention mla --position rope --train-data text
row 2 'options: position decoupled does not go with attention gqa (expected learned or rope)' \
    --attention gqa --position decoupled --train-data text
row 2 'options: rope-dim 5: expected an even number of at least 2' --rope-dim 5 --train-data text
row 2 'options: rope-dim 32: expected less than the head size, 32' --rope-dim 32 --train-data text
row 2 'options: head size 3: position rope turns pairs, expected an even one' \
    --attention mha --position rope --channels 6 --heads 2 --train-data text
row 2 'options: kv-heads 3 does not divide heads 4' --attention mla --kv-heads 3 --train-data text
row 2 'options: nope-dim 8: goes with mla decoupled only' \
    --attention mha --position decoupled --nope-dim 8 --train-data text
row 2 'options: nope-dim 8: goes with mla decoupled only' \
    --position learned --nope-dim 8 --train-data text
row 2 'options: rope-dim 5: expected an even number of at least 2' \
    --nope-dim 8 --rope-dim 5 --train-data text
row 2 'options: queries of 1024 heads x 65552 numbers, expected at most 16777216 together' \
    --heads 1024 --channels 4096 --nope-dim 65536 --rope-dim 16 --train-data text
row 2 'options: rope-dim 4: position learned needs 0' \
    --position learned --rope-dim 4 --train-data text
row 2 "--kv-rank: '0', expected a whole number from 1 to 65536" --kv-rank 0
row 2 'options: kv-rank 129: expected 1 to channels, 128' --kv-rank 129 --train-data text
row 2 'options: q-rank 129: expected 0 (no query latent) to channels, 128' \
    --q-rank 129 --train-data text
row 2 'options: attention mha has no latent: q-rank and kv-rank go with mla' \
    --attention mha --kv-rank 8 --train-data text
row 2 '--latent-norm: attention mha has no latent' \
    --attention mha --latent-norm rmsnorm --train-data text
row 1 'parameters: N MB of memory needed, and not to be had' \
    --channels 65536 --heads 1 --layers 1000 --train-data text --seq-len 8

# Token files and texts

row 1 'missing: cannot open: No such file or directory' $tiny --train-data missing
row 1 '.: found a folder, expected a regular file' $tiny --train-data .
mkfifo pipe
row 1 'pipe: found a pipe or device, expected a regular file' $tiny --train-data pipe
: >empty
row 1 'empty: 0 tokens, expected at least 2' $tiny --train-data empty
printf x >one
row 1 'one: 1 tokens, expected at least 2' $tiny --train-data one
printf 'a\000b' >binary
first='first number 6422625, expected 20240520'
row 1 "binary: neither tokens ($first) nor text (a zero byte at offset 1)" $tiny --train-data binary
int32 20240520 1 >short
row 1 'short: 8 bytes, expected a header of 1024: cut short' $tiny --train-data short
header 20240520 2 4 >version
row 1 'version: token file version 2, expected 1' $tiny --train-data version
header 20240520 1 -4 >negative
row 1 'negative: 0 bytes follow the header, expected -8 for its count of -4 tokens' \
    $tiny --train-data negative
{ header 20240520 1 4; zeros 7; } >truncated
row 1 'truncated: 7 bytes follow the header, expected 8 for its count of 4 tokens' \
    $tiny --train-data truncated
{ header 20240520 1 4; zeros 9; } >overlong
row 1 'overlong: 9 bytes follow the header, expected 8 for its count of 4 tokens' \
    $tiny --train-data overlong
{ header 20240520 1 60; zeros 118; printf '\007\001'; } >tokens
hint='made with another tokenizer?'
row 1 "tokens: token 263, expected less than the model's vocabulary, 256: $hint" \
    $tiny --vocab-size 256 --train-data tokens
row 1 'text: 43 tokens, expected at least 65 for a batch' \
    --attention mha --train-data text --seq-len 64
row 1 'text: 43 tokens, expected at least 65 for a batch' \
    $tiny --train-data text --order sequential --batch-size 8
row 1 'missing: cannot open: No such file or directory' $tiny --train-data text --val-data missing

# Tokenizers

row 1 'missing: cannot open: No such file or directory' $tiny --train-data text --tokenizer missing
row 1 "empty: 0 bytes, a tokenizer's header alone has 1024" \
    $tiny --train-data text --tokenizer empty
row 1 "text: 43 bytes, a tokenizer's header alone has 1024" $tiny --train-data text --tokenizer text
int32 20240328 2 >tok.short
row 1 "tok.short: 8 bytes, a tokenizer's header alone has 1024" \
    $tiny --train-data text --tokenizer tok.short
header 20240328 3 2 0 >tok.version
row 1 'tok.version: tokenizer version 3, expected 1 or 2' \
    $tiny --train-data text --tokenizer tok.version
header 20240328 2 0 0 >tok.none
row 1 'tok.none: vocabulary of 0, expected 1 to 65536' $tiny --train-data text --tokenizer tok.none
header 20240328 2 70000 0 >tok.many
row 1 'tok.many: vocabulary of 70000, expected 1 to 65536' \
    $tiny --train-data text --tokenizer tok.many
header 20240328 2 2 2 >tok.eot
row 1 'tok.eot: end-of-text token 2, expected less than 2' \
    $tiny --train-data text --tokenizer tok.eot
{ header 20240328 2 2 0; printf '\001a\005b'; } >tok.cut
row 1 'tok.cut: ends within token 1, expected 2 tokens: cut short' \
    $tiny --train-data text --tokenizer tok.cut
{ header 20240328 2 2 0; printf '\001a\001bc'; } >tok.long
row 1 'tok.long: 1 bytes after its last token' $tiny --train-data text --tokenizer tok.long
{ header 20240328 2 2 0; printf '\001a\001b'; } >tok
row 1 "text: token 117, expected less than the model's vocabulary, 2: $hint" \
    $tiny --train-data text --tokenizer tok
begun=1
row 2 'prompt: byte 99 at place 2 is not in the vocabulary' \
    --load model --generate 2 --tokenizer tok --prompt abc
begun=
$RUN "$program" $tiny --steps 0 --vocab-size 2 --save two >out
for V in 128 300; do $RUN "$program" $tiny --steps 0 --vocab-size $V --save m$V >out; done
row 2 "--generate: expected --tokenizer FILE, the model's vocabulary is 300" \
    --load m300 --generate 2
row 1 "text: token 117, expected less than the model's vocabulary, 2: $hint" \
    --load two --eval --val-data text --tokenizer tok
cp tok x_tokenizer.bin; cp text x_train.bin
row 1 "x_tokenizer.bin: vocabulary 2, the model's is 256: expected data of the model's tokenizer" \
    --load model --train-data x_train.bin
holds "a vocabulary padded on purpose" $RUN "$program" $tiny --train-data x_train.bin \
    --vocab-size 256 --steps 1
{ header 20240328 2 300 0; for i in $(seq 300); do printf '\001a'; done; } >tok.300
row 1 "tok.300: vocabulary 300, the model's is 256: made with another --tokenizer?" \
    --load model --generate 2 --tokenizer tok.300
row 1 'text: a text, read as bytes, but tok.300 has 300 tokens: expected a token file' \
    $tiny --train-data text --tokenizer tok.300
mkdir data; cp text data/tinyshakespeare_train.bin; cp tok data/tinyshakespeare_tokenizer.bin
holds "a model of bytes needs no other data's tokenizer" $RUN "$program" --load model --generate 2
holds "nor does one of 128" $RUN "$program" --load m128 --generate 2
rm -r data

# Texts with other vocabularies than 256: their tokens are bytes all the same

for V in 118 128 300; do
    $RUN "$program" $tiny --train-data text --vocab-size $V --steps 9 --sample-every 9 \
        --save m$V >out
    holds "vocabulary $V: a sample" [ "$(sed '1,/^sample/d; /^9 steps/,$d' out | tr -d '\n')" ]
    $RUN "$program" --eval --load m$V --val-data text >out
    holds "vocabulary $V: bits per byte" grep -q 'bits_per_byte [0-9]' out
done
holds "a model of 128 bytes generates" $RUN "$program" --load m128 --generate 5 --prompt To
holds "one of 2, from the last of them" $RUN "$program" --load two --generate 5
begun=1
row 2 'prompt: byte 195 at place 2 is not in the vocabulary' \
    --load m128 --generate 5 --prompt 'a é'
begun=

# Samples start as a line does, whatever token ends a text

{ header 20240328 2 6 5; printf '\001a\001b\001c\001d\001\n\003end'; } >line_tokenizer.bin
abcd='\0\0\1\0\2\0\3\0\4\0'
{ header 20240520 1 500; for i in $(seq 100); do printf "$abcd"; done; } >line_train.bin
$RUN "$program" $tiny --train-data line_train.bin --steps 150 --sample-every 150 --temperature 0 \
    --save line >out
holds "a sample starts as a line does" [ "$(sed '1,/^sample 150/d' out | sed 1q)" = abcd ]
$RUN "$program" --load line --tokenizer line_tokenizer.bin --generate 8 --temperature 0 >out 2>err
holds "a text starts as a line does" [ "$(sed 1q out)" = abcd ]
{ header 20240520 1 500; for i in $(seq 100); do printf '\0\0\1\0\2\0\3\0\5\0'; done; } \
    >end_train.bin
$RUN "$program" $tiny --train-data end_train.bin --vocab-size 6 --steps 150 --sample-every 0 \
    --save end >out
$RUN "$program" --load end --tokenizer line_tokenizer.bin --generate 7 --temperature 0 \
    --prompt a >out 2>err
holds "end-of-text ends a text, and is not printed" [ "$(cat out)" = abcd ]

# Whose tokens they are

cp line line.safetensors
$RUN "$program" --load line.safetensors --generate 8 --temperature 0 >out 2>err
holds "the tokenizer beside a model is taken" [ "$(sed 1q out)" = abcd ]
{ header 20240328 2 6 5; printf '\001b\001a\001c\001d\001\n\003end'; } >swapped_tokenizer.bin
row 1 'line_train.bin: its tokens are those of line_tokenizer.bin, not of swapped_tokenizer.bin' \
    --load line --train-data line_train.bin --tokenizer swapped_tokenizer.bin
cp line swapped.safetensors
row 1 'line_train.bin: its tokens are those of line_tokenizer.bin, not of swapped_tokenizer.bin' \
    --load swapped.safetensors --eval --val-data line_train.bin
{ header 20240328 2 7 5; tail -c +1025 line_tokenizer.bin; printf '\001e'; } >longer
row 1 'line_train.bin: its tokens are those of line_tokenizer.bin, not of longer' \
    $tiny --train-data line_train.bin --tokenizer longer
cp line_tokenizer.bin same
holds "the same tokenizer elsewhere" $RUN "$program" --load line --eval --val-data line_train.bin \
    --tokenizer same
for V in 64 128; do
    $RUN "$program" $tiny --steps 0 --vocab-size $V --save padded >out
    holds "a vocabulary padded to $V" $RUN "$program" --load padded --eval --val-data line_train.bin
done

# Checkpoints

row 1 'missing: cannot open: No such file or directory' --load missing --train-data text
row 1 '.: found a folder, expected a regular file' --load . --train-data text
row 1 'empty: 0 bytes, expected a safetensors checkpoint' --load empty --train-data text
cut='not a safetensors file, or cut short: its header claims'
row 1 "text: $cut 8007448951414353748 bytes, of a file of 43" --load text --train-data text
head -c 100 model >cut.header
row 1 "cut.header: $cut N bytes, of a file of N" --load cut.header --train-data text
head -c 3000 model >cut.data
row 1 'cut.data: N bytes of data, expected N: cut short or over-long' \
    --load cut.data --train-data text
{ cat model; zeros 4; } >long
row 1 'long: N bytes of data, expected N: cut short or over-long' --load long --train-data text
{ int32 6 0; printf '[1, 2]'; } >no.object
broken='its header is not that of a safetensors file at byte'
row 1 "no.object: $broken 8: expected '{'" --load no.object --train-data text
{ int32 19 0; printf '{"__metadata__":{}}  '; } >no.tensors
row 1 'no.tensors: has no tensors' --load no.tensors --train-data text
{ int32 2 0; printf '{}'; } >no.metadata
row 1 "no.metadata: $broken 9: expected '\"'" --load no.metadata --train-data text
checkpoint model 's/train_gpt2_mla/other/' >format
row 1 "format: its metadata's format is other, expected train_gpt2_mla" \
    --load format --train-data text
checkpoint model 's/"n_head":"2",//' >no.heads
row 1 'no.heads: its metadata has no n_head' --load no.heads --train-data text
checkpoint model 's/"n_head":"2"/"n_head":"two"/' >heads.word
row 1 "heads.word: n_head is 'two', expected a whole number from 0 to 16777216" \
    --load heads.word --train-data text
checkpoint model 's/"n_head":"2"/"n_head":"3"/' >heads.3
row 1 'heads.3: heads 3 does not divide channels 8' --load heads.3 --train-data text
checkpoint model 's/"n_layer":"1"/"n_layer":"0"/' >layers.0
row 1 'layers.0: layers, heads, channels, block_size and vocab_size must be at least 1' \
    --load layers.0 --train-data text
checkpoint model 's/"n_layer":"1"/"n_layer":"1000000"/' >layers.many
row 1 'layers.many: 1000000 layers, 8 channels and a vocabulary of 256, more than its data holds' \
    --load layers.many --train-data text
checkpoint model 's/"n_embd":"8"/"n_embd":"32"/;s/"vocab_size":"256"/"vocab_size":"2"/
    s/"rope_dim":"4"/"rope_dim":"16"/' >wide
row 1 'wide: 1 layers, 32 channels and a vocabulary of 2, more than its data holds' \
    --load wide --train-data text
$RUN "$program" --layers 1 --heads 2 --channels 8 --seq-len 8 --vocab-size 9 --nope-dim 6 \
    --steps 0 --save nope >out || exit 1
checkpoint nope 's/"nope_dim":"6"/"nope_dim":"0"/' >nope.0
row 1 'nope.0: nope-dim 0: expected at least 1' --load nope.0 --train-data text
checkpoint nope 's/"nope_dim":"6"/"nope_dim":"65000"/' >nope.wide
row 1 'nope.wide: 1 layers, 8 channels and a vocabulary of 9, more than its data holds' \
    --load nope.wide --train-data text
checkpoint nope 's/"nope_dim":"6"/"nope_dim":"5"/' >nope.5
row 1 'nope.5: h.0.attn.q_b_proj.weight has 2 dimensions, 16 by 4; expected (14, 4)' \
    --load nope.5 --train-data text
checkpoint model 's/"n_head"/"nope_dim":"4","n_head"/' >nope.rope
row 1 'nope.rope: nope-dim 4: goes with mla decoupled only' --load nope.rope --train-data text
head -c 70000 /dev/zero | tr '\0' a >long
row 1 'a batch of 65536 x 65536 tokens: expected at most 67108863 tokens for this model' \
    --attention mha --layers 1 --heads 2 --channels 8 --seq-len 65536 --batch-size 65536 \
    --train-data long
row 2 '--nope-dim 2: nope has 6' --load nope --nope-dim 2 --train-data text
checkpoint model 's/"attention":"mha"/"attention":"flash"/' >kind
row 1 'kind: attention is flash, which this program does not know' --load kind --train-data text
checkpoint model 's/"dtype":"F32"/"dtype":"BF16"/' >bf16
row 1 'bf16: wte.weight has dtype BF16, expected F32' --load bf16 --train-data text
checkpoint model 's/"dtype":"F32",//' >no.dtype
row 1 "no.dtype: $broken 297: expected dtype, shape and data_offsets in each tensor" \
    --load no.dtype --train-data text
checkpoint model 's/h.0.ln_1.weight/h.0.ln_9.weight/' >missing.tensor
row 1 'missing.tensor: has no tensor h.0.ln_1.weight, which its configuration needs' \
    --load missing.tensor --train-data text
checkpoint model 's/h.0.ln_1.bias/h.0.ln_1.weight/' >twice
row 1 'twice: two tensors named h.0.ln_1.weight' --load twice --train-data text
checkpoint model 's/\[24,8\]/[8,24]/' >misshapen
row 1 'misshapen: h.0.attn.c_attn.weight has 2 dimensions, 8 by 24; expected (24, 8)' \
    --load misshapen --train-data text
checkpoint model 's/\[24,8\]/[24,9]/' >size
row 1 'size: h.0.attn.c_attn.weight has offsets 8256 to 9024, expected 864 bytes for its shape' \
    --load size --train-data text
checkpoint model 's/\[24,8\]/[4294967296,4294967296]/' >overflow
row 1 'overflow: h.0.attn.c_attn.weight has a shape larger than any file' \
    --load overflow --train-data text
checkpoint model 's/\[24,8\]/[-24,8]/' >minus
row 1 "minus: $broken 505: expected a whole number" --load minus --train-data text
checkpoint model 's/\[0,8192\]/[32,8224]/' >gap
apart='tensors overlap or leave gaps'
row 1 "gap: wte.weight starts at byte 32 of the data, expected 0: $apart" \
    --load gap --train-data text
checkpoint model 's/"data_offsets":\[8192,8224\]/"data_offsets":[8160,8192]/' >overlap
row 1 "overlap: h.0.ln_1.weight starts at byte 8160 of the data, expected 8192: $apart" \
    --load overlap --train-data text
checkpoint model 's/"data_offsets":\[0,8192\]/"data_offsets":[8192,0]/' >backwards
row 1 'backwards: wte.weight has offsets 8192 to 0, expected 8192 bytes for its shape' \
    --load backwards --train-data text
checkpoint model 's/"n_layer":"1"/"n_layer":"1/' >quote
row 1 "quote: $broken 101: expected '}'" --load quote --train-data text
checkpoint model 's/wte.weight/w\\xte.weight/' >escape
row 1 "escape: $broken 246: expected one of \"\\/bfnrtu after a backslash" \
    --load escape --train-data text
checkpoint model '' 40 '\000\000\300\177' >nan
row 1 'nan: wte.weight holds nan at place 10, expected finite numbers' --load nan --train-data text
checkpoint model '' 40 '\000\000\200\377' >infinite
row 1 'infinite: wte.weight holds -inf at place 10, expected finite numbers' \
    --load infinite --train-data text
checkpoint model 's/"wte.weight"/"extra":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},&/' \
    >unknown
row 1 'unknown: tensor extra has no place in a model of its configuration' \
    --load unknown --train-data text
row 2 '--layers 2: model has 1' --load model --train-data text --layers 2
row 2 '--attention mla: model has mha' --load model --train-data text --attention mla
row 2 "--seq-len 9: the model's block size is 8" --load model --train-data text --seq-len 9
row 1 "tokens: token 263, expected less than the model's vocabulary, 256: $hint" \
    --load model --train-data tokens

# Resuming

row 1 'missing: cannot open: No such file or directory' --resume --save missing --train-data text
row 1 "model: a model without a run's state, nothing to resume (--load starts from it)" \
    --resume --save model --train-data text
other() {  # what the run had, what this one has, the options that this one is resumed with
    had="its run had $1; this one has $2"; shift 2
    row 2 "run: $had (--load starts another run from it)" $tiny --resume --save run "$@"
}
same='--train-data text --batch-size 2 --steps 2'
other 'batch 2 x 1 x 8' 'batch 3 x 1 x 8' --train-data text --batch-size 3 --steps 2
other 'steps 2' 'steps 9' --train-data text --batch-size 2 --steps 9
other 'dropout 0' 'dropout 0.5' $same --dropout 0.5
other 'lr 0.004 to 0.0004' 'lr 0.004000001 to 0.0004000001' $same --learning-rate 0.004000001
other 'decay 0.1' 'decay 0.10000001' $same --weight-decay 0.10000001
other 'betas 0.9 0.99' 'betas 0.90000001 0.99' $same --beta1 0.90000001
other 'betas 0.9 0.99' 'betas 0.9 0.99000001' $same --beta2 0.99000001
other 'eps 1e-08' 'eps 1.0000001e-08' $same --eps 1.0000001e-8
other 'clip 1' 'clip 1.0000001' $same --grad-clip 1.0000001
other 'dropout 0' 'dropout 0.50000001' $same --dropout 0.50000001
$RUN "$program" $tiny --resume --save run $same --sample-every 0 >out
holds "a finished run: says so" grep -qx 'run: all its 2 steps are done already' out
cat text text >text2
other 'training data 43 tokens (hash 2e92b355)' 'training data 86 tokens (hash 77093f25)' \
    --train-data text2 --batch-size 2 --steps 2
checkpoint run 's/"step":"2"/"step":"3"/' >step.3
row 1 "step.3: step '3', expected a number from 0 to 2" $tiny --resume --save step.3 $same
checkpoint run 's/"adam.v.wte.weight"/"adam.x.wte.weight"/' >no.moments
row 1 'no.moments: has no tensor adam.v.wte.weight, which its configuration needs' \
    $tiny --resume --save no.moments $same

# Generating

row 2 '--cache absorbed: attention mha has no latent, expected --cache full' \
    --load model --generate 2 --cache absorbed
row 2 "--prompt: 9 tokens, expected at most the model's block size, 8" \
    --load model --generate 2 --prompt 'nine char'
printf 'nine char' >nine
row 2 "--prompt-file: 9 tokens, expected at most the model's block size, 8" \
    --load model --generate 2 --prompt-file nine
head -c 9000 /dev/zero | tr '\0' a >long
row 2 "--prompt-file: 9000 tokens, expected at most the model's block size, 8" \
    --load model --generate 2 --prompt-file long
row 1 '--prompt-file missing: cannot open: No such file or directory' \
    --load model --generate 2 --prompt-file missing
row 1 '--prompt-file .: cannot read: Is a directory' --load model --generate 2 --prompt-file .
row 2 '--prompt and --prompt-file: expected one of them' \
    --load model --generate 2 --prompt-file nine --prompt n
row 2 '--stop: empty, expected a text' --load model --generate 2 --stop ''
row 2 '--stop: expected at most 8' \
    --load model --generate 2 --stop 1 --stop 2 --stop 3 --stop 4 --stop 5 --stop 6 --stop 7 \
    --stop 8 --stop 9
row 2 "--top-p: '0', expected a number from 1e-06 to 1" --load model --generate 2 --top-p 0
row 2 "--repetition-penalty: '0', expected a number from 0.001 to 1000" \
    --load model --generate 2 --repetition-penalty 0

# Writing

trained="$tiny --train-data text --steps 1 --sample-every 0"
row 1 '.: exists and is no regular file; will not replace it' $trained --save .
row 1 'pipe: exists and is no regular file; will not replace it' $trained --save pipe
device=/dev/null  # who may write to /dev has a device made for it: a wrong program would replace it
mknod null c 1 3 2>/dev/null && device=null
row 1 "$device: exists and is no regular file; will not replace it" $trained --save $device
row 1 'nowhere/model: cannot write: No such file or directory' $trained --save nowhere/model
row 1 'text: exists and is no checkpoint of this program; will not replace it' $trained --save text
row 1 '.: exists and is no regular file; will not replace it' $trained --log .
row 1 'nowhere/log.csv: cannot write: No such file or directory' $trained --log nowhere/log.csv
row 1 'text: exists and is no log of this program; will not replace it' $trained --log text
cp log.csv log.before
echo '# train_gpt2_mla' >text.md
row 1 'text: exists and is no checkpoint of this program; will not replace it' \
    $trained --log log.csv --save text
holds "a log that was there is as it was" cmp log.csv log.before
holds "a log of this program is replaced" $RUN "$program" $trained --log log.csv
row 2 '--save both: the same file as --log' $trained --log both --save both
row 2 '--save ./x: the same file as --log' $trained --log x --save ./x
row 2 '--save-best z: the same file as --save' $trained --save z --save-best z --val-data text
beside=', beside which others are written'
row 2 "--save y: too near to --log y.tmp$beside" $trained --log y.tmp --save y
row 2 "--save-best y: too near to --log y.tmp$beside" \
    $trained --log y.tmp --save-best y --val-data text
row 2 "--save-best m.tmp: too near to --save m$beside" \
    $trained --save m --save-best m.tmp --val-data text
row 2 "--save m: too near to --log m.lock$beside" $trained --log m.lock --save m
row 2 "--save m: too near to --log $PWD/m.lock$beside" $trained --log "$PWD/m.lock" --save m
row 2 "--save m: too near to --log m.old2$beside" $trained --log m.old2 --save m
cp text new.tmp
row 1 'new.tmp: exists and is no checkpoint of this program; will not replace it' \
    $trained --save new
echo note > new.tmp  # too short to tell
row 1 'new.tmp: exists and is no checkpoint of this program; will not replace it' \
    $trained --save new
row 1 'model: exists and is no log of this program; will not replace it' $trained --log model

# A log begins with what was run.

$RUN "$program" $trained --save stopped --log stopped.csv >out
settings=$(grep -ao '"settings":"[^"]*"' stopped | sed 's/.*:"//; s/"$//')
holds "log: begins with what was run" grep -qx "# settings: $settings" stopped.csv
holds "log: begins with the configuration" \
    grep -q '^# configuration: attention mha, position rope, n_layer 1, ' stopped.csv
holds "log: begins with the parameters" grep -Eqx '# parameters: [1-9][0-9]+' stopped.csv
row 1 'text.md: exists and is no log of this program; will not replace it' $trained --log text.md

if [ -c /dev/full ]; then
    $RUN "$program" --load model --generate 3 >/dev/full 2>err
    holds "standard output is full: exit status" [ $? = 1 ]
    holds "standard output is full: line" \
        grep -qx "train_gpt2_mla: standard output: cannot write: .*" err
fi

# What a run prints.

$RUN "$program" --load run --eval --val-data text >out
holds "--eval names its data" grep -Eq '^43 tokens of text, [0-9]+ threads$' out
first_loss() {
    $RUN "$program" $tiny --train-data text --steps 1 --sample-every 0 "$@" |
        sed -n 's/^step 1.*loss \([0-9.]*\) .*/\1/p'
}
holds "--dropout drops" [ "$(first_loss)" != "$(first_loss --dropout 0.9)" ]
holds "without it nothing is dropped" [ "$(first_loss)" = "$(first_loss --dropout 0)" ]

# Too little of something. What this system does not let us try is said, and counts for nothing.

if { (ulimit -v 300000 && OMP_NUM_THREADS=1 $RUN "$program" --help); } >out 2>&1; then
    little_memory() { (ulimit -v 300000; OMP_NUM_THREADS=1; export OMP_NUM_THREADS; "$@"); }
    under=little_memory
    row 1 'parameters: N MB of memory needed, and not to be had' \
        --channels 1024 --layers 8 --train-data text --seq-len 8
    row 1 'activations: N MB of memory needed, and not to be had' \
        --channels 256 --batch-size 200 --seq-len 32 --train-data text
    under=
else
    echo "bad input: not run: little memory (this program does not start under ulimit -v 300000)"
fi

mkdir full
if unshare -rm mount -t tmpfs -o size=40k disk full 2>out; then
    cat >little_disk <<'END'
mount -t tmpfs -o size=$1 disk full; shift
cp model full/model; "$@"; status=$?; cmp model full/model >&2; exit $status
END
    begun=1 under='unshare -rm sh little_disk 40k'
    row 1 'full/model: not written: No space left on device (a file of that name is as it was)' \
        $tiny --train-data text --steps 1 --sample-every 0 --save full/model
    under='unshare -rm sh little_disk 16k'
    row 1 'full/log.csv: cannot write: No space left on device; the run goes on without it' \
        $tiny --train-data text --steps 1 --sample-every 0 --log full/log.csv
    begun= under=
else echo "bad input: not run: full disk (no right to mount one here)"; fi

locked=locked; mkdir locked; chmod 555 locked
[ -w locked ] && locked=/sys  # root may write anywhere but there
row 1 "$locked/model: cannot write: Permission denied" $trained --save $locked/model
row 1 "$locked/log.csv: cannot write: Permission denied" $trained --log $locked/log.csv

echo "$passed passed, $failed failed"
[ $failed = 0 ]
