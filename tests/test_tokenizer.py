"""data/tokenizer.py against the models' own tokenizers, as `transformers` and `tokenizers` run them: the same ids."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED

from data import load_tokenizer
from data.command import InputError
from data.tasks import encode_pair
from data.tokenizer import encode_open, end_tokens

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

# family: (pre-tokenizer, normalizer, special tokens, BOS); as their published tokenizer.json say
FAMILIES = {
    "gpt2": (GPT2, None, ["<|endoftext|>"], None),
    "llama3": (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), BYTES]), None,
               ["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|>"),
    "qwen": (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), BYTES]), normalizers.NFC(),
             ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), None,
               ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"], None),
}

TEXTS = [
    "", " ", "\n", "\n\n", "a", " a", "a ", "  a", "Hello world", "Hello, world! It's 2024, isn't it? I'LL WE'Re",
    "def f(x):\n    return x**2  # square\n\n\tif x<=3:\n\t\tprint(f\"{x:>8.3f}\")\r\n\r\n",
    "for (int i = 0; i < 1000000; ++i) { a[i] += 0x7fff; }  // 123456789 12345 1 22 333\n",
    "🙂👩‍👩‍👧‍👦 🏳️‍🌈🇩🇪 ☃️ ¼ Ⅷ ² ٣٤٥ 一二三", "naïve café — “quotes” … cafe\u0301 A\u030a ﬁ ſ 'ſ Ǆ İstanbul",
    "tab\tnbsp\u00a0thin\u2009line\u2028para\u2029nel\x85vt\x0bff\x0c\x1c\x1d wide\u3000zero\u200bwidth\ufeff end  ",
    "   leading\n   and   many    spaces     \n\n\n  \t \n trailing   ", "=" * 300 + "\n" + "-" * 77 + " " * 150 + "x",
    "Привет, мир! 你好，世界。こんにちは 안녕하세요 مرحبا नमस्ते שלום", "e\u0301\u0323 \u1e69 s\u0323\u0307 \u212b",
    "\x00\x01\x7f\ufffd\U0010ffff", "1 12 123 1234 12345.678,9 3.14e-10 100% $5 №7", "don't DON'T Don'T they'd've",
    "text<|endoftext|>more <|im_start|>user\nhi<|im_end|>\n<|endoftext|><|begin_of_text|> <s></s><unk><pad><repo_name>",
    "<|endoftext|", "<|endoftext|>", " <tool_call> {\"a\": [1, 2]}</tool_call>",
]


def corpus():
    """Text to train small tokenizers on: this repository's own code, and the texts above."""
    return [path.read_text() for path in sorted((ROOT / "data").glob("*.py"))] + TEXTS


def real_texts():
    """WikiText-2 where it lies beside the repository, and the standard library's source."""
    wiki = SHARED / "text" / "wikitext2-test.raw"  # a third of it is enough: seconds for `tokenizers`
    code = [open(sys.modules[name].__file__, encoding="utf-8").read() for name in ("argparse", "json", "typing")]
    return code + ([wiki.read_bytes().decode()[:400_000]] if wiki.is_file() else [])


def train(family, folder, vocab_size=1500, alphabet=True):
    """A small tokenizer with a family's published settings, saved as tokenizer.json."""
    pre_tokenizer, normalizer, special, bos = FAMILIES[family]
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    first = special if family == "smollm" else []  # its special tokens come before the bytes, others' after the merges
    tokenizer.train_from_iterator(corpus(), tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=first, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else []))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])])
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    return tokenizer


def fast(folder):
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def same(ours, theirs, texts):
    for text in texts:
        assert ours.encode(text) == theirs(text), repr(text[:200])


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_json(family, tmp_path):
    """A regular expression that cuts elsewhere, a merge in another order, a missing BOS, NFC or added token."""
    train(family, tmp_path)
    ours, theirs = load_tokenizer(tmp_path), fast(tmp_path)
    same(ours, theirs.encode, TEXTS + real_texts())
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_vocabulary_without_all_bytes(tmp_path):
    """Would catch bytes that the vocabulary lacks, which are dropped before pairs merge, stopping the program."""
    train("smollm", tmp_path, vocab_size=600, alphabet=False)
    ours, theirs = load_tokenizer(tmp_path), fast(tmp_path)
    same(ours, theirs.encode, TEXTS + ["ꙮ", "aꙮb", "\u0e01\u0e33 ก็ 𝔘𝔫𝔦"])


@pytest.mark.parametrize("kind", ["gpt2", "opt", "opt, as downloaded", "a post-processor beside add_bos_token"])
def test_vocab_and_merges(kind, tmp_path):
    """GPT-2's two files, and OPT's, whose ids do not follow the merges and which begin with </s>."""
    tokenizer = train("gpt2", tmp_path)
    if kind == "a post-processor beside add_bos_token":  # the post-processor decides
        config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "add_bos_token": True}
    else:
        (tmp_path / "tokenizer.json").unlink()
        tokenizer.model.save(str(tmp_path))
        vocab = json.loads((tmp_path / "vocab.json").read_text())
        config = {"tokenizer_class": "GPT2Tokenizer"}
        if kind == "gpt2":
            vocab["<|endoftext|>"] = len(vocab)
        else:
            vocab = {"<s>": 0, "<pad>": 1, "</s>": 2} | {t: 3 + i for i, t in enumerate(sorted(vocab))}
            bos = {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
            bos = bos | {"__type": "AddedToken"} if kind == "opt, as downloaded" else "</s>"
            config |= dict(add_bos_token=True, bos_token=bos, eos_token=bos, unk_token=bos, pad_token="<pad>")
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__.startswith("GPT2")
    same(ours, theirs.encode, TEXTS + real_texts()[:1])
    assert ours.encode("") == ([2] if "opt" in kind else [])
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


@pytest.mark.parametrize("files", ["vocab.json", "tokenizer.json"])
def test_tokens_that_small_files_add(files, tmp_path):
    """Would catch tokens spelled out that added_tokens.json, tokenizer_config.json or a role lists, EOS left out."""
    theirs = train("gpt2", tmp_path)
    if files == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
        theirs.model.save(str(tmp_path))
    size = theirs.get_vocab_size() if files == "tokenizer.json" else len(theirs.get_vocab(with_added_tokens=False))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": size, "<y>": size + 1}))
    listed = {str(size + 2): dict(content="<z>", lstrip=True, normalized=False, rstrip=False, single_word=False,
                                  special=True)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_eos_token": True, "bos_token": "<x>",
         "eos_token": "<y>", "unk_token": None, "added_tokens_decoder": listed}))
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["th"]}')
    ours = load_tokenizer(tmp_path)
    a, th, e = map(ours.model.token_to_id, ["a", "th", "e"])
    assert ours.encode("a<z><x>the  <z>") == [*ours.first, a, size + 2, size, th, e, size + 2, *ours.last]
    assert (ours.first, ours.last) == (([size], [size + 1]) if files == "vocab.json" else ([], []))
    assert ours.end == [size + 1] and ours.vocab_size == size + 3
    assert ours.decode([size + 2, size, th]) == ""


def test_added_tokens_that_are_words_or_take_space_along(tmp_path):
    """Would catch an added token that is found inside a word, or leaves the whitespace that belongs to it, also where
    small files name it again."""
    theirs, rng = train("gpt2", tmp_path), random.Random(0)
    theirs.add_tokens([AddedToken("foo", single_word=True), AddedToken("bar", single_word=True, lstrip=True),
                       AddedToken("baz", rstrip=True, special=True)])
    again = {token: theirs.token_to_id(token) for token in ("foo", "bar")}
    (tmp_path / "added_tokens.json").write_text(json.dumps(again))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "baz", "additional_special_tokens": ["bar"]}')
    theirs.save(str(tmp_path / "tokenizer.json"))
    parts = ["foo", "bar", "baz", " ", "  ", "x", "_", ".", "é", "\n", "1"]
    texts = ["".join(rng.choices(parts, k=rng.randint(1, 8))) for _ in range(500)]
    same(load_tokenizer(tmp_path), lambda text: theirs.encode(text).ids, texts)


def test_partial_text_decodes(tmp_path):
    """Half an emoji must not raise, and text must not lose the space at the border of two tokens."""
    train("gpt2", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a b🙂 c")
    assert tokenizer.decode(ids) == "a b🙂 c"
    assert "".join(tokenizer.decode([i]) for i in tokenizer.encode("return the value of x")) == "return the value of x"
    cuts = [tokenizer.decode(ids[:n]) for n in range(len(ids))]
    assert any(text.endswith("\ufffd") for text in cuts)
    assert tokenizer.decode(ids + [tokenizer.vocab_size + 7]) == "a b🙂 c"


LLAMA2 = SHARED / "models" / "llama2-tokenizer"
needs_llama2 = pytest.mark.skipif(not LLAMA2.is_dir(), reason="the tokenizer is no part of the repository")


@pytest.fixture
def llama2(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes((LLAMA2 / "tokenizer.model").read_bytes())
    return load_tokenizer(tmp_path)


@needs_llama2
def test_llama2():
    """The count that everyone's perplexity of LLaMA-2 on WikiText-2 rests on, and single ids where SentencePiece and
    `transformers` agree; by a folder that holds a tokenizer and no model."""
    llama2 = load_tokenizer(LLAMA2)
    rows = (SHARED / "text" / "wikitext2-test.raw").read_bytes().decode().split("\n")
    text = "\n\n".join(row + "\n" if row.strip() else "" for row in rows[:4358])
    ids = llama2.encode(text)
    assert len(ids) == 341469
    assert llama2.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]
    assert llama2.decode(ids) == text


@needs_llama2
def test_llama2_partial_text(llama2):
    """Bytes of half a character, spaces at both ends, ids of a padded vocabulary."""
    ids = llama2.encode("  a  b ꙮ 🙂 ")
    assert llama2.decode(ids) == "  a  b ꙮ 🙂 "
    assert llama2.decode(ids[:-2]).endswith("\ufffd")
    assert llama2.decode([1] + ids + [0, 2, 32000, 40000]) == "  a  b ꙮ 🙂 "
    assert llama2.encode("")[0] == 1 and llama2.decode([]) == ""


@needs_llama2
@pytest.mark.parametrize("changes", [{"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True},
                                     {"add_bos_token": False}])
def test_llama2_saved_by_transformers(llama2, tmp_path, changes):
    """A fine-tuned LLaMA comes with tokenizer.json alone: its ids, BOS and EOS are those that `transformers` gives."""
    roles = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles | changes))
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text("{}")
    ours, theirs = load_tokenizer(tmp_path / "saved"), transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    same(ours, theirs.encode, TEXTS)
    assert not (tmp_path / "saved" / "tokenizer.model").exists() and ours.end == [2] and ours.vocab_size == 32000
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


@needs_llama2
def test_what_stands_beside_llama2(llama2, tmp_path):
    """Would catch added tokens spelled out, EOS left out, and a beginning that SentencePiece does not make."""
    token = dict(content="<|im_start|>", lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    config = dict(added_tokens_decoder={"32001": token}, add_eos_token=True, bos_token={"content": "<s>"})
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 32000}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(tmp_path)
    a, b = llama2.encode("a")[1:], [llama2.model.piece_to_id("b")]
    assert found.encode("a<|im_start|><pad>b") == [1, *a, 32001, 32000, *b, 2] and found.vocab_size == 32002
    assert found.decode(found.encode("a<|im_start|>")) == "a"
    odd = dict(added_tokens_decoder={"32001": token | {"rstrip": True}})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(odd))
    with pytest.raises(InputError, match="how '<|im_start|>' takes spaces along, as .* asks .rstrip.: add the model's"):
        load_tokenizer(tmp_path)
    for wrong in {"add_prefix_space": False}, {"bos_token": "<|im_start|>"}:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(InputError, match="begins a text otherwise than tokenizer_config.json asks"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": false}')
    (tmp_path / "added_tokens.json").unlink()
    train("gpt2", tmp_path, vocab_size=300)  # any tokenizer.json: it is read then
    assert load_tokenizer(tmp_path).vocab_size < 400


def test_what_a_sentencepiece_model_calls_special(tmp_path):
    """Would catch Mistral's [INST] spelled out, and Penn Treebank's "<unk>"; beside a folder that names none, "<s>" is
    text."""
    import sentencepiece
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_prefix=str(tmp_path / "tokenizer"), vocab_size=700, model_type="bpe",
        byte_fallback=True, control_symbols=["[INST]", "[/INST]"], hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "config.json").write_text("{}")
    plain = load_tokenizer(tmp_path)
    said = {str(i): dict(content=content, special=True)
            for i, content in enumerate(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(added_tokens_decoder=said, unk_token="<unk>")))
    ours = load_tokenizer(tmp_path)
    text = plain.encode("Return the value")[1:]
    assert ours.encode("[INST] Return the value[/INST]<unk>") == [1, 3, *text, 4, 0]
    assert ours.decode(ours.encode("[INST]value")) == "value" and len(plain.encode("[INST]")) > 2
    assert 0 not in plain.encode("<s> <unk>") and plain.encode("<s> <unk>").count(1) == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(bos_token="<s>", unk_token=dict(content="<unk>"))))
    assert load_tokenizer(tmp_path).encode("<s><unk> Return the value") == [1, 1, 0, *text]


@needs_llama2
def test_llama2_against_transformers(llama2, tmp_path):
    """Ids of another normalization. Where spaces follow each other `transformers` 5 splits them otherwise than LLaMA's
    own tokenizer, which is SentencePiece: such texts are left out."""
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it")
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        if not text.startswith(" ") and not any(odd in text for odd in ("  ", "==", "<|")):
            assert llama2.encode(text) == [1] + theirs.encode(text, add_special_tokens=False), repr(text)


@needs_llama2
@pytest.mark.parametrize("legacy", [None, False, True])
def test_what_follows_an_added_token(legacy, tmp_path):
    """Would catch a space that nobody wrote: SentencePiece puts one before whatever it is given."""
    shutil.copy(LLAMA2 / "tokenizer.model", tmp_path)
    said = {str(i): dict(content=content, lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
            for i, content in [(0, "<unk>"), (1, "<s>"), (2, "</s>"), (32000, "[INST]"), (32001, "[/INST]")]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True,
        added_tokens_decoder=said, **({} if legacy is None else {"legacy": legacy}))))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("[INST] Hi there [/INST]", "[INST]Hi[/INST] there", "Hi[INST]\nHi", "[INST][/INST]",
                 "[INST] [/INST]Hi", "the <unk> of <unk> N million <unk>", "<s>Hi</s> there", "a <unk>\n <unk> b"):
        assert ours.encode(text) == theirs(text).input_ids, text


@pytest.mark.parametrize("damage, words", [
    (lambda t: "{", "not a tokenizer"),
    (lambda t: t[:len(t) // 2], "not a tokenizer"),
    (lambda t: "\0" + t, "not a tokenizer"),
    (lambda t: json.dumps({k: v for k, v in json.loads(t).items() if k != "model"}), "model"),
    (lambda t: json.dumps({**json.loads(t), "model": {**json.loads(t)["model"], "merges": ["a b", "a"]}}),
     "not a tokenizer"),
    (None, "no tokenizer"),
    ("added_tokens.json", "the added token '<x>' is to be 7, but the vocabulary makes it"),
], ids=["cut", "half", "another kind", "no model", "half a merge", "absent", "added"])
def test_refused(damage, words, tmp_path):
    """A tokenizer that would run and give other ids than its model was trained with, or a traceback."""
    train("gpt2", tmp_path, vocab_size=300)
    path = tmp_path / "tokenizer.json"
    if damage == "added_tokens.json":
        (tmp_path / damage).write_text('{"<x>": 7}')
    elif damage:
        path.write_text(damage(path.read_text()))
    else:
        path.unlink()
    with pytest.raises(InputError, match=words):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_model_without_begin(tmp_path):
    """Would catch an id of -1 before every text."""
    import sentencepiece
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "config.json").write_text("{}")
    ours = load_tokenizer(tmp_path)
    assert ours.first == [] and min(ours.encode("Hello world")) >= 0


def test_refused_sentencepiece(tmp_path):
    """A tokenizer.model that is something else."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="SentencePiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file, text", [
    ("tokenizer_config.json", '{"added_tokens_decoder": {"5000": "<x>"}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<x>"}}}'),
    ("special_tokens_map.json", '{"bos_token": {"lstrip": false}}')])
def test_damaged_files_beside_sentencepiece(file, text, tmp_path):
    """A traceback."""
    (tmp_path / "tokenizer.model").write_bytes(Path(ROOT, "data/tiny/tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match="are damaged"):
        load_tokenizer(tmp_path)


def test_the_end_that_config_json_alone_tells(tmp_path):
    """Would catch documents that run into each other: GPT-2's tokenizer_config.json leaves EOS out."""
    train("gpt2", tmp_path)
    for name in "tokenizer_config.json", "special_tokens_map.json":
        (tmp_path / name).unlink(missing_ok=True)
    for said, end in ((3, [3]), ([4, 3], [4]), (None, [])):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": said}))
        assert load_tokenizer(tmp_path).end == end


def test_what_ends_a_text(tmp_path):
    """Would catch a chat model that goes on after its answer: its small files name several ends."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert end_tokens(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert end_tokens(tmp_path) == {2, 7}
    for damaged in '{"eos_token_id": 2.0}', '{"eos_token_id": "2"}', '{"eos_token_id": [[2]]}', "[" * 100_000:
        (tmp_path / "generation_config.json").write_text(damaged)
        with pytest.raises(InputError, match="generation_config.json"):
            end_tokens(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    (tmp_path / "config.json").unlink()
    assert end_tokens(tmp_path) == set()


def test_a_text_that_goes_on_has_no_end(tmp_path):
    """Would catch a prompt, or the context of a task, that ends in EOS where the folder asks for one."""
    (tmp_path / "tokenizer.model").write_bytes(Path(ROOT, "data/tiny/tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text("{}")
    plain = encode_open(load_tokenizer(tmp_path), "Return the value")
    (tmp_path / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    ours = load_tokenizer(tmp_path)
    assert ours.encode("Return the value") == plain + ours.end and encode_open(ours, "Return the value") == plain
    pair = "Return the value", " of"
    assert encode_pair(ours, *pair) == encode_pair(load_tokenizer("tiny"), *pair)


def test_texts_are_neither_cut_nor_filled_up(tmp_path):
    """Would catch perplexity of a text's first 8 tokens: files of fine-tuned models often ask for both."""
    theirs = train("gpt2", tmp_path)
    text = "Return the value of the name in the list of names " * 9
    expected = theirs.encode(text).ids
    theirs.enable_truncation(8)
    theirs.enable_padding(length=1000)
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(text) == expected and 8 < len(expected) < 1000


def test_the_longest_added_token_is_recognised(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(Path(ROOT, "data/tiny/tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text("{}")
    own = load_tokenizer(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x": own, "<x>": own + 1}))
    assert load_tokenizer(tmp_path).encode("a<x>")[-1] == own + 1
