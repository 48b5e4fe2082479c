"""From a name to a local folder: presets, Hugging Face Hub ids, folders."""

import os
from pathlib import Path

from data.command import InputError

PRESETS = {
    "tiny": str(Path(__file__).parent / "tiny"),
    "llama-7b": "huggyllama/llama-7b", "llama-13b": "huggyllama/llama-13b",
    "llama-30b": "huggyllama/llama-30b", "llama-65b": "huggyllama/llama-65b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf", "llama2-13b": "meta-llama/Llama-2-13b-hf", "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B", "llama3.1-8b": "meta-llama/Llama-3.1-8B", "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M", "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
}

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
SMALL = ["config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]


def model_folder(name, weights=True):
    """The local folder of a model: a folder, a preset, or a Hub id (downloaded to the Hub's cache; weights=False: only
    the configuration and the tokenizer). Raises InputError with the way out where there is none."""
    target = PRESETS.get(str(name), str(name))
    if Path(target).is_dir():
        if not (Path(target) / "config.json").is_file():
            raise InputError(f"{target} is no model folder: config.json is missing")
        return Path(target)
    if target.count("/") != 1 or target.startswith((".", "/", "~")):
        raise InputError(f"no model {name!r}: give a folder, a Hub id such as meta-llama/Llama-2-7b-hf, "
                         f"or one of {', '.join(PRESETS)}")
    from huggingface_hub import errors, snapshot_download
    try:
        return Path(snapshot_download(target, allow_patterns=SMALL + (WEIGHTS if weights else [])))
    except errors.GatedRepoError:
        raise InputError(f"{target} is gated: ask for access on its Hub page, then run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"the Hub has no public model {target}: check the id, or run `hf auth login` if it is private") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as e:
        raise InputError(f"{target} is not in the Hub's cache and can't be fetched ({type(e).__name__}): "
                         f"without a network, copy its folder here and give --model FOLDER") from None
    except Exception as e:  # the Hub's HTTP library has changed its exceptions before
        if not type(e).__module__.split(".")[0].startswith("http") and "requests" not in type(e).__module__:
            raise
        raise InputError(f"{target} can't be fetched from the Hub ({type(e).__name__}): "
                         f"without a network, copy its folder here and give --model FOLDER") from None
