"""Forward passes of members: which members share a pass, what they read, and on which device.

Members that share weights through LoRA adapters are rows of one pass. Members on different devices run at the same time.
A member with a vocabulary of its own reads its own tokens; its distribution is translated to the mixture's tokens.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from proxytune.cache import MixtureCache, can_stack, stacked
from proxytune.member import Adapter
from proxytune.padding import positions_of
from proxytune.prompts import OwnPrompts, Reading
from proxytune.token_map import TokenMap


class Reader(NamedTuple):
    """What a forward pass needs of a member."""

    name: str
    model: PreTrainedModel
    adapter: Adapter | None
    token_map: TokenMap | None
    takes_positions: bool

    @property
    def device(self) -> torch.device:
        """The device that token ids go to: that of the embeddings.

        Offloaded weights are on no device; accelerate's hook has the device that computes with them.
        """
        embeddings = self.model.get_input_embeddings()
        if not embeddings.weight.is_meta:
            return embeddings.weight.device
        return torch.device(embeddings._hf_hook.execution_device)


def grouped(readers: Sequence[Reader], own: Collection[str], cache: MixtureCache | None) -> list[list[Reader]]:
    """The readers in groups that are rows of one pass: readers of a group share weights and read the same prompt.

    `own` are the names of members with prompts of their own.
    """
    groups: dict[Any, list[Reader]] = {}
    for reader in readers:
        alone = reader.name in own or reader.token_map is not None or not (cache is None or can_stack(cache.members[reader.name]))
        groups.setdefault(reader.name if alone or reader.adapter is None else id(reader.adapter.switch), []).append(reader)
    return list(groups.values())


def run(
    together: Sequence[Reader], read: Reading, cache: MixtureCache | None, logits_to_keep: int | Int[Tensor, " kept"]
) -> dict[str, Float[Tensor, "batch kept_time rows"]]:
    """One forward pass of members that share weights, or of a single one; returns the logits of each, on the member's device."""
    first, count = together[0], len(together)
    own = None if cache is None else [cache.members[reader.name] for reader in together]
    options: dict[str, Any] = {"position_ids": read.position_ids} if first.takes_positions else {}
    mask = read.attention_mask
    if mask is not None and own is not None and isinstance(own[0], StaticCache):
        # Models that compute a bias from the mask (ALiBi) need it for every allocated column.
        mask = torch.nn.functional.pad(mask, (0, max(0, own[0].get_max_length() - mask.shape[1])))
    options |= {"input_ids": read.input_ids, "attention_mask": mask}
    options = {key: value if value is None else value.to(first.device).repeat(count, 1) for key, value in options.items()}
    with _through_adapters(together, len(read.input_ids)):
        output = first.model(
            **options,
            past_key_values=None if own is None else own[0] if count == 1 else stacked(own),
            use_cache=own is not None,
            logits_to_keep=logits_to_keep,
        )
    return dict(zip((reader.name for reader in together), output.logits.chunk(count), strict=True))


def run_mapped(
    reader: Reader,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch all_time"],
    cache: MixtureCache | None,
    logits_to_keep: int | Int[Tensor, " kept"],
    prompts: OwnPrompts | None,
    pad: int,
) -> dict[str, Float[Tensor, "batch kept_time rows"]]:
    """One forward pass of a member with a vocabulary of its own; returns its log-probabilities of the mixture's tokens."""
    assert reader.token_map is not None
    name, begins = reader.name, attention_mask.shape[1] == input_ids.shape[1]
    own = prompts if prompts is not None and name in prompts.ids and begins else None
    skipped = 0 if own is None else own.columns
    ids, mask, ends = reader.token_map.read(input_ids[:, skipped:], attention_mask[:, -input_ids.shape[1] :][:, skipped:], pad)
    if own is not None:
        repeats, width = len(ids) // len(own.ids[name]), own.ids[name].shape[1]
        ids = torch.cat([own.ids[name].repeat_interleave(repeats, 0), ids], dim=1)
        mask = torch.cat([own.masks[name].repeat_interleave(repeats, 0), mask], dim=1)
        ends = torch.cat([torch.full_like(ids[:, :1], width - 1), ends + width], dim=1)
    if cache is not None:
        mask = cache.own_masks[name] = torch.cat([cache.own_masks[name], mask], dim=1) if name in cache.own_masks else mask
    options = {"input_ids": ids, "attention_mask": mask}
    if reader.takes_positions:
        options["position_ids"] = positions_of(mask)[:, -ids.shape[1] :]
    with _through_adapters([reader], len(ids)):
        output = reader.model(
            **{key: value.to(reader.device) for key, value in options.items()},
            past_key_values=None if cache is None else cache.members[name],
            use_cache=cache is not None,
        )
    ends = (ends[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else ends[:, -logits_to_keep:]).to(output.logits.device)
    return {name: reader.token_map.translate(output.logits.gather(1, ends[..., None].expand(-1, -1, output.logits.shape[-1])))}


def _through_adapters(together: Sequence[Reader], rows: int) -> contextlib.AbstractContextManager[None]:
    adapters = [reader.adapter for reader in together if reader.adapter is not None]
    return adapters[0].switch.rows([adapter.name for adapter in adapters for _ in range(rows)]) if adapters else contextlib.nullcontext()


def at_once(runs: Sequence[Callable[[], dict[str, Tensor]]], devices: Sequence[torch.device]) -> list[dict[str, Tensor]]:
    """The results of the runs. Runs on different devices happen at the same time, runs on one device in their order."""
    if len(set(devices)) == 1:
        return [run() for run in runs]
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def on(device: torch.device) -> list[tuple[int, dict[str, Tensor]]]:
        # Both modes are per thread and must be set again.
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return [(number, run()) for number, run in enumerate(runs) if devices[number] == device]

    with ThreadPoolExecutor(len(set(devices))) as pool:
        found = dict(pair for pairs in pool.map(on, dict.fromkeys(devices)) for pair in pairs)
    return [found[number] for number in range(len(runs))]
