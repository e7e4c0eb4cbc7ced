"""Mixtures in the lm-eval harness: a model class that computes log-likelihoods and texts with our code, and the command line.

Few-shot prompts, chat templates, BOS and stop sequences are the harness's own. Requests that are too long for the window are cut as in
the harness; in addition they are counted, with a warning.
"""

import copy
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length
from lm_eval.utils import simple_parse_args_string
from transformers import PreTrainedTokenizerBase

from evals.harness.arguments import Arguments, check_generation, read_arguments
from evals.harness.responses import Responses
from evals.mixtures import Sources, load_mixture
from proxytune.content import content_key
from proxytune.errors import UserError, brief
from proxytune.member import Member
from proxytune.mixture import Mixture, Rule, active, check_mixture
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.scoring import Request, cut_to_window, score_greedily

TASKS = Path(__file__).parent / "tasks"
THEIRS = {  # arguments of lm-eval's own class that have an effect on a loaded model
    *("batch_size", "max_batch_size", "max_length", "add_bos_token", "prefix_token_id"),
    *("think_end_token", "enable_thinking", "chat_template_args"),
}
VERSION = 1  # of everything in this file that a cached answer depends on
logger = logging.getLogger("proxytune")


class ProxyLM(HFLM):
    """lm-eval's HF model with a mixture instead of a single model.

    Built from `--model_args base=…,expert=…,antiexpert=…,alpha=…`, or by `of` from loaded members; the arguments are those of
    `Arguments`. `mixtures` are further mixtures that are answered in the same passes: their answers go into `cache`, where later
    runs find them. `cache` is a file of answers, keyed by weights, mixture and request. The harness's `use_cache` is refused,
    because its keys do not include the model. Sampled texts are not cached.

    Raises `UserError` for an argument that is unknown or has no effect on a mixture, and for models that cannot be loaded.
    """

    def __init__(self, /, **given: Any):
        wanted = read_arguments(given)
        if wanted.members is None or wanted.mixture is None:
            model, members = load_mixture(_sources(wanted), 1.0 if wanted.alpha is None else wanted.alpha)
        else:
            members, model = wanted.members, ProxyTunedForCausalLM(wanted.members, wanted.mixture)
        self._members, self._mixture, self._mixtures = members, model.mixture, {"": model.mixture} | (wanted.mixtures or {})
        for mixture in self._mixtures.values():
            check_mixture(mixture, members, model.config.vocab_size)
        _check_fit(wanted, model)
        tokenizer = _with_bos(next(iter(members.values())).tokenizer, wanted.add_bos_token)
        self._batch_tokens, self._max_gen_toks = wanted.batch_tokens, wanted.max_gen_toks
        self._responses = None if wanted.cache is None else Responses(Path(wanted.cache))
        if wanted.threads is not None:
            torch.set_num_threads(wanted.threads)
        theirs = wanted.model_dump(include=THEIRS, exclude_none=True)
        super().__init__(pretrained=model, tokenizer=tokenizer, device=str(model.device), backend="causal", **theirs)
        if self.prefix_token_id is None:
            raise UserError("prefix_token_id: the tokenizer has neither a BOS nor an EOS token to stand before a text; say which token does")

    @classmethod
    def of(cls, members: Mapping[str, Member], mixture: Mixture, **options: Any) -> "ProxyLM":
        """A model from members that are already loaded."""
        return cls(members=members, mixture=mixture, **options)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> "ProxyLM":
        """Called by the harness's command line. `--model_args` takes precedence over `--device`, `--batch_size` and their defaults."""
        return cls(**{name: value for name, value in (additional_config or {}).items() if value is not None} | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "ProxyLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def max_length(self) -> int:
        """The window that was set; otherwise the shortest of the windows that lm-eval would use for the members."""
        windows = [resolve_max_length(member.model.config, member.tokenizer) for member in self._members.values()]
        return self._max_length or min(windows)

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            raise UserError("enable_thinking: a task that scores given answers has no thinking; leave it out for such tasks")
        return super().loglikelihood(requests, disable_tqdm)

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
        for name, score in scores.items():
            if score.total.isnan().any():
                raise UserError(f"model: the mixture {name or 'that was asked for'} gives NaN as a log-probability; look at its members' weights")
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
        settings = [check_generation(request.args[1], self.max_gen_toks, self.max_length) for request in requests]
        for number, request in enumerate(requests):
            if not request.args[0].strip() and not self.tok_encode(request.args[0]):
                raise UserError(f"prompt: that of number {number} is empty, and there is nothing to go on from; give add_bos_token=True")
        first = next(iter(self._members.values()))
        decides = [first.interface if self._responses else "", self.max_length, self.add_bos_token, self.think_end_token]
        keys = [self._keys("generate", [request.args[0], setting, *decides])[""] for request, setting in zip(requests, settings, strict=True)]
        answers = [None if setting["do_sample"] else self._kept({"": key}) for key, setting in zip(keys, settings, strict=True)]
        missing = [index for index, answer in enumerate(answers) if answer is None]
        if missing:
            for index, text in zip(missing, super().generate_until([requests[index] for index in missing], disable_tqdm), strict=True):
                answers[index] = text
                if not settings[index]["do_sample"]:
                    self._keep({keys[index]: text})
        return [str(answer) for answer in answers]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        try:
            return super()._model_generate(context, max_length, stop, **settings)
        except UserError:
            raise
        except (ValueError, TypeError) as error:  # transformers checks a value only where it uses it
            raise UserError(f"gen_kwargs: transformers cannot generate with {brief(settings)} ({' '.join(str(error).split())[:200]})") from error

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: the weights and the mixture."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.dtype), "mixture": self._identity(self._mixture)}

    def set_cache_hook(self, cache_hook: Any) -> None:
        if getattr(cache_hook, "dbdict", None) is not None:
            raise UserError("use_cache: its answers are kept by request alone and would be given for every model; use --model_args …,cache=FILE")
        super().set_cache_hook(cache_hook)

    def _identity(self, mixture: Mixture) -> Any:
        row = [
            [name, self._members[name].fingerprint, value if isinstance(value, int | float) else repr(value)]
            for name, value in active(mixture).items()
        ]
        if not isinstance(mixture, Rule):
            return row
        plausible = mixture.plausible and [self._members[mixture.plausible[0]].fingerprint, mixture.plausible[1]]
        return [*row, ["rule", mixture.space, plausible, *([] if mixture.bias is None else [mixture.bias.digest])]]

    def _keys(self, kind: str, request: Any) -> dict[str, str]:
        """The key of a request under every mixture. Names do not enter the key, and the request enters as tokens, not as text."""
        if self._responses is None:
            return dict.fromkeys(self._mixtures, "")
        keys = {}
        for name, mixture in self._mixtures.items():
            identity = [part[1:] for part in self._identity(mixture)]
            dtypes = [str(self._members[member].model.dtype) for member in active(mixture)]
            keys[name] = content_key(kind=kind, version=VERSION, dtype=dtypes, model=identity, request=request)
        return keys

    def _kept(self, keys: Mapping[str, str]) -> Any | None:
        return None if self._responses is None else self._responses.get(keys[""])

    def _keep(self, answers: Mapping[str, Any]) -> None:
        if self._responses is not None:
            self._responses.put(answers)


def _sources(wanted: Arguments) -> Sources:
    expert, antiexpert = (None if place is None else str(place) for place in (wanted.expert, wanted.antiexpert))
    return Sources(str(wanted.base), expert, antiexpert, wanted.device or "cpu", wanted.proxy_device, wanted.dtype or torch.float32)


def _check_fit(wanted: Arguments, model: ProxyTunedForCausalLM) -> None:
    window, words = model.config.max_position_embeddings, model.config.vocab_size
    if wanted.max_length is not None and wanted.max_length > window:
        raise UserError(f"max_length: {wanted.max_length} is more than the members' shortest window of {window} tokens; give at most that")
    for name, token in (("prefix_token_id", wanted.prefix_token_id), ("think_end_token", wanted.think_end_token)):
        if isinstance(token, int) and token >= words:
            raise UserError(f"{name}: {token} is no token; the vocabulary has the ids 0 to {words - 1}")


def _with_bos(tokenizer: PreTrainedTokenizerBase, wanted: bool | None) -> PreTrainedTokenizerBase:
    """The tokenizer as lm-eval would load it with `add_bos_token`; members keep their own.

    Without BOS the harness encodes by itself. With BOS it relies on the tokenizer, and many tokenizers add a BOS token only if told to.
    """
    if not wanted:
        return tokenizer
    if tokenizer.bos_token_id is None:
        raise UserError("add_bos_token: the tokenizer has no BOS token; leave it out, or say with prefix_token_id what stands before a text")
    told = copy.deepcopy(tokenizer)
    told.add_bos_token = True
    if told("a").input_ids[:1] != [tokenizer.bos_token_id]:
        raise UserError(f"add_bos_token: a {type(tokenizer).__name__} cannot be told to add its BOS token; leave it out")
    return told


def run_harness(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, with `--model proxytune` and the tasks of `evals/harness/tasks`.

    Raises `UserError` for values that the harness refuses, such as an unknown task or model.
    """
    from lm_eval.__main__ import cli_evaluate

    model_registry.register("proxytune", target=ProxyLM)
    given = list(arguments)
    if given and given[0] == "run" and "--include_path" not in given:
        given += ["--include_path", str(TASKS)]
    if given and given[0] == "run" and "--device" not in given:
        given += ["--device", "cpu"]  # the harness's default is cuda:0, even without a GPU
    sys.argv = ["lm-eval", *given]
    try:
        cli_evaluate()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"lm-eval: {error}") from error
