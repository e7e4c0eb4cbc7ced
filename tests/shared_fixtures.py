"""Fixtures that several test modules share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import (
    SOME_ARCHITECTURES,
    STUDY,
    VOCABULARY,
    Unbroken,
    make_members,
    make_model,
    make_tokenizer,
    place_world,
    run_in_process,
    save_models,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from probes.world.family import build_family, find_family
from proxytune import Member, ProxyTunedForCausalLM, proxy_tuning


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that a test asks for end with it: in two processes with two threads each on two cores, threads wait for threads."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the suite, the same for all processes; what is made in it is made once, under a lock."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture
def members() -> dict[str, Member]:
    return make_members()


@pytest.fixture
def proxy(members: dict[str, Member]) -> ProxyTunedForCausalLM:
    return ProxyTunedForCausalLM(members, proxy_tuning(1.0))


@pytest.fixture(params=SOME_ARCHITECTURES)
def any_proxy(request: pytest.FixtureRequest) -> ProxyTunedForCausalLM:
    return ProxyTunedForCausalLM(make_members(request.param), proxy_tuning(0.7))


@pytest.fixture(scope="session")
def lora_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a small model of its vocabulary and two LoRA adapters on the small one, as users have them."""
    folder = tmp_path_factory.mktemp("family")
    for name, model in (("base", make_model(seed=1, layers=3, hidden=48)), ("small", make_model(seed=2))):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for name, rank, seed in (("polite", 4, 3), ("terse", 2, 4)):
        torch.manual_seed(seed)
        settings = LoraConfig(r=rank, lora_alpha=8 * rank, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "small"), settings).save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and a small model of one vocabulary."""
    save_models(tmp_path)
    return tmp_path


@pytest.fixture
def random_ids() -> Callable[..., torch.Tensor]:
    def draw(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def tiny_family(shared: Path) -> Path:
    with FileLock(shared / "tiny-family.lock"):
        return find_family("tiny", 0, shared / "worlds") or build_family("tiny", 0, shared / "worlds")


@pytest.fixture(scope="session")
def unbroken(tiny_family: Path, shared: Path) -> Unbroken:
    """The small study, run once; the second process of the suite finds its records."""
    from evals.results.summary import summarize
    from evals.study import Study

    study, out = Study.model_validate(STUDY), shared / "unbroken"
    with FileLock(shared / "unbroken.lock"):
        if not out.exists():
            place_world(tiny_family, out)
        finished = run_in_process(study, out)
    return Unbroken(out, finished, summarize(study, finished.records, finished.costs, prompts=finished.prompts))


@pytest.fixture
def no_report_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness would list the packages and compilers that are installed after every evaluation: five processes for each."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
