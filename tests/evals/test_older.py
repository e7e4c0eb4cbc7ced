"""Study files with the keys of older versions are read, with one line for each that names the new key, and mean the same."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import load

from evals.results.summary import read_results
from evals.study import Study
from proxytune.errors import UserError

TUNING = {"method": "full", "learning_rate": 1e-3}
SWEEP = {"learning_rate": [1e-3, 1e-2]}


def arms(*, sweep: str, best: dict[str, Any], match: dict[str, Any], padding_free: str) -> dict[str, Any]:
    return {
        "base": {"kind": "base"},
        "expert": {"kind": "expert", "tuning": TUNING | {padding_free: True}},
        "proxy": {"kind": "proxy", "alpha": [1]},
        "swept": {"kind": "direct", "tuning": TUNING, sweep: SWEEP},
        "best": {"kind": "direct", "tuning": TUNING, sweep: SWEEP, **best},
        "matched": {"kind": "direct", "tuning": TUNING, sweep: SWEEP, **match},
    }


MEASURES = ["task", "lens", "recoverability"]
NEW: dict[str, Any] = {
    "study": "same",
    "worlds": ["tiny"],
    "measures": MEASURES,
    "arms": arms(sweep="sweep", best={"select": "best"}, match={"select": {"match": "proxy@1"}}, padding_free="padding_free"),
    "settings": {"recoverability": {"steps": 7}, "lens": {"tokens": 1000}},
}
OLD: dict[str, Any] = {
    "study": "same",
    "world": "tiny",
    "measures": MEASURES,
    "arms": arms(sweep="dial", best={"choose": "best"}, match={"choose": "proxy@1"}, padding_free="packing"),
    "relearning": {"steps": 7},
    "lens_tokens": 1000,
}
HINTS = {
    "world: NAME": "worlds: [NAME]",
    "relearning": "settings.recoverability",
    "lens_tokens": "settings.lens.tokens",
    "packing": "padding_free",
    "dial": "sweep",
    "choose: best": "select: best",
    "choose: ARM": "select: {match: ARM}",
}


def hints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "proxytune" and record.levelno == logging.WARNING]


def test_an_old_file_means_the_same_and_every_old_key_is_told_with_its_new_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new = load(tmp_path, NEW)
    assert not hints(caplog)  # the negative twin: what is written as it is now needs no hint
    assert load(tmp_path, OLD) == new
    # One line a key, however often it stands there.
    assert hints(caplog) == [f"study: '{old}' is now written '{now}'; the old key will be refused later" for old, now in HINTS.items()]


@pytest.mark.parametrize("key", ["world", "relearning", "lens_tokens"])
def test_one_old_key_alone_is_one_hint(tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    now = {"world": "worlds", "relearning": "settings", "lens_tokens": "settings"}[key]
    study = {name: value for name, value in NEW.items() if name != now} | {key: OLD[key]}
    loaded = load(tmp_path, study)
    assert loaded.worlds == ("tiny",)
    assert len(hints(caplog)) == 1
    part = {"relearning": "recoverability", "lens_tokens": "lens"}.get(key)
    if part is not None:
        assert loaded.settings_of(part) == load(tmp_path, NEW).settings_of(part)


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (NEW | {"world": "tiny"}, "world: there is no such key; did you mean 'worlds'"),
        (NEW | {"lens_tokens": 5}, "lens_tokens: there is no such key"),
        (NEW | {"lens_tokens": 5, "settings": 3}, "lens_tokens: there is no such key"),
        (OLD | {"world": "nowhere"}, "worlds: there is no recipe 'nowhere'"),
        (OLD | {"lens_tokens": "many"}, "settings: lens.tokens: .*not 'many'"),
        (OLD | {"arms": OLD["arms"] | {"best": NEW["arms"]["best"] | {"dial": SWEEP}}}, "arms.best.dial: there is no such key"),
    ],
)
def test_an_old_key_beside_its_new_one_or_with_a_wrong_value_is_refused(tmp_path: Path, study: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, study)


def test_only_files_may_be_old() -> None:
    with pytest.raises(ValueError, match=r"world\n.*Extra inputs are not permitted"):
        Study.model_validate(OLD)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"study": "old", "seeds": [0], "rows": []}', r"is of an older version \(schema None, not 3\); run the study again"),
        ('{"schema": 1}', r"is of an older version \(schema 1, not 3\)"),
        ('{"schema": 3}', "is not what proxytune compare writes"),
        ("[]", "cannot be read as results of proxytune compare"),
        ("{", "cannot be read as results of proxytune compare"),
    ],
)
def test_results_of_an_older_version_are_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=f"^results: '.*results.json' {words}") as raised:
        read_results(tmp_path / "results.json")
    assert "\n" not in str(raised.value)


def test_shipped_studies_use_no_old_key(caplog: pytest.LogCaptureFixture) -> None:
    from evals.study import STUDIES, load_study

    for path in STUDIES.rglob("*.yaml"):
        if "arms" in yaml.safe_load(path.read_text()):
            load_study(path)
    assert not hints(caplog)
