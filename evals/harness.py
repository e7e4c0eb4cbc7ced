"""Mixtures in the lm-eval harness: a model class whose log-likelihoods and texts are ours, and its command line.

Few-shot prompts, chat templates, BOS and stop sequences are the harness's own; so is the cut of what is too long for the
window, only that it is counted and said.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM

from evals.generate import Sources, load_mixture
from evals.responses import Responses
from proxytune.content import content_key
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.mixture import Mixture, active, proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.scoring import Request, cut_to_window, score_greedily

TASKS = Path(__file__).parent / "tasks"
VERSION = 1  # of what a kept answer depends on in this file
logger = logging.getLogger("proxytune")


class ProxyLM(HFLM):
    """lm-eval's HF model with a mixture in the place of the model.

    Built by `--model_args base=…,expert=…,antiexpert=…,alpha=…` or by `of` from members that are loaded. `mixtures` are
    further rows to be answered in the same passes: their answers go into `cache`, where their own models find them. `cache` is a
    file of answers, keyed by weights, mixture and request; the harness's `use_cache`, which knows no model, is refused.
    Sampled texts are not kept. Not covered: coefficients that are functions together with a cache.
    """

    def __init__(
        self,
        base: str = "",
        expert: str | None = None,
        antiexpert: str | None = None,
        alpha: float = 1.0,
        device: str = "cpu",
        proxy_device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        batch_tokens: int = 2048,
        cache: str | None = None,
        threads: int | None = None,
        members: Mapping[str, Member] | None = None,
        mixture: Mixture | None = None,
        mixtures: Mapping[str, Mixture] | None = None,
        **options: Any,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        if members is None:
            if not base:
                raise UserError("model_args: the base is missing; give base=FOLDER, and for a proxy expert=… and antiexpert=…")
            model, loaded = load_mixture(Sources(base, expert, antiexpert, device, proxy_device, getattr(torch, dtype)), float(alpha))
            members, mixture = loaded, model.mixture
        else:
            mixture = proxy_tuning(float(alpha)) if mixture is None else mixture
            model = ProxyTunedForCausalLM(members, mixture)
        self._members, self._mixture, self._mixtures = members, mixture, {"": mixture} | dict(mixtures or {})
        self._batch_tokens = batch_tokens
        self._responses = None if cache is None else Responses(Path(cache))
        tokenizer = next(iter(members.values())).tokenizer
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device), backend="causal", **options)

    @classmethod
    def of(cls, members: Mapping[str, Member], mixture: Mixture, **options: Any) -> "ProxyLM":
        """Of members that are loaded already."""
        return cls(members=members, mixture=mixture, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        asked = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        asked, cut = cut_to_window(asked, self.max_length)
        if cut:
            logger.warning(
                "%d of %d requests are longer than the window of %d tokens; their beginnings were cut off", cut, len(asked), self.max_length
            )
        keys = [self._keys("loglikelihood", [list(request.prefix), list(request.continuation)]) for request in asked]
        answers = [self._kept(key) for key in keys]
        missing = [index for index, answer in enumerate(answers) if answer is None]
        scores = score_greedily(self.model, [asked[index] for index in missing], self._mixtures, batch_tokens=self._batch_tokens) if missing else {}
        for place, index in enumerate(missing):
            found = {name: [float(score.total[place]), bool(score.greedy[place])] for name, score in scores.items()}
            answers[index] = found[""]
            self._keep({keys[index][name]: answer for name, answer in found.items()})
        result = [(float(answer[0]), bool(answer[1])) for answer in answers if answer is not None]
        for (strings, _, _), answer in zip(requests, result, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return result

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        keys = [self._keys("generate", [request.args[0], request.args[1], self.max_length, self.max_gen_toks])[""] for request in requests]
        sampled = [bool(request.args[1].get("do_sample")) for request in requests]
        answers = [None if drawn else self._kept({"": key}) for key, drawn in zip(keys, sampled, strict=True)]
        missing = [index for index, answer in enumerate(answers) if answer is None]
        if missing:
            for index, text in zip(missing, super().generate_until([requests[index] for index in missing], disable_tqdm), strict=True):
                answers[index] = text
                if not sampled[index]:
                    self._keep({keys[index]: text})
        return [str(answer) for answer in answers]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: which weights, in which mixture."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.dtype), "mixture": self._identity(self._mixture)}

    def set_cache_hook(self, cache_hook: Any) -> None:
        if getattr(cache_hook, "dbdict", None) is not None:
            raise UserError("use_cache: its answers are kept by request alone and would be given for every model; use --model_args …,cache=FILE")
        super().set_cache_hook(cache_hook)

    def _identity(self, mixture: Mixture) -> Any:
        return [
            [name, self._members[name].fingerprint, value if isinstance(value, int | float) else repr(value)]
            for name, value in active(mixture).items()
        ]

    def _keys(self, kind: str, request: Any) -> dict[str, str]:
        """The key of a request under every mixture. Names do not count, and tokens, not texts, are what was asked."""
        if self._responses is None:
            return dict.fromkeys(self._mixtures, "")
        identities = {name: [part[1:] for part in self._identity(mixture)] for name, mixture in self._mixtures.items()}
        dtype = str(self.model.dtype)
        return {name: content_key(kind=kind, version=VERSION, dtype=dtype, model=identity, request=request) for name, identity in identities.items()}

    def _kept(self, keys: Mapping[str, str]) -> Any | None:
        return None if self._responses is None else self._responses.get(keys[""])

    def _keep(self, answers: Mapping[str, Any]) -> None:
        if self._responses is not None:
            self._responses.put(answers)


def run_harness(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, with `--model proxytune` and the tasks of `evals/tasks` known to it.

    Raises `UserError` for what the harness says is wrong with a value: a task or a model that there is not, say.
    """
    from lm_eval.__main__ import cli_evaluate

    model_registry.register("proxytune", target=ProxyLM)
    given = list(arguments)
    if given and given[0] == "run" and "--include_path" not in given:
        given += ["--include_path", str(TASKS)]
    if given and given[0] == "run" and "--device" not in given:
        given += ["--device", "cpu"]  # the harness would take cuda:0 without a look
    sys.argv = ["lm-eval", *given]
    try:
        cli_evaluate()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"lm-eval: {error}") from error
