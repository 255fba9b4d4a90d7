"""Patterns and templates of others run within limits, and honest ones give what they gave."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from toys import make_tokenizer

from recall_jax.foreign import process
from recall_jax.foreign.process import ForeignError, run_limited

pytestmark = pytest.mark.timeout(60)

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def render(template: str) -> str:
    return run_limited("chat", template=template, tokens={}, messages=MESSAGES, prompt=False)


def test_a_template_that_goes_on_is_ended():
    loops = "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2
    with pytest.raises(ForeignError, match="takes more than 2 seconds"):
        render(loops)
    assert render("{{ messages[0].content }}") == "hi"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{{ ('x' * 10 ** 8) ~ 'y' }}",
        "{{ 'x'.ljust(10 ** 12) }}",
        "{{ '%1000000000d' % 1 }}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10 ** 9) }}",
    ],
)
def test_a_template_that_grows_is_refused(template):
    with pytest.raises(ForeignError, match=r"more than|too big|recursion") as caught:
        render(template)
    assert "\n" not in str(caught.value)


def test_the_templates_of_tasks_are_held_to_the_same_limits():
    for asked in ({"template": "{{ 'x' * 10 ** 10 }}"}, {"expression": "'x' * 10 ** 10"}):
        with pytest.raises(ForeignError, match="more than"):
            run_limited("rendered" if "template" in asked else "evaluated", row={}, **asked)


def test_what_a_pattern_matches_is_what_python_matches():
    patterns, names = ["(a|b)+$", "x"], ["ab", "abc", "xyz", "b"]
    assert run_limited("matching", patterns=patterns, names=names) == [0, None, 1, 0]
    with pytest.raises(ForeignError, match="recursion"):
        run_limited("matching", patterns=["(" * 5000], names=names)
    assert run_limited("matching", patterns=["((a{1000}){1000}){1000}"], names=names) == [None] * 4


@pytest.mark.parametrize("options", [{}, {"prompt": True}, {"open_end": True}])
def test_a_chat_is_what_transformers_makes_of_it(options):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}{{ strftime_now('%Y') | length }}"
    )
    theirs = tokenizer.apply_chat_template(
        MESSAGES,
        tokenize=False,
        add_generation_prompt=options.get("prompt", False),
        continue_final_message=options.get("open_end", False),
    )
    tokens = tokenizer.special_tokens_map
    asked = {"prompt": False, **options}
    ours = run_limited(
        "chat", template=tokenizer.chat_template, tokens=tokens, messages=MESSAGES, **asked
    )
    assert ours == theirs and "hi<eos>" in ours


def test_threads_ask_in_turn():
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda k=k: found.append(render(f"{{{{ {k} }}}}")))
        for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [str(k) for k in range(8)]


def test_a_question_that_is_given_up_is_not_answered_later(monkeypatch):
    worker = process._worker()

    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker._process.stdout, "readline", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        render("first")
    monkeypatch.undo()
    assert render("second") == "second"


def test_nothing_is_left_when_we_end():
    program = (
        "from recall_jax.foreign.process import _worker, run_limited\n"
        "run_limited('matching', patterns=['a'], names=['a'])\n"
        "print(_worker()._process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not Path(f"/proc/{done.stdout.strip()}").exists()
