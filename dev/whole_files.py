"""Files and folders that appear whole or not at all, for convert.py and export_hf.py.

What stands there is replaced only if it is of the kind that is written, and is kept as X.old.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from prepro_tinyshakespeare import fail, one_line, say


def read_json(path):
    """A file's JSON object; anything else is refused."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path}: cannot be read as JSON: {one_line(error)}")
    if not isinstance(found, dict):
        fail(f"{path}: its JSON is no object, expected one")
    return found


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_file(path):
    """Refuses what cannot be read as a file: a pipe would be waited for."""
    if not os.path.isfile(path):
        fail(f"{path}: {'no regular' if os.path.exists(path) else 'no such'} file")


def place(path):
    """Where a file or folder of this name really goes: links stay, and are followed."""
    if not os.fspath(path):
        fail("an empty name, expected that of a file or folder to write")
    path = os.fspath(path).rstrip("/") or "/"
    if os.path.islink(path) and not os.path.exists(path):
        fail(f"{path}: a link that leads to no file")
    return os.path.realpath(path) if os.path.islink(path) else path


def check_unlocked(path):
    """Refuses a checkpoint that a run of the C program is writing, which locks path.lock."""
    with contextlib.suppress(FileNotFoundError), open(path + ".lock", "r+b") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"{path}: another process is writing it; end that, or name another file")


def check_folder(path, model_type):
    """Refuses what is there, unless it is empty or a model's folder of that type."""
    if not os.path.lexists(path):
        return
    if not os.path.isdir(path):
        fail(f"{path}: exists and is no folder; will not replace it (expected X.safetensors, X.bin "
             "or a folder)")
    if os.path.ismount(path):
        fail(f"{path}: a mount point, which cannot be replaced; name a folder in it")
    if os.listdir(path):
        config = os.path.join(path, "config.json")
        found = read_json(config).get("model_type") if os.path.exists(config) else "missing"
        if found != model_type:
            fail(f"{path}: a folder whose model_type is {found}, expected {model_type}; will not "
                 "replace it")


def put_in_place(part, path):
    """Renames what is complete; what stood there, if it is not empty, is kept as path.old."""
    if os.path.isdir(path) and not os.listdir(path):
        os.rmdir(path)
    elif os.path.exists(path) and os.path.getsize(path):
        old, n = f"{path}.old", 1
        while os.path.lexists(old):
            n += 1
            old = f"{path}.old{n}"
        os.rename(path, old)
        say(f"what was {path} is now {old}")
    os.replace(part, path)


@contextlib.contextmanager
def replacing(path, folder=False):
    """Gives a file, or the Path of a folder, beside path, which bears its name once complete."""
    part = f"{path}.{os.getpid()}.part"
    try:
        if folder:
            os.mkdir(part)
            yield Path(part)
        else:
            with open(part, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if os.path.exists(path):
                os.chmod(part, os.stat(path).st_mode & 0o7777)
        put_in_place(part, path)
    except OSError as error:
        fail(f"{path}: cannot write: {error.strerror or one_line(error)}")
    finally:
        if os.path.isdir(part):
            shutil.rmtree(part)
        elif os.path.exists(part):
            os.remove(part)


def run_command(main):
    """main(), with one line where memory does not suffice, and no half file after any signal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's is to be ignored, and stays so
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main()
    except (MemoryError, OSError, RuntimeError) as error:  # NumPy's, a mapping's, PyTorch's
        if "memory" not in repr(error).lower():
            raise
        fail(f"not enough memory: {one_line(error)[:200]}")
