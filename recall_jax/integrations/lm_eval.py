"""Evaluate models with EleutherAI's lm-evaluation-harness.

    from lm_eval import simple_evaluate
    from recall_jax.integrations.lm_eval import RecallLM

    simple_evaluate(RecallLM("merged"), tasks=["sciq"])

Texts are tokenised and scored as by the harness's `hf` model.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from recall_jax.checkpoint.companions import has_tokenizer
from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.errors import InputError, brief
from recall_jax.evaluation.likelihood import log_likelihoods, token_nll
from recall_jax.evaluation.resident import load_resident
from recall_jax.evaluation.stop_strings import before_any, stops_at
from recall_jax.foreign.process import ForeignError, run_limited
from recall_jax.generation.generate import generate

try:
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]
except ImportError as error:
    raise InputError(
        "recall_jax.integrations.lm_eval needs lm-evaluation-harness: pip install lm_eval"
    ) from error

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_INERT = {"num_beams": 1, "repetition_penalty": 1.0}


class RecallLM(TemplateLM):
    """Answer the harness's requests; see `lm_eval.api.model.LM` for their semantics.

    `max_length`, by default that of the config, is the largest number of tokens fed: longer
    contexts lose their beginning. `seed` is for tasks that sample. Attributes of the config in
    `ignore_config` may be unknown.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: DTypeLike = jnp.float32,
        seed: int = 0,
        ignore_config: Collection[str] = (),
    ) -> None:
        """Load a model by a name as in recipes; raises InputError as `load_resident` does."""
        import transformers

        super().__init__()
        resident = load_resident(model, ignore_config)
        folders = filter(has_tokenizer, open_checkpoint(model).tokenizer_folders)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(next(folders)), local_files_only=True, trust_remote_code=False
        )
        self.max_length = max_length or resident.max_length
        self.max_gen_toks = max_gen_toks
        self._name, self._seed, self._decoder = model, seed, resident.tokenizer
        self._ends = resident.eos_token_ids
        self._model = (resident.arch, jax.device_put(resident.params))
        self._options: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype}

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text, that of the tokenizer if it has one."""
        token: int | None = self.tokenizer.eos_token_id
        return self._ends[0] if token is None else token

    @property
    def prefix_token_id(self) -> int:
        """Return the token that precedes a text without context."""
        token: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        """Return a name for the harness's cache of requests."""
        return self._name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Format messages as one text; without a generation prompt the last one stays open."""
        try:
            text = run_limited(
                "chat",
                template=self.tokenizer.get_chat_template(),
                tokens=self.tokenizer.special_tokens_map,
                messages=chat_history,
                prompt=add_generation_prompt,
                open_end=not add_generation_prompt,
            )
        except (ValueError, ForeignError) as error:
            raise InputError(f"the chat template of {self._name} failed: {brief(error)}") from error
        return str(text)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenise a text; by default with special tokens unless it begins with one."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not string.startswith(prefix)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return (ln p, whether it is the greedy answer) of each continuation.

        A request is (texts, context tokens, continuation tokens).
        """
        contexts, continuations, num_truncated = [], [], 0
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens, but {self._name} takes "
                    f"{self.max_length}: give a larger max_length"
                )
            # The last token of a row is not fed.
            room = self.max_length + 1 - len(continuation)
            num_truncated += len(context) > room
            contexts.append(context[-room:])
            continuations.append(continuation)
        _warn_of_truncation(num_truncated, self.max_length)
        sums, is_greedy, _ = log_likelihoods(*self._model, contexts, continuations, **self._options)
        answers = list(zip(sums.tolist(), is_greedy.tolist(), strict=True))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return ln p of texts, each after the prefix token; long texts are split into windows."""
        nll, _ = token_nll(
            *self._model,
            [self.tok_encode(request.args[0]) for request in requests],
            max_length=self.max_length,
            prefix_token_id=self.prefix_token_id,
            **self._options,
        )
        answers: list[float] = (-nll).tolist()
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated after each context, up to the first of its stop strings.

        Raises:
            InputError: for a generation argument that is not supported.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        answers = [""] * len(requests)
        for indices in groups.values():
            arguments = _read_arguments(requests[indices[0]].args[1], self.max_gen_toks)
            texts = [requests[index].args[0] for index in indices]
            for index, answer in zip(indices, self._answers(texts, arguments), strict=True):
                answers[index] = answer
                self.cache_hook.add_partial("generate_until", requests[index].args, answer)
        return answers

    def _answers(self, texts: Sequence[str], arguments: "_Arguments") -> list[str]:
        room = self.max_length - arguments.max_new_tokens
        if room < 1:
            raise InputError(
                f"{arguments.max_new_tokens} new tokens leave no room for a context within the "
                f"{self.max_length} tokens of {self._name}: ask for fewer, or give a larger "
                "max_length"
            )
        prompts = [self.tok_encode(text) or [self.prefix_token_id] for text in texts]
        _warn_of_truncation(sum(len(prompt) > room for prompt in prompts), room)
        # Special tokens are not decoded to text, so those in `until` stop by their ids.
        special = self.tokenizer.get_added_vocab()
        stops = (special[string] for string in arguments.until if string in special)
        ends = {*self._ends, self.eot_token_id, *stops}
        completions = generate(
            *self._model,
            [prompt[-room:] for prompt in prompts],
            max_new_tokens=arguments.max_new_tokens,
            eos_token_ids=sorted(ends),
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=self._seed,
            stop=stops_at(self._decoder, arguments.until),
            **self._options,
        )
        return [before_any(self._decoder.decode(tokens), arguments.until) for tokens in completions]


class _Arguments(NamedTuple):
    """Hold the arguments of a request for generation."""

    until: list[str]
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None


def _read_arguments(arguments: Mapping[str, Any], max_gen_toks: int) -> _Arguments:
    """Parse generation arguments with the harness's names and defaults.

    Decoding is greedy by default; `do_sample` alone samples at temperature 1.

    Raises:
        InputError: for an unknown argument, unless its value has no effect.
    """
    left = {key: value for key, value in arguments.items() if value is not None}
    until = left.pop("until", [])
    lengths = [left.pop(name) for name in _LENGTHS if name in left]
    samples = left.pop("do_sample", None)
    temperature = float(left.pop("temperature", 1.0 if samples else 0.0))
    top_k, top_p = left.pop("top_k", None), left.pop("top_p", None)
    if samples is False or not temperature:
        temperature, top_k, top_p = 0.0, None, None
    if unknown := [key for key, value in left.items() if _INERT.get(key) != value]:
        raise InputError(
            f"generation argument {', '.join(unknown)} is not supported: remove it from the task's "
            "generation_kwargs, or override it with gen_kwargs"
        )
    return _Arguments(
        until=[until] if isinstance(until, str) else [string for string in until if string],
        max_new_tokens=int((lengths or [max_gen_toks])[0]),
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
    )


def _warn_of_truncation(count: int, length: int) -> None:
    if count:
        message = "%d contexts do not fit into %d tokens and lost their beginning"
        logging.getLogger(__name__).warning(message, count, length)
