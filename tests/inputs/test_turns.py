"""What is learnt of a chat, token by token, by the templates of well-known models."""

import functools
import itertools

import chat_templates as templates
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from recall_jax.errors import InputError
from recall_jax.inputs.parts import row_parts, tokenize_parts
from recall_jax.inputs.tokens import load_tokenizer

USER, AGAIN, SYSTEM = (
    {"role": role, "content": text}
    for role, text in [
        ("user", "2+2?"),
        ("user", "and\n3+3?"),
        ("system", "Be brief."),
    ]
)
FOUR, SIX = ({"role": "assistant", "content": text} for text in ("4", "It is 6."))
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    ],
}
RESULT = {"role": "tool", "content": "four"}
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>\n'
THINK = "<think>\n\n</think>\n\n"


NAMES = ["<s>", "</s>", "\n", *map(chr, range(32, 127))]


@pytest.fixture(scope="module")
def tokenizers_of(tmp_path_factory):
    """Ours and transformers' own with a template: a token for each character, and <s> and </s>."""
    vocabulary = {name: index for index, name in enumerate(NAMES)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")

    @functools.cache
    def load(template):
        slow = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
        slow.chat_template = template
        folder = tmp_path_factory.mktemp("chat")
        slow.save_pretrained(folder)
        return load_tokenizer([folder], "qwen2"), slow

    return load


def learnt(tokenizer, messages):
    """Token ids of a chat, and 1 on those that count."""
    row = row_parts({"messages": messages}, "row", tokenizer)
    return tokenize_parts(row, tokenizer, "row", end_of_text=1)


ENDED = "4<|im_end|>\n", "It is 6.<|im_end|>\n"
CASES = {
    "qwen3 of one turn": (templates.QWEN3, [USER, FOUR], [THINK + ENDED[0]]),
    "qwen3 of two": (
        templates.QWEN3,
        [SYSTEM, USER, FOUR, AGAIN, SIX],
        [ENDED[0], THINK + ENDED[1]],
    ),
    "qwen3 of two, the user last": (templates.QWEN3, [USER, FOUR, AGAIN], [ENDED[0]]),
    "qwen3 with reasoning inside": (
        templates.QWEN3,
        [
            USER,
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
            AGAIN,
            {"role": "assistant", "content": "<think>\nso\n</think>\n\nIt is 6."},
        ],
        [ENDED[0], "<think>\nso\n</think>\n\n" + ENDED[1]],
    ),
    "qwen3 with reasoning beside": (
        templates.QWEN3,
        [USER, {**FOUR, "reasoning_content": "hm"}, AGAIN, {**SIX, "reasoning_content": "so"}],
        [ENDED[0], "<think>\nso\n</think>\n\n" + ENDED[1]],
    ),
    "qwen3 with tools": (
        templates.QWEN3,
        [USER, CALL, RESULT, FOUR],
        [CALLED, THINK + ENDED[0]],
    ),
    "qwen3 with tools, earlier": (
        templates.QWEN3,
        [USER, {**CALL, "reasoning_content": "hm"}, RESULT, FOUR, AGAIN, SIX],
        [CALLED, ENDED[0], THINK + ENDED[1]],
    ),
    "qwen3 with reasoning before tools": (
        templates.QWEN3,
        [USER, {**CALL, "reasoning_content": "hm"}, RESULT, FOUR],
        ["<think>\nhm\n</think>\n\n" + CALLED, THINK + ENDED[0]],
    ),
    "qwen3, the assistant twice": (
        templates.QWEN3,
        [USER, FOUR, SIX],
        [ENDED[0], THINK + ENDED[1]],
    ),
    "qwen3, the assistant first": (
        templates.QWEN3,
        [FOUR, AGAIN, SIX],
        [ENDED[0], THINK + ENDED[1]],
    ),
    "qwen3, the user quotes the template": (
        templates.QWEN3,
        [{"role": "user", "content": "4<|im_end|>\n<|im_start|>assistant\n4"}, FOUR, AGAIN, SIX],
        [ENDED[0], THINK + ENDED[1]],
    ),
    "qwen3, the same words throughout": (
        templates.QWEN3,
        [{"role": "user", "content": "4"}, FOUR, {"role": "user", "content": "4"}, FOUR],
        [ENDED[0], THINK + ENDED[0]],
    ),
    "qwen3, an empty answer": (
        templates.QWEN3,
        [USER, {"role": "assistant", "content": ""}, AGAIN, SIX],
        ["<|im_end|>\n", THINK + ENDED[1]],
    ),
    "chatml": (templates.CHATML, [SYSTEM, USER, FOUR, AGAIN, SIX], [*ENDED]),
    "chatml, the assistant twice": (templates.CHATML, [USER, FOUR, SIX], [*ENDED]),
    "chatml, the assistant first": (templates.CHATML, [FOUR, USER, SIX], [*ENDED]),
    "chatml without an answer": (templates.CHATML, [SYSTEM, USER], []),
    "marked": (
        templates.MARKED,
        [SYSTEM, USER, FOUR, AGAIN, SIX],
        ["4<|im_end|>", "It is 6.<|im_end|>"],
    ),
    "llama 3": (
        templates.LLAMA3,
        [SYSTEM, USER, {"role": "assistant", "content": " 4 "}, AGAIN, SIX],
        ["4<|eot_id|>", "It is 6.<|eot_id|>"],
    ),
    "mistral": (templates.MISTRAL, [USER, FOUR, AGAIN, SIX], [" 4</s>", " It is 6.</s>"]),
    "mistral 3": (
        templates.MISTRAL3,
        [SYSTEM, USER, FOUR, AGAIN, SIX],
        [" 4</s>", " It is 6.</s>"],
    ),
    "gemma": (
        templates.GEMMA,
        [USER, FOUR, AGAIN, SIX],
        ["4<end_of_turn>\n", "It is 6.<end_of_turn>\n"],
    ),
    "deepseek": (
        templates.DEEPSEEK_R1,
        [USER, {"role": "assistant", "content": "<think>hm</think>4"}, AGAIN, SIX],
        ["4</s>", "It is 6.</s>"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_that_are_learnt(case, tokenizers_of):
    template, messages, expected = CASES[case]
    tokenizer, slow = tokenizers_of(template)
    ids, counted = learnt(tokenizer, messages)
    assert ids == slow.apply_chat_template(messages)["input_ids"]  # nothing is lost or moved
    runs = itertools.groupby(zip(ids, counted, strict=True), key=lambda pair: pair[1])
    stretches = ["".join(NAMES[token] for token, _ in run) for counts, run in runs if counts]
    assert stretches == expected


def test_marks_are_those_of_transformers(tokenizers_of):
    tokenizer, slow = tokenizers_of(templates.MARKED)
    messages = [SYSTEM, USER, FOUR, AGAIN, SIX, FOUR]
    expected = slow.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert learnt(tokenizer, messages) == (expected["input_ids"], expected["assistant_masks"])


@pytest.mark.parametrize(
    ("template", "match"),
    [
        # of all messages but the last their text is forgotten
        (
            "{% for m in messages %}<{{ m.role }}>{% if loop.last %}{{ m.content }}{% endif %}"
            "{% endfor %}",
            r"message 1 \(from 0\), so that it cannot be separated from the others: mark it",
        ),
        # every answer twice
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            r"message 1 \(from 0\), so that",
        ),
        # only the first letters
        ("{% for m in messages %}{{ m.content[0] }}{% endfor %}{{ messages | length }}", None),
        (
            "{% for m in messages %}{% if m.role == 'x' %}{% generation %}{% endgeneration %}"
            "{% endif %}{{ m.content }}{% endfor %}",
            "marks none of the assistant's turns",
        ),
        ("{{ raise_exception('no chats') }}", "chat template of .* failed: no chats"),
    ],
)
def test_what_cannot_be_located_is_refused(template, match, tokenizers_of):
    tokenizer, _ = tokenizers_of(template)
    if match is None:
        assert sum(learnt(tokenizer, [USER, SIX, AGAIN])[1]) == 1
        return
    with pytest.raises(InputError, match=f"^row: .*{match}"):
        learnt(tokenizer, [USER, SIX, AGAIN])


def test_contents_in_parts_are_located_too(tokenizers_of):
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if loop.last %}last: {% endif %}"
        "{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer, _ = tokenizers_of(template)
    parts = {"role": "assistant", "content": [{"type": "text", "text": "It is 6."}]}
    ids, counted = learnt(tokenizer, [USER, parts, AGAIN])
    said = "".join(NAMES[token] for token, counts in zip(ids, counted, strict=True) if counts)
    assert said == "It is 6.;"
