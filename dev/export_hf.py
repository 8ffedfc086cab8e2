"""Any checkpoint of this program as a folder that Hugging Face's transformers opens.

    python3 dev/export_hf.py model.safetensors FOLDER [--tokenizer FILE]

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)

The folder holds config.json, the weights (float32), the tokenizer, and the program that computes
it all: one Python file, which is dev/pytorch/gpt2_mla.py up to its command line and then
dev/pytorch/hf_model.py. The tokenizer is X_tokenizer.bin beside X.safetensors, or --tokenizer
FILE; models of 256 tokens without one read bytes. A FOLDER that is there already is replaced
only if it is such an export, and is kept as FOLDER.old. What dev/convert.py reads, this reads too;
a GPT-2 that transformers know by themselves is better written by that.
(pip install torch numpy safetensors; to open it transformers)
"""

import argparse
import signal
from dataclasses import asdict

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in convert.py
from convert import ROOT, read, write_folder  # noqa: E402
from prepro_tinyshakespeare import Parser, say  # noqa: E402
from whole_files import check_folder, place, run_command  # noqa: E402

MODULE = "modeling_train_gpt2_mla"
COMMAND_LINE = "# " + "-" * 76 + "\n# Command line\n"
IMPORT = "from gpt2_mla import GPT, Config, rope_table  # in an exported file they stand above\n"


def modeling_source():
    """The folder's Python file: the model, without its command line, and its dress for
    transformers, which no longer needs to import it."""
    model = (ROOT / "dev/pytorch/gpt2_mla.py").read_text()
    dress = (ROOT / "dev/pytorch/hf_model.py").read_text()
    assert model.count(COMMAND_LINE) == 1 and dress.count(IMPORT) == 1
    return ("# Made by dev/export_hf.py of train_gpt2_mla, from dev/pytorch/gpt2_mla.py and then\n"
            "# dev/pytorch/hf_model.py.\n\n"
            + model[:model.index(COMMAND_LINE)] + dress.replace(IMPORT, ""))


def export(src, folder, tokenizer=None):
    """All that the command line does. Refusals are SystemExit with one line."""
    folder = place(folder)
    check_folder(folder, "train_gpt2_mla")
    model = read(src, tokenizer)
    say(f"{src}: {model}")
    write_folder(model, folder, {
        "architectures": ["MlaForCausalLM"], "model_type": "train_gpt2_mla",
        "auto_map": {"AutoConfig": f"{MODULE}.MlaConfig",
                     "AutoModelForCausalLM": f"{MODULE}.MlaForCausalLM"}} | asdict(model.config),
        files={f"{MODULE}.py": modeling_source()})
    for note in model.notes:
        say(f"note: {note}")
    say(f"{folder}: written")


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    p.add_argument("src", metavar="SRC", help="checkpoint")
    p.add_argument("folder", metavar="FOLDER")
    p.add_argument("--tokenizer", metavar="FILE",
                   help="the model's: llm.c's format, nanoGPT's meta.pkl, or a folder")
    args = p.parse_args()
    export(args.src, args.folder, args.tokenizer)


if __name__ == "__main__":
    run_command(main)
