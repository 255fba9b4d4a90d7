"""Tokenizers: the ids that transformers gives, whichever way the file is read."""

import json
import subprocess
import sys

import pytest
from chat_templates import CHATML, GEMMA, QWEN3
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from recall_jax.errors import InputError
from recall_jax.experiments.demo.material import BASE, CHECKPOINTS
from recall_jax.inputs import tokens
from recall_jax.inputs.tokens import load_tokenizer

TEXTS = (
    "hello world",
    "",
    "\n x  42 ",
    "a <s> b </s> c <pad> d",
    "the quick brown fox jumps over the lazy dog, twice: the quick brown fox jumps",
    "naïve 日本 🙂",
)
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
PIECES = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<s>", "</s>", "<unk>"),
    *(
        "hello",
        "fox",
        "IT'S",
        " ",
        "   ",
        "\n",
        "\r\n\n",
        "\t",
        "42",
        "12345",
        "▁",
        "<0x41>",
        "\u00a0",
    ),
    *("e\u0301", "\u1e9b\u0323", "ﬁ", "日本", "👩🏽\u200d🚀", "\u0000", "...", "//x", ""),
)
FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
LEVEL = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def added(content):
    """A token as transformers writes it into tokenizer_config.json."""
    return {"__type": "AddedToken", "content": content, **FLAGS, "special": True}


def byte_level(template):
    """A tokenizer.json with <s> and </s> put around a text as `template` says, or not at all."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:1] * 9 + TEXTS[4:5] * 9, trainer)
    if template:
        special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=f"{template} $B", special_tokens=special
        )
    return json.loads(tokenizer.to_str())


def declared(content):
    """The added tokens of a tokenizer.json as tokenizer_config.json repeats them."""
    tokens = [dict(token) for token in content["added_tokens"]]
    return {str(token.pop("id")): token for token in tokens}


def learnt(pre_tokenizer, special_tokens, alphabet=()):
    """Vocabulary and merges of a small BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special_tokens,
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS[:3], *TEXTS[4:], *PIECES] * 9, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {name: model[name] for name in ("vocab", "merges")}


def qwen2(model_type="qwen2", named="Qwen2Tokenizer"):
    """As Qwen2, Qwen2.5 and Qwen3 ship it."""
    pieces = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
        "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
    byte_level = {"type": "ByteLevel", **LEVEL}
    split = {"type": "Split", "pattern": {"Regex": pieces}, "behavior": "Isolated"}
    model = learnt(pre_tokenizers.ByteLevel(False), [], pre_tokenizers.ByteLevel.alphabet())
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **FLAGS, "special": token in special}
            for index, token in enumerate((*special, "<tool_call>"), start=len(model["vocab"]))
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**split, "invert": False}, byte_level],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            **model,
        },
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": declared(content),
        "additional_special_tokens": list(special[1:]),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": named,
        "unk_token": None,
    }
    return model_type, content, config


def sentencepiece(model_type, named, normalizer, pre_tokenizer, unknown, **config):
    """As tokenizers that were SentencePiece's are shipped: bytes for what the vocabulary lacks."""
    special = ["<unk>", "<s>", "</s>"]
    model = learnt(pre_tokenizers.Metaspace(), special + [f"<0x{byte:02X}>" for byte in range(256)])
    start = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **FLAGS, "special": True}
            for index, token in enumerate(special)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": start,
            "pair": [*start, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            **model,
        },
    }
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    return model_type, content, {**names, "tokenizer_class": named, **config}


def llama():
    """As LlamaTokenizer saves it."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    config = {"add_prefix_space": None, "clean_up_tokenization_spaces": False}
    return sentencepiece("llama", "LlamaTokenizer", None, metaspace, None, **config)


def with_prefix(model_type="mistral", named="LlamaTokenizer"):
    """As Llama 2 and the first Mistral are shipped."""
    normalizers = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    normalizer = {"type": "Sequence", "normalizers": normalizers}
    return sentencepiece(model_type, named, normalizer, None, "<unk>", legacy=True)


def write(folder, model_type, content, config, files=()):
    files = {
        "tokenizer.json": content,
        "tokenizer_config.json": config,
        "config.json": {"model_type": model_type},
        **dict(files),
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@pytest.fixture
def save(tmp_path):
    def save(model_type="llama", template="<s> $A", edit=None, files=(), **config):
        content = byte_level(template)
        if edit is not None:
            edit(content)
        return write(tmp_path, model_type, content, {**CONFIG, **config}, files)

    return save


def check_ids(folder, model_type, light):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer([folder], model_type)
    assert isinstance(tokenizer, tokens._LightTokenizer) == light
    theirs = AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        for special in (True, False):
            for most in (3, 5, 512):
                options = {"add_special_tokens": special, "truncation": True, "max_length": most}
                expected = theirs(text, **options)["input_ids"]
                assert tokenizer.encode(text, most, special) == expected, (text, most, special)
                assert len(expected) <= most


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>", "$A </s>"])
def test_light_ids_are_those_of_transformers(save, template):
    check_ids(save(template=template), "llama", light=True)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("mistral", {}),
        ("qwen3", {"tokenizer_class": "TokenizersBackend"}),
        ("llama", {"truncation_side": "left", "model_max_length": 4, "padding_side": "left"}),
        ("llama", {"add_prefix_space": True, "add_bos_token": False}),
        ("llama", {"pad_token": added("</s>"), "extra_special_tokens": ["<s>"]}),
    ],
)
def test_light_ids_under_other_settings(save, model_type, config):
    check_ids(save(model_type, **config), model_type, light=True)


SHIPPED = [
    pytest.param(qwen2(), id="qwen2"),
    pytest.param(qwen2("qwen2", "PreTrainedTokenizerFast"), id="qwen2-generic"),
    pytest.param(qwen2("qwen3"), id="qwen3"),
    pytest.param(llama(), id="llama"),
    pytest.param(with_prefix(), id="mistral"),
    pytest.param(with_prefix("mistral", "LlamaTokenizerFast"), id="mistral-fast"),
]


@pytest.fixture(scope="module", params=SHIPPED)
def both(request, tmp_path_factory):
    """A tokenizer loaded the light way, and by transformers."""
    from transformers import AutoTokenizer

    folder = write(tmp_path_factory.mktemp("shipped"), *request.param)
    light = load_tokenizer([folder], request.param[0])
    assert isinstance(light, tokens._LightTokenizer)
    return light, AutoTokenizer.from_pretrained(str(folder))


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join))
@settings(max_examples=300)
def test_light_ids_of_shipped_files(both, text):
    ours, theirs = both
    for special in (True, False):
        for most in (4, 512):
            options = {"add_special_tokens": special, "truncation": True, "max_length": most}
            assert ours.encode(text, most, special) == theirs(text, **options)["input_ids"]


def test_the_demo_takes_the_light_path():
    check_ids(CHECKPOINTS / BASE, "qwen2", light=True)


def set_in(content, *path):
    """Set what the path but its last leads to."""
    *parents, key, value = path
    for parent in parents:
        content = content[parent]
    content[key] = value


@pytest.mark.parametrize(
    ("shipped", "path"),
    [
        (qwen2, ("normalizer", None)),
        (qwen2, ("normalizer", "type", "NFKC")),
        (qwen2, ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", r"\s+")),
        (qwen2, ("pre_tokenizer", "pretokenizers", 0, "behavior", "Removed")),
        (qwen2, ("pre_tokenizer", "pretokenizers", 1, "use_regex", True)),
        (qwen2, ("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True)),
        (qwen2, ("pre_tokenizer", {"type": "ByteLevel", **LEVEL})),
        (qwen2, ("model", "ignore_merges", True)),
        (qwen2, ("model", "unk_token", "!")),
        (qwen2, ("model", "byte_fallback", True)),
        (qwen2, ("added_tokens", 3, "lstrip", True)),
        (qwen2, ("added_tokens", 0, "content", "<other>")),
        (llama, ("normalizer", {"type": "NFC"})),
        (llama, ("pre_tokenizer", "prepend_scheme", "always")),
        (llama, ("pre_tokenizer", "split", True)),
        (llama, ("model", "fuse_unk", False)),
        (llama, ("model", "byte_fallback", False)),
        (llama, ("model", "unk_token", "<unk>")),
    ],
)
def test_another_pipeline_is_left_to_transformers(tmp_path, shipped, path):
    model_type, content, config = shipped()
    set_in(content, *path)
    check_ids(write(tmp_path, model_type, content, config), model_type, light=False)


@pytest.mark.parametrize(
    ("shipped", "changes", "files"),
    [
        (qwen2, {"add_prefix_space": True}, {}),
        (qwen2, {"added_tokens_decoder": {}}, {}),
        (qwen2, {"auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}, {}),
        (qwen2, {"tokenizer_class": "LlamaTokenizerFast"}, {}),
        (llama, {"add_prefix_space": False}, {}),
        (llama, {"legacy": True}, {}),
        (llama, {"bos_token": "<bos>"}, {}),
        (llama, {}, {"added_tokens.json": {"</s>": 2}}),
        (with_prefix, {}, {"tekken.json": {}}),
        (lambda: with_prefix("llama"), {}, {}),
    ],
)
def test_other_settings_are_left_to_transformers(tmp_path, shipped, changes, files):
    model_type, content, config = shipped()
    folder = write(tmp_path, model_type, content, config | changes, files)
    check_ids(folder, model_type, light=False)


def test_added_tokens_out_of_order_are_left_to_transformers(tmp_path):
    model_type, content, config = qwen2()
    content["added_tokens"].reverse()
    check_ids(write(tmp_path, model_type, content, config), model_type, light=False)


def test_the_light_path_imports_neither_transformers_nor_jax(save, tmp_path_factory):
    code = (
        "import sys, pathlib; from recall_jax.inputs.tokens import load_tokenizer; "
        "load = lambda name, kind: load_tokenizer([pathlib.Path(name)], kind); "
        "ids = [load(*x).encode('hello', 9, True) for x in zip(sys.argv[1::2], sys.argv[2::2])]; "
        "assert all(ids) and not {'transformers', 'jax', 'torch'} & set(sys.modules), ids"
    )
    shipped = write(tmp_path_factory.mktemp("shipped"), *qwen2())
    pairs = (str(save()), "llama", str(shipped), "qwen2", str(CHECKPOINTS / BASE), "qwen2")
    subprocess.run([sys.executable, "-c", code, *pairs], check=True)


def test_truncation_and_padding_that_the_file_brings(save):
    def edit(content):
        truncation = {"max_length": 4, "strategy": "LongestFirst", "stride": 1}
        content["truncation"] = {**truncation, "direction": "Left"}
        padding = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
        content["padding"] = {"strategy": {"Fixed": 10}, "pad_to_multiple_of": None, **padding}

    check_ids(save(edit=edit), "llama", light=True)


@pytest.mark.parametrize(
    ("model_type", "config", "files"),
    [
        ("qwen2", {}, {}),
        ("llama", {"tokenizer_class": "LlamaTokenizerFast"}, {}),
        ("llama", {"tokenizer_class": None}, {}),
        ("llama", {"add_eos_token": True}, {}),
        ("llama", {"split_special_tokens": True}, {}),
        ("llama", {"pad_token": "<pad>"}, {}),
        ("llama", {"additional_special_tokens": ["<s>", added("<pad>")]}, {}),
        ("llama", {"added_tokens_decoder": {"300": added("<pad>")}}, {}),
        ("llama", {}, {"special_tokens_map.json": {"pad_token": added("<pad>")}}),
        ("llama", {}, {"added_tokens.json": {"<pad>": 300}}),
    ],
)
def test_what_transformers_would_change_is_left_to_it(save, model_type, config, files):
    check_ids(save(model_type, files=files, **config), model_type, light=False)


def test_truncation_keeps_the_closing_token(save):
    tokenizer = load_tokenizer([save(template="<s> $A </s>")], "llama")
    assert len(tokenizer.encode(TEXTS[4], 512, True)) > 5
    ids = tokenizer.encode(TEXTS[4], 5, True)
    assert len(ids) == 5 and (ids[0], ids[-1]) == (0, 1)
    whole = tokenizer.encode(TEXTS[4], 512, False)
    assert ids[1:-1] == whole[:3] and tokenizer.encode(TEXTS[4], 5, False) == whole[:5]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # the light path, and transformers
def test_of_a_text_far_too_long_the_end_is_not_tokenised(save, side, model_type, monkeypatch):
    folder = save(model_type, template="<s> $A </s>", truncation_side=side)
    tokenizer = load_tokenizer([folder], model_type)
    text = "".join(f" word{number}" for number in range(40_000))
    monkeypatch.setattr(tokens, "_part", lambda text, most, side: text)
    whole = tokenizer.encode(text, 60, True)
    monkeypatch.undo()
    assert len(whole) == 60 and tokenizer.encode(text, 60, True) == whole
    assert len(tokens._part(text, 60, side)) == tokens.most_characters(60) < len(text) / 4
    assert tokens._part(text, tokens.UNLIMITED, side) == text


def test_chat_text_is_the_template_s(save):
    folder = save(chat_template=TEMPLATE)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    for tokenizer in (load_tokenizer([folder], "llama"), load_tokenizer([folder], "qwen2")):
        text = tokenizer.chat_text(messages)
        assert text == "<s>user: hi</s><s>assistant: ho</s>"
        ids = tokenizer.encode(text, 512, False)
        assert ids[0] == 0 and ids[-1] == 1 and ids.count(0) == 2


@pytest.mark.parametrize("messages", [["hi"], [{"role": "user"}, 3]])
def test_a_template_that_fails_is_one_line(save, messages):
    template = "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}"
    tokenizer = load_tokenizer([save(chat_template=template)], "llama")
    with pytest.raises(InputError, match=r"^the chat template of .* failed: [^\n]*$"):
        tokenizer.chat_text(messages)


def test_no_chat_template(save):
    with pytest.raises(InputError, match="has no chat template"):
        load_tokenizer([save()], "llama").chat_text([{"role": "user", "content": "hi"}])


def test_the_first_folder_that_has_a_tokenizer(save, tmp_path):
    folder = save(template=None)
    empty = tmp_path / "adapter"
    empty.mkdir()
    assert load_tokenizer([empty, folder], "llama").encode("hello", 9, True)
    with pytest.raises(InputError, match=r"adapter has no tokenizer: put tokenizer\.json"):
        load_tokenizer([empty], "llama")


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_broken_tokenizer_is_one_line(save, model_type):
    folder = save(model_type, files={"tokenizer.json": {"version": "1.0"}})
    with pytest.raises(InputError, match=r"^cannot (read|load) [^\n]*$") as caught:
        load_tokenizer([folder], model_type)
    assert str(folder) in str(caught.value)


def test_a_broken_tokenizer_config_is_named(save):
    folder = save()
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer([folder], "llama")


def test_chat_texts_of_known_templates_are_those_of_transformers(save):
    from transformers import AutoTokenizer

    chat = [
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nho"},
        {"role": "user", "content": "half \ud800 a pair"},
    ]
    for template in (QWEN3, CHATML, GEMMA, TEMPLATE, "{{ messages[2].content | tojson }}"):
        folder = save(chat_template=template)
        theirs = AutoTokenizer.from_pretrained(str(folder))
        for prompt in (False, True):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            assert load_tokenizer([folder], "llama").chat_text(chat, prompt) == (
                theirs.apply_chat_template(chat, **options)
            )


def test_a_template_that_grows_without_end_is_one_line(save):
    tokenizer = load_tokenizer([save(chat_template="{{ 'x' * 10 ** 10 }}")], "llama")
    with pytest.raises(InputError, match=r"^the chat template of .* failed: it needs more than"):
        tokenizer.chat_text([{"role": "user", "content": "hi"}])
