"""From a name to a local folder: presets, Hugging Face Hub ids, folders."""

import difflib
from pathlib import Path

from data.command import InputError

PRESETS = {"tiny": str(Path(__file__).parent / "tiny")}
for preset, target, sizes in [  # {}: each of the sizes
    ("llama-{}b", "huggyllama/llama-{}b", "7 13 30 65"),
    ("llama2-{}b", "meta-llama/Llama-2-{}b-hf", "7 13 70"),
    ("llama3-{}b", "meta-llama/Meta-Llama-3-{}B", "8 70"),
    ("llama3.1-{}b", "meta-llama/Llama-3.1-{}B", "8 70"),
    ("llama3.2-{}b", "meta-llama/Llama-3.2-{}B", "1 3"),
    ("vicuna-{}b", "lmsys/vicuna-{}b-v1.5", "7 13"),
    ("tinyllama", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "1.1"),
    ("mistral-{}b", "mistralai/Mistral-7B-v0.1", "7"),
    ("smollm2-{}m", "HuggingFaceTB/SmolLM2-{}M", "135 360"),
    ("smollm2-{}b", "HuggingFaceTB/SmolLM2-{}B", "1.7"),
    ("qwen2.5-{}b", "Qwen/Qwen2.5-{}B", "0.5 1.5 3 7 14 32 72"),
    ("qwen3-{}b", "Qwen/Qwen3-{}B", "0.6 1.7 4 8 14 32"),
    ("opt-{}", "facebook/opt-{}", "125m 350m 1.3b 2.7b 6.7b 13b 30b 66b"),
    ("gpt2", "openai-community/gpt2", "124m"),
    ("gpt2-{}", "openai-community/gpt2-{}", "medium large xl"),
]:
    PRESETS |= {preset.format(size): target.format(size) for size in sizes.split()}

SMALL = ["config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json",
         "added_tokens.json", "chat_template.jinja"]
SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]  # not consolidated.*, the same weights once more
PYTORCH = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def repository(folder):
    """What names the model of a folder when a run goes on or is measured again: the folder, or of a snapshot in the
    Hub's cache its repository, where a new README makes another snapshot of the same files."""
    folder = Path(folder).resolve()
    return str(folder.parents[1] if folder.parent.name == "snapshots" else folder)


def model_folder(name, weights=True, config_only=False, holds=("config.json",)):
    """The local folder of a model: a folder, which is one if it `holds` any of these files, a preset, or a Hub id
    (downloaded to the Hub's cache; weights=False: only the configuration and the tokenizer; config_only: config.json
    alone). Raises InputError with the way out where there is none."""
    target = PRESETS.get(name, str(name))  # a Path is no preset, such as that of "./tiny"
    if Path(target).is_dir():
        if not any((Path(target) / file).is_file() for file in holds):
            inside = sorted(str(file.parent) for file in Path(target).glob("*/config.json"))
            raise InputError(f"{target} is no model folder: config.json is missing" +
                             (f"; give {' or '.join(inside[:5])}" if inside else ""))
        return Path(target)
    if Path(target).is_file():
        raise InputError(f"{target} is a file: a model is a folder with a config.json")
    if Path(f"{target}.partial").is_dir():
        raise InputError(f"{target} is not finished yet: give the command that makes it once more")
    if target.count("/") != 1 or target.startswith((".", "/", "~")):
        if Path(target).parent != Path() and Path(target).parent.is_dir():
            raise InputError(f"there is no folder {target}: check its name")
        near = difflib.get_close_matches(target, PRESETS, n=5, cutoff=0.4) or ["tiny", "llama2-7b", "opt-125m"]
        raise InputError(f"no model {name!r}: give a folder, a Hub id such as meta-llama/Llama-2-7b-hf, or a preset "
                         f"such as {', '.join(near)} (data/hub.py lists all)")
    from huggingface_hub import errors, snapshot_download
    try:
        if config_only:
            return Path(snapshot_download(target, allow_patterns=SMALL[:1]))
        folder = Path(snapshot_download(target, allow_patterns=SMALL + (SAFETENSORS if weights else [])))
        if weights and not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(target, allow_patterns=SMALL + PYTORCH))
        return folder
    except errors.HFValidationError:
        raise InputError(f"{target!r} is neither a folder nor a possible Hub id") from None
    except errors.GatedRepoError:
        raise InputError(f"{target} is gated: ask for access on its Hub page, then run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"there is no folder {target} here, and the Hub has no public model of that name: check it, "
                         f"or run `hf auth login` if it is private") from None
    except (OSError, errors.HTTPError) as e:  # HTTPError: what the Hub's HTTP library raises, whichever it is
        absent = isinstance(e, errors.LocalEntryNotFoundError)
        reason = "the Hub is out of reach" if absent else getattr(e, "strerror", None) or type(e).__name__
        what = "a folder with its config.json" if config_only else "its folder"
        near = difflib.get_close_matches(target, map(str, Path(target).parent.glob("*")), 1)
        slip = f" ({near[0]} is)" if near else ""
        raise InputError(f"{target} is no folder here{slip}, not in the Hub's cache, and can't be fetched ({reason}): "
                         f"without a network, copy {what} here and give --model FOLDER") from None
