"""Tokenizers: the ids that transformers gives, whichever way the file is read."""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from recall_jax.errors import InputError
from recall_jax.representations import tokens
from recall_jax.representations.tokens import load_tokenizer

TEXTS = (
    "hello world",
    "",
    "\n x  42 ",
    "a <s> b </s> c <pad> d",
    "the quick brown fox jumps over the lazy dog, twice: the quick brown fox jumps",
    "naïve 日本 🙂",
)
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
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


@pytest.fixture
def save(tmp_path):
    def save(model_type="llama", template="<s> $A", edit=None, files=(), **config):
        content = byte_level(template)
        if edit is not None:
            edit(content)
        files = {
            "tokenizer.json": content,
            "tokenizer_config.json": {**CONFIG, **config},
            "config.json": {"model_type": model_type},
            **dict(files),
        }
        for name, value in files.items():
            (tmp_path / name).write_text(json.dumps(value))
        return tmp_path

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


def test_the_light_path_imports_neither_transformers_nor_jax(save):
    code = (
        "import sys, pathlib; from recall_jax.representations.tokens import load_tokenizer; "
        "ids = load_tokenizer([pathlib.Path(sys.argv[1])], 'llama').encode('hello', 9, True); "
        "assert ids and not {'transformers', 'jax', 'torch'} & set(sys.modules), ids"
    )
    subprocess.run([sys.executable, "-c", code, str(save())], check=True)


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
