"""The shapes of rows that data sets have, through all that reads them."""

import json
from pathlib import Path

import chat_templates as templates
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from recall_jax.errors import InputError
from recall_jax.inputs.parts import row_parts
from recall_jax.inputs.samples import read_pool
from recall_jax.inputs.shapes import USUAL, Chat, Fields, Pair, row_content, used_columns
from recall_jax.inputs.tokens import load_tokenizer

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nName a {colour}.\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Translate.\n\n### Input:\nBonjour\n\n### Response:"
)
SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "2+2?"},
    {"from": "gpt", "value": "4"},
]


@pytest.mark.parametrize(
    ("row", "fields", "content"),
    [
        (
            {"instruction": "Name a {colour}.", "input": "", "output": "Red"},
            USUAL,
            Pair(ALPACA, "Red"),
        ),
        ({"instruction": "Name a {colour}.", "output": "Red"}, USUAL, Pair(ALPACA, "Red")),
        (
            {"instruction": "Name a {colour}.", "input": None, "output": "Red"},
            USUAL,
            Pair(ALPACA, "Red"),
        ),
        (
            {"instruction": "Translate.", "input": "Bonjour", "output": "Hello"},
            USUAL,
            Pair(ALPACA_INPUT, "Hello"),
        ),
        ({"conversations": SHAREGPT, "id": 3}, USUAL, Chat(SAID)),
        ({"conversations": SAID}, USUAL, Chat(SAID)),
        ({"messages": SHAREGPT}, USUAL, Chat(SAID)),
        ({"prompt": SAID[:2], "completion": SAID[2:]}, USUAL, Chat(SAID, 2)),
        ({"prompt": [], "completion": SAID}, USUAL, Chat(SAID, 0)),
        ({"text": "a", "conversations": SHAREGPT}, USUAL, "a"),
        ({"dialog": SHAREGPT}, Fields("dialog"), Chat(SAID)),
        ({"text": "x", "q": "a", "a": "b"}, Fields(prompt="q", completion="a"), Pair("a", "b")),
        ({"q": "a", "completion": "b"}, Fields(prompt="q"), Pair("a", "b")),
        ({"prompt": "a", "answer": "b"}, Fields(completion="answer"), Pair("a", "b")),
        (
            {"instruction": "a", "input": "x", "output": "b"},
            Fields(prompt="instruction", completion="output"),
            Pair("a", "b"),
        ),
        ({"asked": SAID[:2], "said": SAID[2:]}, Fields(None, "asked", "said"), Chat(SAID, 2)),
    ],
)
def test_what_a_row_says(row, fields, content):
    assert row_content(row, "here", fields) == content
    # what is looked at is all that is needed
    used = used_columns([*row, "other"], fields)
    assert "other" not in used
    assert row_content({name: row[name] for name in used}, "here", fields) == content


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"instruction": 3, "output": "b"}, USUAL, "'instruction' holds int, not text"),
        ({"instruction": "a", "output": "b", "input": 3}, USUAL, "'input' holds int, not text"),
        ({"instruction": "a", "input": "b"}, USUAL, "neither text.*instruction and output"),
        ({"conversations": "hello"}, USUAL, "conversations is no list of messages"),
        ({"conversations": ["hello"]}, USUAL, "message 0 of conversations is no object"),
        ({"messages": [SAID[0], 7]}, USUAL, "message 1 of messages is no object"),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            USUAL,
            "message 0 of conversations: from is 'alien', and must be, with a value, one of human",
        ),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, USUAL, r"from is \['gpt'\]"),
        ({"conversations": [{"from": "gpt"}]}, USUAL, "with a value"),
        ({"prompt": SAID, "completion": "b"}, USUAL, "'prompt' holds list, not text"),
        ({"prompt": "a", "completion": SAID}, USUAL, "'completion' holds list, not text"),
        ({"prompt": "a", "b": "c"}, Fields(None, "q", "b"), r"has no field 'q' \(it has prompt, b"),
        ({"q": "a"}, Fields(prompt="q"), "has no field 'completion'"),
        ({"a\x1b[31m": 1}, USUAL, r"it has a\\x1b\[31m\)"),
        ({str(n): 1 for n in range(1000)}, USUAL, r"18, 19, …\)"),
    ],
)
def test_a_row_that_says_nothing(row, fields, message):
    with pytest.raises(InputError, match=f"^here.*{message}") as caught:
        row_content(row, "here", fields)
    assert len(str(caught.value)) < 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    names = ["<s>", "</s>", "\n", *map(chr, range(32, 127))]
    vocabulary = {name: index for index, name in enumerate(names)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    made.chat_template = templates.QWEN3
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(folder)
    return load_tokenizer([folder], "qwen2")


def test_of_a_prompt_of_messages_nothing_is_learnt(tokenizer):
    more = [*SAID, {"role": "user", "content": "3+3?"}]
    row = {"prompt": more, "completion": [{"role": "assistant", "content": "6"}]}
    parts = row_parts(row, "row", tokenizer).parts
    assert [text for text, counts in parts if counts] == ["<think>\n\n</think>\n\n6<|im_end|>\n"]
    whole = row_parts({"messages": [*more, *row["completion"]]}, "row", tokenizer).parts
    assert "".join(text for text, _ in parts) == "".join(text for text, _ in whole)
    assert next(text for text, counts in whole if counts) == "4<|im_end|>\n"


def test_every_shape_is_a_sample(tokenizer, tmp_path):
    rows = [
        {"conversations": SHAREGPT},
        {"messages": SAID},
        {"prompt": SAID[:2], "completion": SAID[2:]},
        {"instruction": "Translate.", "input": "Bonjour", "output": "Hello"},
    ]
    path = Path(tmp_path) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = read_pool(path, tokenizer, max_tokens=999, pool=9, seed=0)
    assert samples.texts[0] == samples.texts[1] == samples.texts[2]
    assert samples.texts[3] == ALPACA_INPUT + "Hello"
    assert samples.typical_rows() == [{**row, "row": index} for index, row in enumerate(rows)]
