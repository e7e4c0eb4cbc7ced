"""Which items a model knows already: tuning on these teaches how to answer, tuning on the others teaches new facts.

An item is known if the model gives its answer in at least one of four samples at temperature 0.5: as it continues the item's
statement, or, where there is none, as it answers the question after a worked example (another item's question with its answer, which
shows the form that is wanted). The second follows Gekhman et al. 2024 (arXiv 2405.05904), who call an item unknown if no sample under
several prompts of worked examples is right; they draw more samples, under more prompts. A statement asks in the words of ordinary
text, so that a model that knows an answer but evades questions is not taken for ignorant; worked examples alone do not change that in
small models. Controlled for: the form of the answer, and copying, since the example's answer is another one. Not controlled for:
guessing. Where few answers are possible, a model that knows nothing gives the right one now and then; items that were never stated
show how often.

A sample's noise comes from the seed and its own prompt, so that it depends neither on the batch nor on the other items.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from finetune.encoding import CHAT, answer_space, prompt_text
from finetune.items import Item, Turn
from probes.knowledge.readouts import Answer, Progress, continuations
from proxytune.content import content_key
from proxytune.errors import UserError
from proxytune.modeling import ProxyTunedForCausalLM

SAMPLES = 4
TEMPERATURE = 0.5
SEPARATOR = "\n\n"  # between the worked example and the question, in plain text


@dataclass(frozen=True)
class Recall:
    """Whether the model knows an item, and its samples; there are none where the item says itself whether it is familiar."""

    known: bool
    samples: tuple[str, ...] = ()


def recall(
    model: ProxyTunedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    prompts: Sequence[str | None],
    *,
    seed: int,
    new_tokens: int,
    batch_size: int,
    judged: Callable[[str, Item], Answer],
    progress: Progress = lambda samples_done: None,
) -> list[Recall]:
    """What the current mixture knows. `prompts` are those of `recall_prompts`; an item without one is as familiar as it says.

    `judged` says whether a sample is right, such as `judge_words`. A plain-text sample ends where a new example would begin. Raises
    `UserError` for a prompt that leaves no room for the answer in some member's window.
    """
    asked = [(item, prompt) for item, prompt in zip(items, prompts, strict=True) if prompt is not None]
    rows = [(item, prompt, number) for item, prompt in asked for number in range(SAMPLES)]
    texts = continuations(
        model,
        tokenizer,
        [prompt for _, prompt, _ in rows],
        [item.question for item, _, _ in rows],
        new_tokens=new_tokens,
        batch_size=batch_size,
        processor=lambda indices: _Noise([_generator(seed, *rows[index][1:]) for index in indices]),
        progress=progress,
    )
    said = iter([text.split(SEPARATOR)[0] for text in texts])
    found = []
    for item, prompt in zip(items, prompts, strict=True):
        samples = () if prompt is None else tuple(next(said) for _ in range(SAMPLES))
        found.append(Recall(bool(item.familiar) if prompt is None else any(judged(text, item).right for text in samples), samples))
    return found


def recall_prompts(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, prompt: str, ending: str) -> list[str | None]:
    """Each item's statement, or its question after a worked example, in the template `prompt`; None for an item that says itself whether
    it is familiar.

    `ending` follows an answer in plain text. In a chat the example is an earlier turn. Raises `UserError` where there is no example.
    """
    return [
        (None if item.familiar is not None else item.statement) if example is None else _after_example(item, example, tokenizer, prompt, ending)
        for item, example in zip(items, worked_examples(items), strict=True)
    ]


def worked_examples(items: Sequence[Item]) -> list[Item | None]:
    """For each item the next one, going round, of another unit and with another answer: of the same choices where there is one.

    None for an item with a statement, and for one that says itself whether it is familiar. Raises `UserError` where there is no such item.
    """
    alike: dict[tuple[str, ...], list[Item]] = {}
    places = []
    for item in items:
        group = alike.setdefault(item.choices, [])
        places.append(len(group))
        group.append(item)
    found: list[Item | None] = []
    for place, item in enumerate(items):
        if item.familiar is not None or item.statement is not None:
            found.append(None)
            continue
        others = chain(_around(alike[item.choices], places[place]), _around(items, place))
        example = next((other for other in others if _unit(other) != _unit(item) and other.answer != item.answer), None)
        if example is None:
            raise UserError(
                f"items: no training item can be the worked example of {item.question!r}, which must have another unit and answer; "
                "add one, or say familiar: true or false in every item"
            )
        found.append(example)
    return found


def judge_words(text: str, item: Item) -> Answer:
    """Whether the words of the answer stand in the text, anywhere: as whole words, in any case. Unparsed: the text is empty."""
    words, answer = (" ".join(each.casefold().split()) for each in (text, item.answer))
    return Answer(text, re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", words) is not None, not words)


def _unit(item: Item) -> str:
    return item.unit or item.question


def _around(items: Sequence[Item], place: int) -> Iterator[Item]:
    """The other items, from the one after this place on, going round."""
    return (items[(place + step) % len(items)] for step in range(1, len(items)))


def _after_example(item: Item, example: Item, tokenizer: PreTrainedTokenizerBase, prompt: str, ending: str) -> str:
    if prompt != CHAT:
        answered = f"{prompt_text(example, tokenizer, prompt)}{answer_space(prompt)}{example.said}{ending}"
        return f"{answered}{SEPARATOR}{prompt_text(item, tokenizer, prompt)}"
    system = [turn for turn in item.turns if turn.role == "system"]
    shown = [turn for turn in example.turns if turn.role != "system"]
    answered_turns = [Turn(role="user", content=example.question), Turn(role="assistant", content=example.said)]
    turns = (*system, *shown, *answered_turns, *(turn for turn in item.turns if turn.role != "system"))
    return prompt_text(item.model_copy(update={"turns": turns}), tokenizer, prompt)


def _generator(seed: int, prompt: str, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(content_key(seed=seed, prompt=prompt, sample=number)[:15], 16))


class _Noise(LogitsProcessor):
    """Makes greedy decoding draw at the temperature: the largest of logits / temperature + Gumbel noise is a sample of the softmax.

    Each row has a generator of its own.
    """

    def __init__(self, generators: Sequence[torch.Generator]):
        self._generators = generators

    def __call__(self, input_ids: Int[Tensor, "rows _"], scores: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
        waits = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self._generators])
        return scores / TEMPERATURE - waits.log().to(scores)
