/*
Fuzzing of all that reads what a person gives: `make fuzz` (clang). The environment's TARGET
chooses:

    checkpoint   header, configuration and tensors of a safetensors file
    tokens       a token file, or text
    tokenizer    a tokenizer file; then a text is encoded with it
    prompt       encoding, with the tokenizer of the tests: the tokens' bytes must be the text again
    options      a command line, one argument a line; then the model's configuration

dev/test/fuzz/TARGET/ has inputs to start from, and whatever once went wrong. Inputs that the
program refuses end in fail(), which here returns to the fuzzer instead of ending the process; what
was allocated and opened until then is cleaned up behind it.
*/
#define _XOPEN_SOURCE 700
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

static jmp_buf refused;
static void *blocks[1 << 16];
static int n_blocks;
static FILE *opened;

static void *fuzz_keep(void *p) {
    if (n_blocks == sizeof blocks / sizeof *blocks) abort();
    return p ? blocks[n_blocks++] = p : NULL;
}

static void *fuzz_forget(void *p) {
    for (int i = 0; p && i < n_blocks; i++)
        if (blocks[i] == p) { blocks[i] = blocks[--n_blocks]; break; }
    return p;
}

static void fuzz_free(void *p) { free(fuzz_forget(p)); }

enum { LITTLE = 1 << 20 };  // more memory than this is not to be had

static void *fuzz_alloc(size_t alignment, size_t size) {
    return size > LITTLE ? NULL : fuzz_keep(aligned_alloc(alignment, size));
}

static FILE *fuzz_open(const char *path, const char *how) { return opened = fopen(path, how); }

static int fuzz_close(FILE *f) {
    opened = NULL;
    return fclose(f);
}

#define exit(status) ((void)(status), longjmp(refused, 1))
#define aligned_alloc fuzz_alloc
#define free fuzz_free
#define fopen fuzz_open
#define fclose fuzz_close
#define TESTING
#include "../../../train_gpt2_mla.c"
#undef exit

static const char *path;  // where to put an input that is to be a file: the environment's INPUT
static Tokenizer tokenizer;  // of the tests
static Options fresh;

static void read_checkpoint(void) {
    Checkpoint file = checkpoint_open(path);
    Config c = checkpoint_config(&file);
    Model *m = model_create(&c, 1);
    checkpoint_read_model(&file, m, checkpoint_meta(&file, "settings") != NULL);
    model_free(m);
    checkpoint_close(&file);
}

static void read_tokens(void) {
    Data d = data_load(path);
    int x[32], y[32];
    if (d.n > 8) next_batch(&d, RANDOM, 1, d.n, x, y, 4, 8);
    if (d.n > 32) next_batch(&d, SEQUENTIAL, 1, d.n, x, y, 4, 8);
    free(d.tokens);
}

static void read_tokenizer(void) {
    static const char text[] = "It's 1623, don't    they'll \xe2\x80\xa6 caf\xc3\xa9\n\n";
    Tokenizer t = tokenizer_load(path);
    int tokens[sizeof text];
    encode(&t, (const unsigned char *)text, sizeof text - 1, tokens);
    tokenizer_free(&t);
}

static void encode_prompt(const unsigned char *text, size_t n) {
    int *tokens = allocate((n + 1) * sizeof(int), "tokens");
    long count = encode(&tokenizer, text, n, tokens);
    size_t at = 0;
    for (long i = 0; i < count; i++) {
        size_t length = token_bytes(&tokenizer, tokens[i]);
        const unsigned char *bytes = tokenizer.bytes + tokenizer.start[tokens[i]];
        if (at + length > n || memcmp(bytes, text + at, length)) abort();
        at += length;
    }
    if (at != n) abort();
    free(tokens);
}

static void read_options(const unsigned char *text, size_t n) {
    char *line = allocate(n + 1, "command line"), *argv[64] = {"train_gpt2_mla"};
    int argc = 1;
    memcpy(line, text, n);
    for (char *end; argc < 64 && *line; line = end + 1) {
        argv[argc++] = line;
        if (!(end = strchr(line, '\n'))) break;
        *end = 0;
    }
    opt = fresh;
    for (Option *o = options; o < options + N_OPTIONS; o++) o->given = 0;
    parse_options(argc, argv);
    model_defaults(&(Inputs){.tokenizer = tokenizer});
    config_complete(&opt.config, 2, "options");
    settings(&(Data){0});
}

int LLVMFuzzerTestOneInput(const unsigned char *bytes, size_t n) {
    static const char *target;
    if (!target) {
        target = getenv("TARGET");
        tokenizer = tokenizer_load("dev/test/reference/encoding_tokenizer.bin");
        n_blocks = 0;  // kept
        fresh = opt;
        path = getenv("INPUT");
    }
    if (strcmp(target, "prompt") && strcmp(target, "options")) {
        FILE *f = fopen(path, "wb");
        if (!f || fwrite(bytes, 1, n, f) != n || fclose(f)) abort();
    }
    if (!setjmp(refused)) {
        if (!strcmp(target, "checkpoint")) read_checkpoint();
        else if (!strcmp(target, "tokens")) read_tokens();
        else if (!strcmp(target, "tokenizer")) read_tokenizer();
        else if (!strcmp(target, "prompt")) encode_prompt(bytes, n);
        else if (!strcmp(target, "options")) read_options(bytes, n);
        else abort();
    }
    while (n_blocks) (free)(blocks[--n_blocks]);
    if (opened) fclose(opened);
    return 0;
}
