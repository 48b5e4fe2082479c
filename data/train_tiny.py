"""Train a model like the one that ships: a tokenizer and a LLaMA on the standard library of the Python that runs this.

    python -m data.train_tiny --compile         (an hour and more on two CPU cores; after a stop, run it again)
    python -m data.train_tiny --compile --out out/small --hidden-size 640 --layers 12 --packages     (larger, for a GPU)

Windows of text are drawn at random, three in ten from the documentation (fewer in a long training, which would learn it
by heart) and the others from source code. AdamW, warm-up and cosine to zero, arithmetic in bf16 (where that is fast) on
float32 weights; the folder's are bf16.
The validation text is read while training, the test text never.
"""

import io
import json
import platform
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ast_method import learning_rate
from data.command import InputError, at_least, parser, record, run, start, write_atomically
from data.device import fast_in_bf16
from data.stdlib import package_source, stdlib_source, stdlib_text
from data.stream import open_bin, write_bin
from data.text import windows
from data.tokenizer import SentencePiece
from data.writer import CheckpointWriter, alone_in, occupied
from gpt import GPT, Config

CONFIG = dict(  # what does not depend on the size
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=4096, head_dim=64, hidden_act="silu",
    rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=1,
    eos_token_id=2, attention_bias=False, mlp_bias=False, torch_dtype="bfloat16")
TOKENIZER = dict(  # tokenizer_config.json, without which transformers adds neither BOS nor the first word's space
    tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False, bos_token="<s>", eos_token="</s>",
    unk_token="<unk>")
DOCUMENTATION, MOST_READ = 0.3, 10  # its share of the windows, and how often it is read at most
OURS = ("tokenizer.model", "tokenizer_config.json", "source.bin", "source.bin.partial", "packages.bin",
        "packages.bin.partial", "state.pt")  # what there is of a model while it is trained
MOST_SOURCE = 200_000_000  # characters of packages that are read: a longer training than ours needs no more
schedule = partial(learning_rate, warmup=100, end=0.0)


def train_tokenizer(path, text, vocab_size):
    """A SentencePiece BPE tokenizer of LLaMA's kind: spaces are kept, unknown characters fall back to bytes."""
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in text.split("\n") if line), model_writer=model, model_type="bpe",
        vocab_size=vocab_size, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, max_sentence_length=20000, num_threads=1, minloglevel=2)
    write_atomically(path, lambda beside: beside.write_bytes(model.getvalue()))


@torch.no_grad()
def validation_loss(model, ids):
    return sum(F.cross_entropy(model(x[:, :-1]).float().flatten(0, 1), x[:, 1:].flatten()) * len(x)
               for x in ids.split(32)) / len(ids)


def new_model(hidden_size, layers, seqlen):
    """A model of some width and depth for windows of `seqlen` tokens, with GPT-2's initialisation, residual projections
    scaled by depth."""
    heads = hidden_size // CONFIG["head_dim"]
    model = GPT(Config.from_dict(CONFIG | dict(
        hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        intermediate_size=round(hidden_size / 6) * 16,  # 8/3 as wide, and 2:4 can be stored
        max_position_embeddings=seqlen)))
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            scale = (2 * layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            torch.nn.init.normal_(weight, std=0.02 * scale)
    return model


def read(work, packages):
    """The tokenizer, trained if `work` has none, and the training ids of documentation and of source code (arrays),
    which take minutes where packages are many: they, too, are kept in `work`."""
    docs = stdlib_text("train")
    if not (work / "tokenizer.model").is_file():
        print("training the tokenizer ...", flush=True)
        train_tokenizer(work / "tokenizer.model", docs + "\n" + stdlib_source(), CONFIG["vocab_size"])
    tokenizer = SentencePiece(work / "tokenizer.model")
    file = work / ("packages.bin" if packages else "source.bin")
    if not file.is_file():
        texts = [stdlib_source(), package_source()[:MOST_SOURCE] if packages else ""]
        write_bin(file, [lambda: texts], tokenizer, "source code", {"packages": packages})
    text = json.dumps(TOKENIZER, indent=1) + "\n"  # only now: in source code "</s>" ends nothing
    write_atomically(work / "tokenizer_config.json", lambda beside: beside.write_text(text))
    return tokenizer, [np.array(tokenizer.encode(docs), np.uint16), open_bin(file, tokenizer)]


def new_optimizer(model, lr):
    """AdamW with weight decay on matrices alone."""
    matrices, rest = ([w for w in model.parameters() if (w.dim() == 2) == wanted] for wanted in (True, False))
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                             lr=lr, betas=(0.9, 0.95))


def documentation_share(tokens, trained):
    """The share of windows that are documentation, of so many tokens, in a training that reads `trained` tokens."""
    return min(DOCUMENTATION, MOST_READ * tokens / trained)


def draw(streams, share, seed, step, batch, seqlen):
    """The windows [batch, seqlen + 1] of a step, which alone decides them, so that resuming is exact. share: of the
    windows that are of the first stream, the documentation."""
    rng, ids = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63), []
    for _ in range(batch):
        stream = streams[int(torch.rand(1, generator=rng) >= share)]
        at = torch.randint(len(stream) - seqlen, (1,), generator=rng).item()
        ids.append(torch.from_numpy(stream[at:at + seqlen + 1].astype(np.int64)))
    return torch.stack(ids)


def options():
    p = parser(__doc__)
    p.add_argument("--out", default="out/trained",
                   help="the folder that is filled; data/tiny holds the model that ships")
    p.add_argument("--hidden-size", type=int, default=256, help="a multiple of 128")
    p.add_argument("--layers", type=int, default=6, help="blocks of the model")
    p.add_argument("--packages", action="store_true",
                   help="also train on the source of the packages that are installed")
    p.add_argument("--steps", type=int, default=2000, help="updates of the weights, each of --batch windows")
    p.add_argument("--batch", type=int, default=32, help="windows a step")
    p.add_argument("--seqlen", type=int, default=256, help="tokens a window")
    p.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    p.add_argument("--compile", action="store_true", help="torch.compile: half as fast again, needs a C++ compiler")
    p.add_argument("--save-every", type=int, default=100, help="steps between validations and checkpoints")
    return p.parse_args()


def last_state(file, model, optimizer, settings):
    """(step, validation losses so far) of the state that a stopped run has left in `file`, loaded into model and
    optimizer."""
    if not file.is_file():
        return 0, []
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["options"] != settings:
            raise InputError(f"{file} belongs to a run with other options, or of another Python: delete it or choose "
                             f"another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"going on at step {state['step']}")
        return state["step"], state["history"]
    except InputError:
        raise
    except Exception:  # a damaged pickle can raise anything
        raise InputError(f"{file} is damaged: delete it or choose another --out") from None


def train(args, model, streams, held_out, state_file):
    """Train the model, saving its state at intervals; returns [(step, validation loss)]."""
    optimizer = new_optimizer(model, args.lr)
    settings = [args.hidden_size, args.layers, args.packages, args.steps, args.batch, args.seqlen, args.lr, args.seed]
    settings.append(platform.python_version())  # the text is Python's
    first, history = last_state(state_file, model, optimizer, settings)
    for block in model.model.layers if args.compile else ():
        block.compile()  # one block's code serves all of them
    arithmetic = partial(torch.autocast, torch.device(args.device).type, torch.bfloat16, fast_in_bf16(args.device))
    share = documentation_share(len(streams[0]), args.steps * args.batch * args.seqlen)
    begin = time.perf_counter()
    for step in range(first, args.steps):
        ids = draw(streams, share, args.seed, step, args.batch, args.seqlen).to(args.device)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, args.steps, args.lr)
        with arithmetic():
            loss = F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        if done % 10 == 0:
            seconds = (time.perf_counter() - begin) / (done - first)
            print(f"step {done:5d}/{args.steps}  loss {loss.item():6.3f}  {seconds:5.2f} s/step  "
                  f"{args.batch * args.seqlen / seconds:6.0f} tokens/s  "
                  f"{seconds * (args.steps - done) / 60:5.1f} min left", flush=True)
        if done % args.save_every == 0 or done == args.steps:
            with arithmetic():
                loss = validation_loss(model, held_out)
            if not loss.isfinite():
                raise InputError(f"the validation loss is {loss.item()} after {done} steps: give a lower --lr than "
                                 f"{args.lr}, and another --out")
            print(f"step {done:5d}  validation loss {loss.item():.4f}  perplexity {loss.exp().item():.2f}", flush=True)
            history.append((done, loss.item()))
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=done, history=history,
                         options=settings)
            write_atomically(state_file, lambda beside: torch.save(state, beside))
    return history


def main():
    args = options()
    start(args)
    if args.hidden_size < 128 or args.hidden_size % 128:
        raise InputError(f"--hidden-size {args.hidden_size} must be a multiple of 128")
    at_least(args, layers=1, steps=1, batch=1, seqlen=2, save_every=1)
    if not 0 < args.lr < float("inf"):
        raise InputError(f"--lr {args.lr} must be above 0 and finite")
    CheckpointWriter(args.out, CONFIG, made={})  # refuses a folder that it can't fill, or that another command has made
    out = Path(args.out).resolve()
    work = out.with_name(out.name + ".training")  # the tokenizer and the state of an unfinished run
    if (out / "config.json").is_file() and not (work / "state.pt").is_file():
        raise InputError(f"--out {args.out} holds a finished model: choose another folder, or delete it")
    if occupied(work, *OURS):
        raise InputError(f"{work} is no unfinished training of this program: move it away or choose another --out")
    with alone_in(work):
        tokenizer, streams = read(work, args.packages)
        held_out = windows(tokenizer.encode(stdlib_text("validation")), args.seqlen + 1).to(args.device)
        print(f"{len(streams[0]):,} tokens of documentation, {len(streams[1]):,} of source, "
              f"{held_out.numel():,} for validation")
        model = new_model(args.hidden_size, args.layers, args.seqlen).to(args.device)
        history = train(args, model, streams, held_out, work / "state.pt")
        model.bfloat16().save_pretrained(args.out, tokenizer_from=work)
        del streams  # a mapped file would keep Windows from removing it
        shutil.rmtree(work)
    print(f"saved {args.out}")
    record(args, {"validation_loss": history, "parameters": sum(w.numel() for w in model.parameters())})


if __name__ == "__main__":
    run(main, goes_on=True)
