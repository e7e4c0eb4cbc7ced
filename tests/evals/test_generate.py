from pathlib import Path

import pytest
import torch
from helpers import make_model, make_tokenizer, run_command

from evals.mixtures import Chat, Sources, load_mixture, read_prompts
from proxytune.errors import UserError
from proxytune.explanation import explain
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM


def test_explanations_are_the_members_probabilities(proxy: ProxyTunedForCausalLM) -> None:
    prompt = torch.tensor([[5, 9, 11]])
    ids = proxy.generate(prompt, do_sample=False, max_new_tokens=6, eos_token_id=None)[0].tolist()
    entries = explain(proxy, ids, 3)
    assert [entry.token for entry in entries] == ids[3:]
    for place, entry in enumerate(entries):
        before = torch.tensor([ids[: 3 + place]])
        with torch.no_grad():
            for name, probability in entry.members.items():
                law = proxy.members[name](before).logits[0, -1].softmax(-1)
                assert probability == pytest.approx(law[entry.token].item(), abs=1e-5)
                assert name != "base" or entry.base_choice == law.argmax().item()
            assert entry.mixture == pytest.approx(proxy(before).logits[0, -1].softmax(-1).max().item(), abs=1e-5)
    assert any(entry.changed for entry in entries)
    proxy.mixture = proxy_tuning(0.0)
    own = proxy.generate(prompt, do_sample=False, max_new_tokens=6, eos_token_id=None)[0].tolist()
    assert not any(entry.changed for entry in explain(proxy, own, 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("base", "expert", "antiexpert")}
    for seed, folder in enumerate(made.values()):
        make_model(seed=seed).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return made


def test_the_command_line_streams_explains_and_speculates(folders: dict[str, Path]) -> None:
    models = [word for name, folder in folders.items() for word in (f"--{name}", folder)]
    plain = run_command("generate", "w5 w9", *models, "--new-tokens", 8)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.startswith("w")
    other = run_command("generate", *models, "--new-tokens", 8, "--speculate", "--explain", given="w5 w9\n")
    assert other.stdout.startswith(plain.stdout.rstrip("\n"))
    assert "are not the base's own choice" in other.stdout
    assert "tokens a pass of the base" in other.stderr


def test_an_expert_needs_its_antiexpert(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="give both or neither"):
        load_mixture(Sources(str(folders["base"]), str(folders["expert"])), 1.0)


TEMPLATE = "{% for turn in messages %}{{ 'w10 ' if turn['role'] == 'system' else 'w11 ' }}{{ turn['content'] }} {% endfor %}w12 "


def test_chat_members_read_their_template_and_others_plain_text(folders: dict[str, Path]) -> None:
    model, members = load_mixture(Sources(*map(str, folders.values())), 0.7, drafting=True)
    members["expert"].tokenizer.chat_template = members["draft"].tokenizer.chat_template = TEMPLATE
    prompts = read_prompts(members, "w5 w9", Chat(["expert"], "w20", "w30"))
    assert prompts == {"base": [5, 9], "expert": [10, 20, 11, 5, 9, 12, 30], "antiexpert": [5, 9], "draft": [10, 20, 11, 5, 9, 12, 30]}
    own = {name: [ids] for name, ids in prompts.items() if ids != [5, 9]}
    made = model.generate(torch.tensor([[5, 9]]), prompts=own, do_sample=False, max_new_tokens=6, eos_token_id=None)
    answer = made[0, 2:].tolist()
    for place, entry in enumerate(explain(model, made[0].tolist(), 2, prompts=prompts)):
        for name, probability in entry.members.items():
            with torch.no_grad():
                law = model.members[name](torch.tensor([prompts[name] + answer[:place]])).logits[0, -1].softmax(-1)
            assert probability == pytest.approx(law[entry.token].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("chat", "words"),
    [(Chat(["judge"]), "'judge' is no member"), (Chat(["expert"]), "no chat template"), (Chat(system="Be brief."), "belong to a chat template")],
)
def test_chat_that_cannot_be_is_one_line(folders: dict[str, Path], chat: Chat, words: str) -> None:
    _, members = load_mixture(Sources(*map(str, folders.values())), 1.0)
    with pytest.raises(UserError, match=words):
        read_prompts(members, "w5", chat)


def test_mistakes_are_one_line_on_the_command_line(folders: dict[str, Path]) -> None:
    for arguments, words in (
        (["--alpha", "nan"], "finite number"),
        (["--device", "cuda:7"], "--base: the device 'cuda:7' cannot compute"),
        (["--chat", "base"], "no chat template"),
    ):
        failed = run_command(
            "generate", "w5", "--base", folders["base"], "--expert", folders["expert"], "--antiexpert", folders["antiexpert"], *arguments
        )
        assert failed.returncode == 2
        assert words in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1
