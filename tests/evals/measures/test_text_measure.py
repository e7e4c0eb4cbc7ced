"""What an arm expects of ordinary text: the loss of transformers itself, token by token."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_members, make_tokenizer
from planted import OWN, study_of
from scipy.stats import entropy

from evals.measures.subjects import Outputs
from evals.measures.text import FILE, Text, Texts, TextSettings, expected, texts_of, tokens_of
from evals.records import Record
from evals.results.recorded import Recorded
from proxytune.errors import UserError
from proxytune.mixture import Mixture, proxy_tuning

IDS = [1, 5, 9, 13, 7, 7, 30]
MIXTURES: dict[str, Mixture] = {"base": {"base": 1.0}, "proxy": proxy_tuning(0.8)}


def test_loss_and_divergence_are_those_of_the_whole_distributions() -> None:
    members = make_members()
    found = expected(Outputs(members, {}, MIXTURES), IDS)
    with torch.inference_mode():
        logits = {name: member.model(torch.tensor([IDS])).logits[0, :-1].double() for name, member in members.items()}
        loss = members["base"].model(torch.tensor([IDS]), labels=torch.tensor([IDS])).loss.item()
    assert found["base"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert found["base"]["divergence"] == 0.0
    base = logits["base"].log_softmax(-1)
    mixed = (logits["base"] + 0.8 * (logits["expert"] - logits["antiexpert"])).log_softmax(-1)
    assert found["proxy"]["divergence"] == pytest.approx(float(np.mean(entropy(base.exp().numpy(), mixed.exp().numpy(), axis=1))), rel=1e-4)
    assert found["proxy"]["loss"] == pytest.approx(-mixed[range(6), IDS[1:]].mean().item(), rel=1e-4)
    assert found["proxy"]["tokens"] == len(IDS) - 1


def summary(worse: float, texts: int = 30) -> Texts:
    draw = np.random.default_rng(0)
    study = study_of(1, measures=["text"], **OWN)
    base = draw.normal(3.0, 1.0, texts)
    records = []
    for arm, loss in (("base", base), ("full", base + worse + draw.normal(0, 0.01, texts))):
        frame = pd.DataFrame(
            {"unit": [f"{number}" for number in range(texts)], "popularity": np.nan, "loss": loss, "divergence": abs(loss - base), "tokens": 9.0}
        )
        records.append(Record(arm, "text", None, 0, "p", frame))
    return Text().summarize(Recorded(study, records), TextSettings())


def test_a_planted_change_is_found_although_texts_differ_far_more() -> None:
    """Twin: without a change the interval holds zero."""
    for worse in (0.05, 0.0):
        found = {one.arm: one for one in summary(worse).arms}
        change = found["full"].change
        assert change.value == pytest.approx(worse, abs=0.01)
        assert change.excludes_zero() == (worse > 0)
        assert found["base"].change is None
        assert found["full"].loss.high - found["full"].loss.low > 10 * (change.high - change.low)


def test_the_shipped_prose_has_sources_and_licences() -> None:
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["text"] for row in rows}) >= 20
    assert all(row["source"] and row["licence"] == "public domain" for row in rows)


@pytest.mark.parametrize(("content", "words"), [("", "holds no text"), ("{}\n", "must have lines like"), ("no\n", "must have lines like")])
def test_a_file_of_another_form_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        texts_of(tmp_path / "x.jsonl")


def test_a_text_that_the_tokenizer_cannot_spell_is_refused() -> None:
    assert tokens_of(["w3 w4"], make_tokenizer()) == [[3, 4]]
    with pytest.raises(UserError, match=r"spells 0% of 'Call me Ishmael'"):
        tokens_of(["Call me Ishmael"], make_tokenizer())
    with pytest.raises(UserError, match="fewer than two tokens"):
        tokens_of(["w3"], make_tokenizer())
