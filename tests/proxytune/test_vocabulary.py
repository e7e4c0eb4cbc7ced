import pytest
from helpers import make_members, make_model, make_tokenizer

from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.vocabulary import check_same_vocabulary


def test_the_same_content_is_accepted_from_other_objects() -> None:
    check_same_vocabulary({"base": make_tokenizer(), "expert": make_tokenizer()})


def test_the_first_differing_id_is_named() -> None:
    with pytest.raises(UserError, match=r"expert: .* first at id 7: 'w8' against 'w7'"):
        check_same_vocabulary({"base": make_tokenizer(), "expert": make_tokenizer(swapped=True)})


def test_a_longer_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"first at id 50: 'w50' against no token"):
        check_same_vocabulary({"base": make_tokenizer(), "expert": make_tokenizer(words=51)})


def test_a_token_that_is_special_only_in_one_is_refused() -> None:
    special = make_tokenizer()
    special.add_special_tokens({"additional_special_tokens": ["w9"]})
    with pytest.raises(UserError, match=r"first at id 9: special 'w9' against 'w9'"):
        check_same_vocabulary({"base": make_tokenizer(), "expert": special})


def test_construction_checks() -> None:
    members = make_members()
    members["expert"] = Member(members["expert"].model, make_tokenizer(swapped=True))
    with pytest.raises(UserError, match="id 7"):
        ProxyTunedForCausalLM(members, proxy_tuning(1.0))


def test_padded_rows_are_cut_to_the_narrowest_head() -> None:
    members = make_members()
    members["base"] = Member(make_model(rows=64), make_tokenizer())
    model = ProxyTunedForCausalLM(members, proxy_tuning(1.0))
    assert model.config.vocab_size == 50
    assert model(model.dummy_inputs["input_ids"]).logits.shape[-1] == 50


def test_a_head_shorter_than_its_vocabulary_is_refused() -> None:
    members = make_members()
    members["expert"] = Member(make_model(rows=40), make_tokenizer())
    with pytest.raises(UserError, match="expert: its head has 40 rows for a vocabulary of 50"):
        ProxyTunedForCausalLM(members, proxy_tuning(1.0))
