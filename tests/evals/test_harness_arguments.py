"""What the lm-eval class may be given: every argument has its effect or is refused in one line, and BOS is the harness's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, Counted, make_members, make_model, make_tokenizer
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evals.harness.model import TASKS, ProxyLM
from proxytune.arguments import read_dtype, unknown_name
from proxytune.bias import Bias
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.mixture import Rule, proxy_tuning

pytestmark = pytest.mark.usefixtures("no_report_of_the_machine")

CONTEXTS = ["w3 w4 w5", "", "w9 w10 w11 w12 w3", "<bos> w7 w8"]
CHOICES = [" w6 w7", " w8", " <bos> w9"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models whose tokenizer has a BOS token and adds none by itself, as GPT-2's and Pythia's."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 1), ("small", 2), ("tuned", 3)):
        make_model(seed=seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, 0) for each in arguments]


def numbers(lm: Any) -> list[float]:
    """The log-probabilities of choices after contexts, and of whole texts."""
    pairs = [(context, choice) for context in CONTEXTS for choice in CHOICES]
    scored = [total for total, _ in lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)]
    return [*scored, *lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in CONTEXTS if text]), disable_tqdm=True)]


def texts(lm: Any, contexts: list[str] = CONTEXTS[::2], **settings: Any) -> list[str]:
    settings = {"until": ["w31"], "max_gen_toks": 8} | settings
    return list(lm.generate_until(instances("generate_until", [(context, dict(settings)) for context in contexts]), disable_tqdm=True))


def stock(folder: Path, **options: Any) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, **options)


@pytest.mark.parametrize("options", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "prefix_token_id": 7}], ids=str)
def test_bos_is_added_as_by_the_harness(folders: Path, options: dict[str, Any]) -> None:
    theirs, ours = stock(folders / "base", **options), ProxyLM(base=str(folders / "base"), **options)
    assert numbers(ours) == pytest.approx(numbers(theirs), abs=1e-5)
    assert texts(ours) == texts(theirs)
    # A long text in a short window: rolling over several windows, and prompts that are cut.
    theirs, ours = stock(folders / "base", max_length=16, **options), ProxyLM(base=str(folders / "base"), max_length=16, **options)
    text = " ".join(f"w{number}" for number in range(3, 45))
    assert ours.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)])) == pytest.approx(
        theirs.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)])), abs=1e-4
    )
    assert texts(ours, [text]) == texts(theirs, [text])


def test_bos_has_its_effect_and_members_keep_their_tokenizer(folders: Path) -> None:
    plain, told = ProxyLM(base=str(folders / "base")), ProxyLM(base=str(folders / "base"), add_bos_token=True)
    assert max(abs(one - other) for one, other in zip(numbers(plain), numbers(told), strict=True)) > 0.1
    assert (texts(plain), plain.tok_encode("w3")) != (texts(told), told.tok_encode("w3"))
    members = make_members()
    ProxyLM.of(members, {"base": 1.0}, add_bos_token=True)
    assert members["base"].tokenizer("w3").input_ids == [3]


def test_an_empty_prompt_is_refused_and_never_a_row_of_padding(folders: Path) -> None:
    for contexts in ([""], ["w3", " "]):
        with pytest.raises(UserError, match=f"prompt: that of number {len(contexts) - 1} is empty"):
            texts(ProxyLM(base=folders / "base"), contexts)
        told = {"add_bos_token": True}
        assert texts(ProxyLM(base=folders / "base", **told), contexts) == texts(stock(folders / "base", **told), contexts)


def test_a_tokenizer_without_bos_is_refused_only_where_bos_is_wanted() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    members = {"base": Member(make_model(), tokenizer)}
    with pytest.raises(UserError, match="add_bos_token: the tokenizer has no BOS token"):
        ProxyLM.of(members, {"base": 1.0}, add_bos_token=True)
    for fine in (None, False):
        assert ProxyLM.of(members, {"base": 1.0}, add_bos_token=fine).prefix_token_id == tokenizer.eos_token_id


NAMED: dict[str, Any] = {"base": "{base}"}
PROXY: dict[str, Any] = NAMED | {"expert": "{tuned}", "antiexpert": "{small}"}
BAD: list[tuple[dict[str, Any], str]] = [
    # Names that are none, or that mean nothing to a mixture.
    (PROXY | {"alhpa": 0.1}, "alhpa: .*did you mean 'alpha'"),
    (NAMED | {"dtpye": "float32"}, "dtpye: .*did you mean 'dtype'"),
    (NAMED | {"batchsize": 3}, "batchsize: .*did you mean 'batch_size'"),
    (NAMED | {"max_lenght": 3}, "max_lenght: .*did you mean 'max_length'"),
    (NAMED | {"pretrained": "x"}, "pretrained: .*did you mean 'base'"),
    (NAMED | {"peft": "x"}, "peft: .*did you mean 'expert'"),
    (NAMED | {"Alpha": 1.0}, "Alpha: .*did you mean 'alpha'"),
    *((NAMED | {name: value}, f"{name}: a mixture in lm-eval has no such argument; .*there are add_bos_token") for name, value in {
        "load_in_8bit": True, "load_in_4bit": True, "revision": "main", "trust_remote_code": True, "parallelize": True, "device_map": "auto",
        "tokenizer": "x", "backend": "causal", "logits_cache": False, "softmax_dtype": "float32", "mixed_precision_dtype": "bfloat16",
        "truncation": True, "subfolder": "x", "delta": "x", "autogptq": True, "gptqmodel": True, "gguf_file": "x", "tp_plan": "auto",
        "use_fast_tokenizer": False, "offload_folder": "x", "max_memory_per_gpu": 1, "attn_implementation": "eager", "self": 1, "": 1,
    }.items()),
    # Values that cannot be.
    *((PROXY | {"alpha": value}, "alpha: .*not") for value in (float("nan"), float("inf"), "strong", None.__class__, True, [1.0])),
    *((NAMED | {"dtype": value}, "dtype: weights are loaded in float32, .*not") for value in ("float99", "load", "auto", "int8", 32, torch.int8, "")),
    *((NAMED | {"device": value}, "device") for value in ("toaster", "cuda:99", 0, "", "meta")),
    *((PROXY | {"proxy_device": value}, "device") for value in ("toaster", 7)),
    *((NAMED | {"threads": value}, "threads: .*not") for value in (0, -1, "many", 1.5, True, 10**9, 10**30)),
    *((NAMED | {"batch_size": value}, "batch_size: .*not") for value in (0, -1, "x", "", 1.5, True, "1_0", "²")),
    *((NAMED | {"batch_size": value}, "batch_size: .*not") for value in ("auto:", "auto:0", "auto:x", "auto:-1", "automatic")),
    *((NAMED | {"max_batch_size": value}, "max_batch_size: .*not") for value in (0, -1, "x")),
    (NAMED | {"batch_size": 9, "max_batch_size": 8}, "batch_size: 9 is above max_batch_size 8"),
    *((NAMED | {"batch_tokens": value}, "batch_tokens: .*not") for value in (0, -5, "x", 1e3)),
    *((NAMED | {"max_length": value}, "max_length: ") for value in (0, -5, "x", 129, 10**30, False)),
    *((NAMED | {"max_gen_toks": value}, "max_gen_toks: .*not") for value in (0, -5, "x", 2.0)),
    *((NAMED | {"add_bos_token": value}, "add_bos_token: .*not") for value in ("yes", 1, 0)),
    *((NAMED | {"prefix_token_id": value}, "prefix_token_id: .*(not|no token)") for value in (-1, 50, "x", 1.0)),
    *((NAMED | {"think_end_token": value}, "think_end_token: .*(not|no token)") for value in (-1, 50, "", 1.0)),
    (NAMED | {"enable_thinking": True}, "enable_thinking: .*think_end_token"),
    (NAMED | {"enable_thinking": "on"}, "enable_thinking: .*not"),
    (NAMED | {"chat_template_args": "x"}, "chat_template_args: .*not"),
    *((NAMED | {"cache": value}, "cache: ") for value in (5, "", "/proc/none/answers.db", "{folder}", "{base}/config.json/answers.db", "\0")),
    # Models that are not there, or half.
    ({}, "model_args: the base is missing"),
    *(({"base": value}, "base: ") for value in ("", "{folder}/nothing", "{folder}", 5, True, None.__class__, "no/such/name", "{base}/config.json")),
    (NAMED | {"expert": "{tuned}"}, "expert and antiexpert: give both"),
    (NAMED | {"antiexpert": "{small}"}, "expert and antiexpert: give both"),
    (PROXY | {"expert": "{folder}/nothing"}, "expert: "),
    (PROXY | {"antiexpert": "{folder}/nothing"}, "antiexpert: "),
    (NAMED | {"alpha": 0.5}, "alpha: it belongs to an expert"),
    (NAMED | {"proxy_device": "cpu"}, "proxy_device: it belongs to an expert"),
    (NAMED | {"mixture": {"base": 1.0}}, "mixture: it is over members that are loaded"),
    (NAMED | {"mixtures": {"a": {"base": 1.0}}}, "mixture: it is over members that are loaded"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"), BAD, ids=[str({name: value for name, value in given.items() if value not in PROXY.values()})[:60] for given, _ in BAD]
)
def test_a_bad_argument_is_one_line(given: dict[str, Any], said: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"base": folders / "base", "small": folders / "small", "tuned": folders / "tuned", "folder": folders}
    filled = {name: value.format(**places) if isinstance(value, str) else value for name, value in given.items()}
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    with pytest.raises(UserError, match=said) as raised:
        ProxyLM(**filled)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700
    assert asked == []


BAD_MEMBERS: list[tuple[dict[str, Any], str]] = [
    ({"mixture": None}, "mixture: members need one"),
    ({"mixture": None, "alpha": 0.5}, "alpha: members that are loaded have it already"),
    ({"members": {}}, "members: at least one"),
    ({"members": {"base": 5}}, "members: .*not"),
    ({"members": "base"}, "members: .*not"),
    ({"base": "x"}, "base: members that are loaded have it already"),
    ({"device": "cpu"}, "device: members that are loaded have it already"),
    ({"dtype": "float32"}, "dtype: members that are loaded have it already"),
    *(({"mixture": mixture}, said) for mixture, said in (
        ({"base": 1.0, "exprt": 0.5}, "mixture: member 'exprt' is not loaded"), ({"base": float("nan")}, "finite number"),
        ({}, "at least one coefficient"), ({"base": 0.0}, "at least one coefficient"), (5, "mixture: .*not 5"), ([("base", 1.0)], "mixture: .*not"),
        (Rule({"base": 1.0}, plausible=("x", 0.1)), "plausible: member 'x' is not loaded"),
    )),
    ({"mixtures": {"a": {"base": 1.0}}}, "mixtures: their answers go into the cache"),
    ({"mixtures": {"": {"base": 1.0}}, "cache": "{folder}/a.db"}, "mixtures: the empty name"),
    ({"mixtures": {"a": {"x": 1.0}}, "cache": "{folder}/a.db"}, "mixture: member 'x' is not loaded"),
    ({"mixtures": [{"base": 1.0}], "cache": "{folder}/a.db"}, "mixtures: .*not"),
    ({"mixture": {"base": lambda place: place.position}, "cache": "{folder}/a.db"}, "cache: a coefficient that is a function"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "said"), BAD_MEMBERS, ids=[f"{place}-{'-'.join(given)}" for place, (given, _) in enumerate(BAD_MEMBERS)])
def test_a_bad_argument_beside_members_is_one_line(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    filled = {name: value.format(folder=tmp_path) if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises(UserError, match=said) as raised:
        ProxyLM(**({"members": make_members(), "mixture": {"base": 1.0}} | filled))
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_good_arguments_are_taken_as_words_and_as_values(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    proxy = f"base={folders / 'base'},expert={folders / 'tuned'},antiexpert={folders / 'small'}"
    words = f"{proxy},alpha=0.5,dtype=bfloat16,proxy_device=cpu,threads=1,max_gen_toks=5,cache={tmp_path / 'a.db'},batch_tokens=64,max_length=64"
    lm = ProxyLM.create_from_arg_string(words, {"batch_size": "3", "max_batch_size": 4, "device": "cpu"})
    assert (lm.model.dtype, lm.batch_size, lm.max_batch_size, lm.max_length, lm.max_gen_toks) == (torch.bfloat16, 3, 4, 64, 5)
    assert asked == [1]
    assert lm.model.mixture == proxy_tuning(0.5)
    # What the words say goes before the harness's own defaults, which it passes unasked.
    lm = ProxyLM.create_from_arg_obj({"base": folders / "base", "batch_size": 5, "device": "cpu"}, {"batch_size": 1, "device": "cuda:0", "x": None})
    assert (lm.batch_size, lm.device) == (5, torch.device("cpu"))
    assert ProxyLM(base=folders / "base", dtype=torch.float64).model.dtype == torch.float64
    assert ProxyLM.create_from_arg_string(proxy).model.mixture == proxy_tuning(1.0)
    assert read_dtype("torch.float16") == torch.float16


@pytest.mark.parametrize("size", ["auto", "auto:2"])
def test_batches_sized_by_the_harness(size: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = ProxyLM(base=folders / "base", batch_size=2)
    sized = ProxyLM(base=folders / "base", batch_size=size, max_batch_size=4, max_length=32)
    rows: list[int] = []
    call = sized._model_call
    monkeypatch.setattr(sized, "_model_call", lambda ids: rows.append(len(ids)) or call(ids))
    assert texts(sized) == texts(fixed)
    assert set(rows) == {4}
    assert numbers(sized) == pytest.approx(numbers(fixed), abs=1e-5)


def test_each_option_of_the_harness_has_its_effect(folders: Path) -> None:
    base = folders / "base"
    plain = ProxyLM(base=base)
    text = texts(plain)[0].split()
    assert texts(ProxyLM(base=base, think_end_token=text[2])) == texts(stock(base, think_end_token=text[2]))
    assert texts(ProxyLM(base=base, think_end_token=text[2])) != texts(plain)
    assert texts(ProxyLM(base=base, think_end_token=int(text[2][1:]))) == texts(stock(base, think_end_token=int(text[2][1:])))
    assert len(texts(ProxyLM(base=base, max_gen_toks=3), max_gen_toks=None)[0].split()) == 3
    assert numbers(ProxyLM(base=base, prefix_token_id=9)) != numbers(plain)
    members = make_members()
    members["base"].tokenizer.chat_template = "{{ tone }} {{ enable_thinking }} {% for message in messages %}{{ message.content }}{% endfor %}"
    lm = ProxyLM.of(members, {"base": 1.0}, chat_template_args={"tone": "w5"}, enable_thinking=True, think_end_token="w9")
    assert lm.apply_chat_template([{"role": "user", "content": "w7"}]) == "w5 True w7"
    with pytest.raises(UserError, match="enable_thinking: a task that scores"):
        numbers(lm)
    assert len(texts(lm)) == 2


def test_a_model_that_says_no_window_has_the_window_that_the_harness_gives_it() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    member = Member(BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)).eval(), make_tokenizer())
    theirs = HFLM(pretrained=member.model, tokenizer=member.tokenizer, device="cpu")
    assert ProxyLM.of({"base": member}, {"base": 1.0}).max_length == theirs.max_length == 2048


BAD_GENERATION: list[tuple[dict[str, Any], str]] = [
    ({"temprature": 1.0}, "gen_kwargs: temprature is no argument .*did you mean 'temperature'"),
    *(
        ({name: 1}, f"gen_kwargs: {name} is no argument")
        for name in ("foo", "stop", "use_cache", "pad_token_id", "num_return_sequences", "prompts", "alpha")
    ),
    ({"return_dict_in_generate": True}, "return_dict_in_generate is no argument"),
    *(({"max_gen_toks": value}, "gen_kwargs: max_gen_toks must be a whole number from 1, not") for value in (0, -5, "x", 1.5, True)),
    ({"max_new_tokens": -1, "max_gen_toks": None}, "gen_kwargs: max_new_tokens must be a whole number"),
    ({"max_gen_toks": 128}, "gen_kwargs: an answer of max_gen_toks 128 leaves no room for a prompt in the window of 128"),
    ({"max_gen_toks": None}, "gen_kwargs: an answer of max_gen_toks 256 leaves no room"),
    *(({"temperature": value}, "gen_kwargs: temperature must be a") for value in ("hot", float("nan"), float("inf"), None)),
    ({"until": 5}, "gen_kwargs: until must be a text"),
    ({"until": ["a", 5]}, "gen_kwargs: until must be a text"),
    ({"do_sample": True, "temperature": -1.0}, "gen_kwargs: transformers cannot generate"),
    ({"do_sample": True, "temperature": 1.0, "top_p": -1.0}, "gen_kwargs: transformers cannot generate"),
    ({"num_beams": "x"}, "gen_kwargs: transformers cannot generate"),
]


@pytest.mark.parametrize(("settings", "said"), BAD_GENERATION, ids=[str(settings) for settings, _ in BAD_GENERATION])
def test_a_bad_generation_argument_is_one_line(settings: dict[str, Any], said: str, lm: ProxyLM) -> None:
    with pytest.raises(UserError, match=said) as raised:
        texts(lm, **settings)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def lm() -> ProxyLM:
    return ProxyLM.of(make_members(), proxy_tuning(0.5))


@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"repetition_penalty": 2.0}, {"min_new_tokens": 7, "max_gen_toks": 8}, {"suppress_tokens": [4]}], ids=str
)
def test_a_good_generation_argument_is_passed_on(settings: dict[str, Any], folders: Path) -> None:
    assert texts(ProxyLM(base=folders / "base"), **settings) == texts(stock(folders / "base"), **settings)


def test_what_decides_a_kept_answer(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)

    def passes(**options: Any) -> tuple[int, int]:
        lm, counted.passes = ProxyLM(**({"base": folders / "base", "cache": tmp_path / "a.db"} | options)), 0
        numbers(lm)
        scored, counted.passes = counted.passes, 0
        texts(lm, max_gen_toks=None, until=["w31"])
        return scored, counted.passes

    first = {"max_gen_toks": 8}
    assert all(passes(**first))
    for hit in ({}, {"batch_size": 1}, {"batch_tokens": 64}, {"threads": 1}, {"add_bos_token": None}):
        assert passes(**first, **hit) == (0, 0), hit
    assert passes(max_gen_toks=7)[1]
    for miss in ({"add_bos_token": True}, {"dtype": "float64"}, {"base": folders / "small"}):
        assert all(passes(**first, **miss)), miss
    scored, generated = passes(**first, prefix_token_id=9)
    assert scored
    assert generated == 0  # a prompt is generated from as it is
    assert passes(**first, think_end_token="w5") == (0, passes(**first | {"think_end_token": "w6"})[1])


def test_a_rule_is_not_its_row_and_a_temperature_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, members, cache = Counted(monkeypatch), make_members(), str(tmp_path / "a.db")
    row = {"base": 0.5, "expert": 0.5}
    for mixture in (
        row,
        Rule(row, plausible=("base", 0.1)),
        Rule(row, plausible=("expert", 0.1)),
        Rule(row, plausible=("base", 0.2)),
        Rule(row, space="probabilities"),
        Rule(row, bias=Bias.banning([7], VOCABULARY)),
        Rule(row, bias=Bias.banning([8], VOCABULARY)),
    ):
        kept, counted.passes = ProxyLM.of(members, mixture, cache=cache), 0
        found = numbers(kept)
        assert counted.passes > 0
        assert found == numbers(ProxyLM.of(members, mixture))
        counted.passes = 0
        assert numbers(ProxyLM.of(make_members(), mixture, cache=cache)) == found
        assert counted.passes == 0
    for settings, again in (({"temperature": 1.0}, True), ({"do_sample": True, "temperature": 1.0}, True), ({"temperature": 0.0}, False)):
        texts(kept, **settings)
        counted.passes = 0
        texts(kept, **settings)
        assert (counted.passes > 0) == again


def test_whose_tokenizer_and_generation_config_speak_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, cache, members = Counted(monkeypatch), str(tmp_path / "a.db"), make_members()
    members["expert"].model.generation_config.repetition_penalty = 1.7
    texts(ProxyLM.of({name: members[name] for name in ("base", "expert")}, {"expert": 1.0}, cache=cache))
    for order, again in ((("base", "expert"), False), (("expert", "base"), True)):
        counted.passes = 0
        texts(ProxyLM.of({name: members[name] for name in order}, {"expert": 1.0}, cache=cache))
        assert (counted.passes > 0) == again


def test_the_harness_passes_words_and_errors_on(folders: Path) -> None:
    model_registry.register("proxytune", target=ProxyLM)
    options: dict[str, Any] = {"tasks": ["proxytune_world_choice"], "limit": 2, "bootstrap_iters": 0}
    options |= {"model": "proxytune", "task_manager": TaskManager(include_path=str(TASKS), include_defaults=False)}
    base = f"base={folders / 'base'}"
    for given, said in (("alhpa=0.1", "alhpa: .*did you mean 'alpha'"), ("threads=-1", "threads: .*not -1"), ("trust_remote_code=True", "trust_re")):
        with pytest.raises(UserError, match=said):
            simple_evaluate(model_args=f"{base},{given}", **options)
    for more in ({"batch_size": "x"}, {"device": "toaster"}, {"max_batch_size": 0}):
        with pytest.raises(UserError, match=next(iter(more))):
            simple_evaluate(model_args=base, **options, **more)
    found = simple_evaluate(model_args=f"{base},batch_size=3,device=cpu", batch_size="1", device="cpu", max_batch_size=4, **options)
    assert found["config"]["model_args"].endswith("batch_size=3,device=cpu")


def test_names_that_are_near() -> None:
    assert unknown_name("alhpa", ["beta", "alpha"]) == "did you mean 'alpha'? there are alpha, beta"
    assert unknown_name("zzz", ["beta", "alpha"]) == "there are alpha, beta"
    assert json.dumps(unknown_name("x", []))
