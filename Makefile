# make             the trainer, ./train_gpt2_mla
# make test        gradients, checkpoints and all else, with a C compiler alone
# make decode-speed tokens per second of every kind of attention and cache, to
#                  dev/speed/decode_speed.md (6 minutes)
# make profile     where a training step's time goes; ./step_profile takes the trainer's options
# make shakespeare tinyshakespeare for the default run (needs Python and a network)
# make finetune    GPT-2 124M as MLA, a quarter of its cache, fine-tuned on Shakespeare, to
#                  data/gpt2/ (a network;
#                  pip install torch numpy safetensors huggingface_hub tiktoken)
# make page        doc/page/index.html, the writeup and the code side by side
#                  (pip install markdown pygments latex2mathml)
# make sanitize    the tests again under address and undefined-behaviour sanitizers
# make fuzz        a million inputs for everything that reads files, prompts and options
#                  (clang; ten minutes)
# make clean
#
# make MPI=1       the trainer for many processes: doc/mpi.md (Debian: openmpi-bin, libopenmpi-dev)
# make CC=clang, make OMP= (without OpenMP), make ARCH= (for any processor of this kind). For
# another one, emulated:
# make test CC=aarch64-linux-gnu-gcc ARCH= LDLIBS="-lm -static" RUN=qemu-aarch64

CC     ?= cc
# Of -ffast-math only what lets square roots and comparisons become vector instructions: NaN and
# infinity keep their meaning, sums keep their order.
CFLAGS ?= -O3 -std=c11 -Wall -Wextra -ffp-contract=fast -fno-math-errno -fno-trapping-math
LDLIBS  = -lm
ifeq ($(MPI),1)
ifeq ($(origin CC),default)
CC = mpicc
endif
ifneq ($(filter test sanitize,$(MAKECMDGOALS)),)
$(error make $(MAKECMDGOALS) is for the program without MPI=1; of it: python3 dev/test/mpi_test.py)
endif
USE_MPI = -DUSE_MPI
endif

# Each of these is used if the compiler takes it.
try = $(shell echo 'int main(void){return 0;}' | \
    $(CC) $(1) -x c - -o /dev/null 2>/dev/null && echo '$(1)')
ARCH ?= $(or $(call try,-march=native),$(call try,-mcpu=native))
# Without OpenMP its `simd` lines still count, which need no library.
NO_OMP = $(or $(call try,-fopenmp-simd -Wno-unknown-pragmas),-Wno-unknown-pragmas)
BREW := $(shell brew --prefix libomp 2>/dev/null)
ifneq ($(BREW),)  # macOS: Apple's clang, and OpenMP from Homebrew
OMP ?= $(call try,-Xclang -fopenmp -I$(BREW)/include -L$(BREW)/lib -lomp)
endif
OMP ?= $(call try,-fopenmp)

# Evaluated once; kept in .flags, so that other flags build anew.
ARCH := $(ARCH)
override OMP := $(or $(OMP),$(NO_OMP))
BUILD := $(CC) $(CFLAGS) $(ARCH) $(USE_MPI)
$(shell echo '$(BUILD) $(OMP)' | cmp -s - .flags || echo '$(BUILD) $(OMP)' > .flags)

all: train_gpt2_mla

train_gpt2_mla: train_gpt2_mla.c .flags
	$(BUILD) $< -o $@ $(OMP) $(LDLIBS)

test_mla: test_mla.c doc/mla.c train_gpt2_mla.c .flags
	$(BUILD) -Wno-unused-function $< -o $@ $(OMP) $(LDLIBS)

test_mla_double: test_mla.c doc/mla.c train_gpt2_mla.c .flags
	$(BUILD) -Wno-unused-function -DREAL_DOUBLE $< -o $@ $(OMP) $(LDLIBS)

test: test_mla test_mla_double train_gpt2_mla
	RUN="$(RUN)" $(RUN) ./test_mla

SANITIZERS = -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize:
	$(MAKE) test CFLAGS="-O1 -g -std=c11 -Wall -Wextra $(SANITIZERS)"

shakespeare:
	python3 prepro_tinyshakespeare.py

# Without a network: make finetune GPT2=FOLDER GPT2_DATA="--input TEXT --gpt2-files OTHER"; OTHER
# has GPT-2's own vocab.bpe and encoder.json. KV_RANK: the latent's, at most GPT2's channels;
# TUNING: options of its training. Models of a run before are kept as .old. The new one for
# transformers: python3 dev/export_hf.py data/gpt2/tuned.safetensors FOLDER
GPT2      ?= openai-community/gpt2
GPT2_DATA ?= --gpt2
KV_RANK   ?= 384
TUNING    ?= --steps 300
finetune: train_gpt2_mla
	python3 prepro_tinyshakespeare.py $(GPT2_DATA) --out-dir data/gpt2
	python3 dev/convert.py "$(GPT2)" data/gpt2/mla.safetensors --to mla --kv-rank $(KV_RANK) \
	    --data data/gpt2/tinyshakespeare_train.bin
	./train_gpt2_mla --load data/gpt2/mla.safetensors \
	    --train-data data/gpt2/tinyshakespeare_train.bin \
	    --val-data data/gpt2/tinyshakespeare_val.bin --val-every 100 --val-batches 20 \
	    --sample-every 100 --learning-rate 5e-5 --batch-size 4 --seq-len 64 $(TUNING) \
	    --save data/gpt2/tuned.safetensors
	cp data/gpt2/tinyshakespeare_tokenizer.bin data/gpt2/tuned_tokenizer.bin
	./train_gpt2_mla --load data/gpt2/tuned.safetensors --generate 200 --prompt "ROMEO:"

page:
	python3 dev/page.py

FUZZ_RUNS ?= 1000000
fuzz: dev/test/fuzz/fuzz.c train_gpt2_mla.c
	clang -g -O1 -std=c11 -march=native -Wall -Wextra -Wno-unused-function \
	    -Wno-unknown-pragmas -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	    $< -o fuzz_mla $(LDLIBS)
	found=$$(mktemp -d); for target in checkpoint tokens tokenizer prompt options; do \
	    echo "== $$target"; mkdir $$found/$$target; \
	    TARGET=$$target INPUT=$$found/input ./fuzz_mla -runs=$(FUZZ_RUNS) -timeout=1 \
	        -close_fd_mask=3 -verbosity=0 -print_final_stats=1 \
	        -artifact_prefix=dev/test/fuzz/$$target/ $$found/$$target dev/test/fuzz/$$target \
	        || exit 1; \
	done; rm -r $$found

clean:
	rm -f train_gpt2_mla test_mla test_mla_double decode_speed multiply_add_peak step_profile \
	    fuzz_mla .flags

decode_speed multiply_add_peak step_profile: %: dev/speed/%.c dev/speed/machine_limits.h \
                                             train_gpt2_mla.c .flags
	$(BUILD) -Wno-unused-function $< -o $@ $(OMP) $(LDLIBS)

profile: step_profile
	./step_profile

decode-speed: decode_speed
	./decode_speed > dev/speed/decode_speed.tmp && \
	    mv dev/speed/decode_speed.tmp dev/speed/decode_speed.md

.PHONY: decode-speed profile all test sanitize fuzz shakespeare finetune page clean
