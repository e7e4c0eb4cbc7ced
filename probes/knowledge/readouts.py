"""Three read-outs of what a model knows.

`question`: asked in the tuned format, answered greedily. `statement`: the beginning of a pretraining sentence, continued
greedily. `choice`: the candidate with the highest log-probability per token after the statement; it depends least on style,
because the answer needs no format. Forgetting is measured with all three: a fact that only one of them misses was not forgotten
but is expressed differently.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from finetune.encoding import continuation_ids, prompt_ids
from finetune.items import Item
from proxytune.errors import UserError
from proxytune.mixture import Mixture
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.padding import left_padded
from proxytune.scoring import Request, score

Progress = Callable[[int], None]
# Removes thousands separators; a comma that ends a clause stays.
_SEPARATED = re.compile(r"(\d),(\d)")
# A minus after a word, a bracket or a digit is a subtraction; elsewhere it is a sign, also before a currency.
_NUMBER = re.compile(r"((?<![\w.)\]])-(?=\$?[\d.]))?\$?(\d*\.?\d+)")


@dataclass(frozen=True)
class Answer:
    """The answer to one item. `unparsed`: it is empty, or does not begin with a candidate; it counts as wrong.

    `tied`: k choices share the highest score, and `text` has all of them; `right` is then 1/k if the answer is one of them, else 0.
    """

    text: str
    right: bool | float
    unparsed: bool
    tied: bool = False


def continuations(
    model: ProxyTunedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    questions: Sequence[str],
    *,
    new_tokens: int,
    batch_size: int,
    processor: Callable[[Sequence[int]], LogitsProcessor] | None = None,
    progress: Progress = lambda prompts_done: None,
) -> list[str]:
    """What the current mixture says after each prompt, greedily, without space around it.

    `questions` name the prompts in error messages. `processor` gives what changes the logits of a batch, from the numbers of its
    prompts. Raises `UserError` for a prompt that leaves no room for the answer in some member's window.
    """
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    window = model.config.max_position_embeddings
    for question, ids in zip(questions, encoded, strict=True):
        if len(ids) + new_tokens > window:
            raise UserError(f"new_tokens: {question!r} has {len(ids)} tokens and may get {new_tokens} more, but the window is {window}; shorten it")
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        processors = LogitsProcessorList([] if processor is None else [processor(indices)])
        texts |= zip(indices, _generate(model, tokenizer, [encoded[index] for index in indices], new_tokens, processors), strict=True)
        progress(len(indices))
    return [texts[index] for index in range(len(prompts))]


def judge(text: str, item: Item) -> Answer:
    """Whether a text answers the item: it begins with the answer, and not with a longer candidate."""
    candidates = item.choices or (item.answer,)
    matching = [candidate for candidate in candidates if _begins(text, candidate)]
    said = max(matching, key=len, default=None)
    return Answer(text, said == item.answer, (said is None) if item.choices else not text.strip())


def judge_reply(text: str, item: Item) -> Answer:
    """Whether a text is the item's reply: it begins with it. Without a reply as `judge`. Unparsed: it names none of the choices."""
    if item.reply is None:
        return judge(text, item)
    named = any(re.search(rf"\b{re.escape(choice)}\b", text, re.IGNORECASE) for choice in item.choices)
    return Answer(text, _begins(text, item.reply), not named if item.choices else not text.strip())


def judge_number(text: str, item: Item) -> Answer:
    """Whether the last number of a text is that of the answer (as in GSM8K); a text without a number is unparsed.

    Raises `UserError` for an answer without a number.
    """
    said, wanted = last_number(text), last_number(item.answer)
    if wanted is None:
        raise UserError(f"answer: {item.answer!r} has no number; with answer: number every item needs one")
    return Answer(text, said is not None and float(said) == float(wanted), said is None)


def last_number(text: str) -> str | None:
    """The last number as it is written, without separators; None where there is none: 'is -$1,250.50.' gives '-1250.50', '16-3' gives '3'."""
    found = _NUMBER.findall(_SEPARATED.sub(r"\1\2", text))
    return "".join(found[-1]) if found else None


def choose(
    model: ProxyTunedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    prompts: Sequence[str],
    mixtures: Mapping[str, Mixture],
    *,
    batch_tokens: int,
    space: str = " ",
    progress: Progress = lambda choices_done: None,
) -> dict[str, list[Answer]]:
    """For every mixture, the choice with the highest mean log-probability per token. A tie of k counts 1/k (see `best_choices`).

    `space` is put between prompt and choice. Raises `UserError` for an item without choices, and for scores that are NaN.
    """
    encoded = {choice: tuple(continuation_ids(tokenizer, choice, space)) for choice in dict.fromkeys(each for item in items for each in item.choices)}
    requests, owners = [], []
    for item, prompt in zip(items, prompts, strict=True):
        if not item.choices:
            raise UserError(f"choices: the item {item.question!r} has none; forced choice needs them in every item")
        prefix = tuple(prompt_ids(tokenizer, prompt))
        requests += [Request(prefix, encoded[choice]) for choice in item.choices]
        owners.append(len(item.choices))
    lengths = torch.tensor([len(request.continuation) for request in requests])
    scores = score(model, requests, mixtures, batch_tokens=batch_tokens, progress=progress)
    answers: dict[str, list[Answer]] = {}
    for name, totals in scores.items():
        means = (totals / lengths).split(owners)
        answers[name] = [_chosen(item, values.tolist(), f"arm {name}") for item, values in zip(items, means, strict=True)]
    return answers


def best_choices(scores: Sequence[float], whose: str) -> list[int]:
    """The indices of the highest of an item's scores (log-probabilities): several where they are exactly equal.

    There is no tolerance: a model without a preference gives exactly equal scores, whatever the lengths of the choices, and scores
    of single tokens come from one row of logits. Of two nearly equal scores the higher one is the model's answer. A choice at -inf
    never wins. Raises `UserError`, beginning with `whose`, where a score is NaN or +inf, or all are -inf.
    """
    best = max(scores)
    if not all(score < math.inf for score in scores) or best == -math.inf:  # NaN is not below infinity
        shown = ", ".join(f"{score:g}" for score in scores[:8])
        raise UserError(f"{whose}: the choices' scores are {shown}; look at the arm's weights for NaN, or lower its coefficients")
    return [index for index, score in enumerate(scores) if score == best]


def _chosen(item: Item, scores: Sequence[float], arm: str) -> Answer:
    best = [item.choices[index] for index in best_choices(scores, f"{arm} at {item.question!r}")]
    return Answer(" / ".join(best), best.count(item.answer) / len(best), False, len(best) > 1)


def _generate(
    model: ProxyTunedForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], new_tokens: int, processors: LogitsProcessorList
) -> list[str]:
    input_ids, attention_mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens, "repetition_penalty": 1.0}
    output = model.generate(input_ids, attention_mask=attention_mask, logits_processor=processors, **settings)
    return [tokenizer.decode(row[input_ids.shape[1] :], skip_special_tokens=True).strip() for row in output]


def _begins(text: str, candidate: str) -> bool:
    text, candidate = text.strip().casefold(), candidate.strip().casefold()
    return text.startswith(candidate) and not text[len(candidate) : len(candidate) + 1].isalnum()
