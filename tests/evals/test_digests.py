"""What was damaged is the same, made again by name, or one line: never another number and never a traceback."""

import json
import logging
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import TUNINGS, Stop, fingerprint, items, run_tuning, unbroken_tuning
from transformers import TrainerCallback

from evals.arms import Group, tuned_weights
from evals.data import StudyData
from evals.harness.responses import Responses
from evals.records import read_record, write_record
from finetune.checkpoints import last_whole
from finetune.encoding import encode_examples
from finetune.pretraining import Pretraining
from finetune.recipe import Tuning
from finetune.reference import read_reference
from probes.world import family as families
from probes.world.family import build_family, find_family
from probes.world.recipes import RECIPES as WORLDS
from proxytune.digests import DIGESTS, check_whole, find_damage, is_whole, publish, seal
from proxytune.errors import UserError
from proxytune.member import load_member


def damages(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` bit flips and `count` truncations of a file."""
    generator = np.random.default_rng(seed)
    for place in generator.integers(len(content), size=count):
        changed = bytearray(content)
        changed[place] ^= 1 << int(generator.integers(8))
        yield bytes(changed)
    for cut in [0, *generator.integers(len(content), size=count - 1)]:
        yield content[:cut]


def each_damage(place: Path, count: int, files: list[Path] | None = None) -> Iterator[Path]:
    """Damages a folder's files in turn, `count` flips and truncations each; restores the file each time it goes on."""
    for file in files or sorted(file for file in place.rglob("*") if file.is_file()):
        content = file.read_bytes()
        for damaged in damages(content, count):
            if damaged != content:
                file.write_bytes(damaged)
                yield file
        file.write_bytes(content)


SIZES = [pytest.param(3, id="few"), pytest.param(60, id="many", marks=pytest.mark.slow)]


# --- the digests themselves ---


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    place = tmp_path / "sealed"
    (place / "below").mkdir(parents=True)
    (place / "weights").write_bytes(bytes(range(256)) * 4)
    (place / "below" / "card.json").write_text('{"loss": 1.25}')
    seal(place)
    return place


@pytest.mark.parametrize("count", [pytest.param(40, id="few"), pytest.param(400, id="many", marks=pytest.mark.slow)])
def test_every_damage_of_a_sealed_folder_is_found(sealed: Path, count: int) -> None:
    contents = {file: file.read_bytes() for file in sealed.rglob("*") if file.is_file()}
    found = 0
    for file in each_damage(sealed, count):
        # A flip in a blank of the digests changes nothing that they say.
        same = file.name == DIGESTS and _says(file.read_bytes()) == _says(contents[file])
        assert (find_damage(sealed) is None) == same
        found += not same
    assert found > 2 * count
    assert is_whole(sealed)


def _says(digests: bytes) -> Any:
    try:
        return json.loads(digests)
    except ValueError:
        return None


def test_damage_is_named(sealed: Path, caplog: pytest.LogCaptureFixture) -> None:
    (sealed / "added later").write_text("counts for nothing")
    check_whole(sealed, "base")
    assert is_whole(sealed)
    assert not caplog.records
    (sealed / "below" / "card.json").write_text('{"loss": 1.24}')
    with pytest.raises(
        UserError, match=r"^arms.expert.path: '.*sealed' is damaged \(the bytes of below/card.json are not .*\); make it again, or remove"
    ):
        check_whole(sealed, "arms.expert.path")
    assert not is_whole(sealed)
    assert [record.getMessage().split("'")[-1] for record in caplog.records] == [
        " is damaged (the bytes of below/card.json are not those that were written); it is made again"
    ]
    (sealed / "weights").unlink()
    (sealed / DIGESTS).unlink()
    check_whole(sealed, "base")  # as it is
    check_whole("org/name", "base")
    assert not is_whole(sealed)
    assert not is_whole(sealed / "nowhere")


@pytest.mark.parametrize("name", ["../outside", "/dev/zero", "pipe", "below", "x" * 5000, "a\0b"])
def test_hostile_digests_read_nothing_else(sealed: Path, name: str) -> None:
    (sealed.parent / "outside").write_text("secret")
    subprocess.run(["mkfifo", sealed / "pipe"], check=True)
    (sealed / DIGESTS).write_text(json.dumps({name: {"size": 0, "sha256": ""}}))
    with pytest.raises(UserError) as error:
        check_whole(sealed, "base")
    assert len(str(error.value)) < 1000
    for content in ["[" * 100_000, "[]", '{"a": 1}', '{"a": {"size": "x"}}', "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")]:
        (sealed / DIGESTS).write_text(content)
        assert find_damage(sealed) == f"{DIGESTS} cannot be read"


def test_what_is_published_takes_the_old_ones_place_at_once(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A death at any moment leaves the old one, the new one or nothing."""
    target = Path(shutil.copytree(sealed, sealed.parent / "target"))
    (sealed / "weights").write_bytes(b"new")
    renamed = Path.rename

    def dying(calls: int) -> Callable[[Path, Path], Path]:
        left = iter(range(calls))

        def rename(self: Path, other: Path) -> Path:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return renamed(self, other)

        return rename

    for calls in (0, 1):
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", dying(calls))
            with pytest.raises(KeyboardInterrupt):
                publish(sealed, target)
        assert target.exists() == (calls == 0)
        assert not target.exists() or is_whole(target)
        assert is_whole(sealed)
    publish(sealed, target)
    assert is_whole(target)
    assert (target / "weights").read_bytes() == b"new"


# --- checkpoints inside a run ---


def stopped(place: Path, step: int, **options: Any) -> Path:
    with pytest.raises(KeyboardInterrupt):
        run_tuning(place, "out", Stop(step), **options)
    return place / ".out.partial"


def test_a_damaged_checkpoint_is_named_and_the_run_ends_the_same(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    unbroken, right = unbroken_tuning(epochs=1.0)
    partial = stopped(folder, 4, epochs=1.0)
    kept = Path(shutil.copytree(partial, folder / "kept"))
    # The newest damaged: it goes on from the one before; both damaged: from the beginning; none: nothing is said.
    for damaged, first in (([], 4), ([4], 3), ([4, 3], 0)):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(kept, partial)
        caplog.clear()
        for step in damaged:
            content = bytearray((partial / f"checkpoint-{step}" / "optimizer.pt").read_bytes())
            content[len(content) // 2] ^= 4
            (partial / f"checkpoint-{step}" / "optimizer.pt").write_bytes(content)
        found = shutil.copytree(partial, folder / f"found-{first}")
        assert (last_whole(Path(found))[0] or Path("checkpoint-0")).name == f"checkpoint-{first}"
        caplog.clear()
        resumed = run_tuning(folder, "out", epochs=1.0)
        assert resumed.losses == unbroken.losses
        assert fingerprint(folder, "out") == right
        assert len([record for record in caplog.records if "optimizer.pt are not those" in record.getMessage()]) == len(damaged)
        shutil.rmtree(folder / "out")


@pytest.mark.parametrize("count", SIZES)
def test_no_damage_of_a_checkpoint_goes_unseen(folder: Path, count: int) -> None:
    partial = stopped(folder, 3)
    checkpoint, meter = last_whole(partial)
    assert checkpoint is not None
    kept = Path(shutil.copytree(partial, folder / "kept"))
    said = _says((checkpoint / DIGESTS).read_bytes())
    seen = 0
    for file in each_damage(kept / checkpoint.name, count):
        place = Path(shutil.copytree(kept, folder / "damaged"))
        found, other = last_whole(place)
        if found is None or found.name != checkpoint.name:
            seen += 1
        else:
            assert file.name == DIGESTS
            assert _says(file.read_bytes()) == said
            assert other.seconds == pytest.approx(meter.seconds)
        shutil.rmtree(place)
    assert seen > 12 * count
    assert last_whole(kept)[0] == kept / checkpoint.name


class Death(BaseException):
    """The process is gone."""


def dying_removal(steps: int) -> Callable[..., None]:
    """`shutil.rmtree` that removes so many files of checkpoints, over all calls, and then dies."""
    left, whole = iter(range(steps)), shutil.rmtree

    def rmtree(place: Any, *arguments: Any, **options: Any) -> None:
        if "checkpoint-" in Path(place).name:
            for file in sorted(Path(place).iterdir()):
                if next(left, None) is None:
                    raise Death
                file.unlink()
        whole(place, *arguments, **options)

    return rmtree


@pytest.mark.parametrize("recipe", ["full", "early-stopped"])
@pytest.mark.parametrize("steps", [7, pytest.param(range(0, 40, 3), marks=pytest.mark.slow)], ids=str)
def test_a_kill_while_checkpoints_rotate(folder: Path, recipe: str, steps: int | range, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken, right = unbroken_tuning(recipe)
    for number in [steps] if isinstance(steps, int) else steps:
        with monkeypatch.context() as patched:
            patched.setattr("shutil.rmtree", dying_removal(number))
            with pytest.raises(Death):
                run_tuning(folder, "out", every=0.0, **TUNINGS[recipe])
        partial = folder / ".out.partial"
        assert last_whole(partial)[0] is not None
        resumed = run_tuning(folder, "out", **TUNINGS[recipe])
        assert resumed.losses == unbroken.losses
        assert resumed.validation_losses == unbroken.validation_losses
        assert fingerprint(folder, "out") == right
        shutil.rmtree(folder / "out")
        assert not partial.exists()


PAST_ITS_BEST = TUNINGS["early-stopped"] | {"learning_rate": 0.05, "epochs": 5.0}


@pytest.mark.parametrize(
    "gone", ["best's weights", "newest's optimizer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("best", "newest", "both"))]
)
def test_a_best_checkpoint_that_is_gone_never_changes_the_end(folder: Path, gone: str) -> None:
    options = PAST_ITS_BEST
    unbroken, right = unbroken_tuning("early-stopped", epochs=5.0, learning_rate=0.05)
    best = 2 * (1 + int(np.argmin(unbroken.validation_losses)))
    assert best < unbroken.steps - 2
    partial = stopped(folder, unbroken.steps - 1, every=1e9, **options)
    newest = max(int(place.name.removeprefix("checkpoint-")) for place in partial.glob("checkpoint-*"))
    assert newest > best
    if gone in ("best", "both"):
        shutil.rmtree(partial / f"checkpoint-{best}")
    if gone == "best's weights":
        (partial / f"checkpoint-{best}" / "model.safetensors").unlink()
    if gone in ("newest", "both"):
        shutil.rmtree(partial / f"checkpoint-{newest}")
    if gone == "newest's optimizer":
        (partial / f"checkpoint-{newest}" / "optimizer.pt").unlink()
    resumed = run_tuning(folder, "out", every=1e9, **options)
    assert (resumed.losses, resumed.validation_losses) == (unbroken.losses, unbroken.validation_losses)
    assert fingerprint(folder, "out") == right


def test_without_its_best_checkpoint_a_run_would_end_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: other weights under the best checkpoint's name do change the end."""
    options = PAST_ITS_BEST
    unbroken, right = unbroken_tuning("early-stopped", epochs=5.0, learning_rate=0.05)
    best = 2 * (1 + int(np.argmin(unbroken.validation_losses)))
    partial = stopped(folder, unbroken.steps - 1, every=1e9, **options)
    shutil.copy(folder / "small" / "model.safetensors", partial / f"checkpoint-{best}")
    seal(partial / f"checkpoint-{best}")
    run_tuning(folder, "out", every=1e9, **options)
    assert fingerprint(folder, "out") != right


def test_a_run_that_was_moved_goes_on_to_its_own_best(folder: Path, tmp_path: Path) -> None:
    options = PAST_ITS_BEST
    unbroken, right = unbroken_tuning("early-stopped", epochs=5.0, learning_rate=0.05)
    partial = stopped(folder, unbroken.steps - 1, every=1e9, **options)
    partial.rename(folder / ".moved.partial")
    run_tuning(folder, "moved", every=1e9, **options)
    assert fingerprint(folder, "moved") == right


def test_leftovers_of_a_killed_save_are_no_part_of_the_result(folder: Path) -> None:
    left = folder / ".out.partial" / "result"
    left.mkdir(parents=True)
    (left / "adapter_config.json").write_text("{}")
    run_tuning(folder, "out")
    assert not (folder / "out" / "adapter_config.json").exists()
    assert is_whole(folder / "out")


# --- what a study keeps: tuned results, states, families, answers, records ---


def data_of(place: Path) -> StudyData:
    train = items(12)
    return StudyData(str(place / "base"), str(place / "small"), train, train, train, "{question}", "", 3, choose=False)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_damaged_result_is_made_again(folder: Path, method: str, caplog: pytest.LogCaptureFixture) -> None:
    tuning = Tuning(method=method, learning_rate=1e-2, epochs=1.0, batch_size=12, rank=2 if method == "lora" else None)  # type: ignore[arg-type]

    def tuned() -> Path:
        weights = tuned_weights(Group("expert", "arm", "arm"), tuning, data_of(folder), 0, folder / "study", TrainerCallback())
        return weights.adapter or Path(weights.path)

    result = tuned()
    weights = next(result.glob("*.safetensors"))
    contents, times = weights.read_bytes(), (result / "tuning.json").stat().st_mtime_ns
    assert tuned() == result
    assert (result / "tuning.json").stat().st_mtime_ns == times
    assert not caplog.records
    card = (result / "tuning.json").read_text()
    for file, damaged in [
        (weights, contents[:200]),
        (weights, contents[:-5] + bytes([contents[-5] ^ 64]) + contents[-4:]),
        (result / "tuning.json", card.replace("1", "2", 1).encode()),
        (result / "tuning.json", card[:99].encode()),
        (result / "tokenizer.json", b""),
    ]:
        file.write_bytes(damaged)
        caplog.clear()
        tuned()
        assert weights.read_bytes() == contents
        assert [record for record in caplog.records if f"'{result}' is damaged" in record.getMessage() and file.name in record.getMessage()]
        assert json.loads((result / "tuning.json").read_text())["report"]["losses"] == json.loads(card)["report"]["losses"]


@pytest.mark.parametrize("count", [pytest.param(20, id="few"), pytest.param(400, id="many", marks=pytest.mark.slow)])
def test_damaged_states_are_computed_again(folder: Path, tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture) -> None:
    member = load_member(folder / "small")
    rows = encode_examples(items(3), member.tokenizer, "{question}", "")
    given = [row["input_ids"] for row in rows]
    right = read_reference(member, rows, tmp_path / "states", "base").logits(given, member.model.device)
    (file,) = (tmp_path / "states").iterdir()
    whole = file.stat().st_mtime_ns
    read_reference(member, rows, tmp_path / "states", "base")
    assert file.stat().st_mtime_ns == whole
    assert not caplog.records
    for place in each_damage(tmp_path / "states", count, [file]):
        caplog.clear()
        logits = read_reference(member, rows, tmp_path / "states", "base").logits(given, member.model.device)
        assert (logits == right).all()
        assert caplog.records or place.stat().st_size  # a flip in the header's blanks may change nothing
    assert [kept.name for kept in (tmp_path / "states").iterdir()] == [file.name]


@pytest.fixture
def smallest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A family that takes a second."""
    pretraining = Pretraining(layers=1, hidden=8, heads=1, learning_rate=1e-2, epochs=1, block=24, batch_size=500)
    monkeypatch.setitem(WORLDS, "tiny", replace(WORLDS["tiny"], base=pretraining, small=pretraining))
    return build_family("tiny", 0, tmp_path)


@pytest.mark.parametrize("count", SIZES)
def test_a_damaged_family_is_built_again(smallest: Path, tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture) -> None:
    assert find_family("tiny", 0, tmp_path) == smallest
    assert not caplog.records
    said = {file: _says(file.read_bytes()) for file in smallest.rglob(DIGESTS)}
    seen = 0
    for file in each_damage(smallest, count):
        caplog.clear()
        found = find_family("tiny", 0, tmp_path)
        assert found is None or (file == smallest / DIGESTS and _says(file.read_bytes()) == said[file])
        if found is None:
            seen += 1
            assert f"'{smallest}' is damaged" in caplog.text
    assert seen > 20 * count
    assert find_family("tiny", 0, tmp_path) == smallest
    ledger = (smallest / "ledger.parquet").read_bytes()
    (smallest / "ledger.parquet").write_bytes(ledger[:-1])
    assert find_family("tiny", 0, tmp_path) is None
    build_family("tiny", 0, tmp_path)
    assert find_family("tiny", 0, tmp_path) == smallest
    assert (smallest / "ledger.parquet").read_bytes() == ledger
    assert [place.name for place in smallest.parent.iterdir()] == ["seed-0"]


def test_a_family_without_digests_is_taken_as_it_is(smallest: Path, tmp_path: Path) -> None:
    for digests in list(smallest.rglob(DIGESTS)):
        digests.unlink()
    (smallest / "base" / "config.json").write_text((smallest / "base" / "config.json").read_text() + "\n")
    assert find_family("tiny", 0, tmp_path) == smallest
    (smallest / "recipe.json").write_text("{")
    with pytest.raises(UserError, match=r"world: '.*recipe.json' cannot be read; remove the folder"):
        find_family("tiny", 0, tmp_path)


def test_a_damaged_shipped_family_is_an_error(smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "SHIPPED", tmp_path)
    assert find_family("tiny", 0, tmp_path / "elsewhere") == smallest
    for file in (smallest / "small" / "model.safetensors", smallest / DIGESTS):
        file.unlink()
        with pytest.raises(UserError, match=rf"^world: '.*' is damaged \(.*{file.name} is missing\); install proxytune again$"):
            find_family("tiny", 0, tmp_path / "elsewhere")


ANSWERS = {f"key-{number}": [float(number) / 7, number % 2 == 0] for number in range(300)}


@pytest.mark.parametrize("count", [pytest.param(60, id="few"), pytest.param(600, id="many", marks=pytest.mark.slow)])
def test_damaged_answers_are_asked_again(tmp_path: Path, count: int) -> None:
    Responses(tmp_path / "answers.db").put(ANSWERS)
    content = (tmp_path / "answers.db").read_bytes()
    lost = refused = aside = 0
    for number, damaged in enumerate(damages(content, count)):
        place = tmp_path / f"{number}.db"
        place.write_bytes(damaged)
        try:
            kept = Responses(place)
            found = {key: kept.get(key) for key in ANSWERS}
            assert all(value is None or value == ANSWERS[key] for key, value in found.items())
            lost += any(value is None for value in found.values())
            kept.put({key: ANSWERS[key] for key, value in found.items() if value is None})
            if (place.with_name(f"{number}.db.damaged")).exists():
                aside += 1
            else:
                assert all(kept.get(key) in (None, value) for key, value in ANSWERS.items())
        except UserError as error:
            refused += str(error).startswith(f"cache: '{place}' cannot be")
    assert lost > count
    assert aside
    assert refused < count // 4


def test_an_answer_is_bound_to_its_key_and_bytes(tmp_path: Path) -> None:
    kept = Responses(tmp_path / "answers.db")
    kept.put({"a": 1.25, "b": 2.5})
    file = sqlite3.connect(tmp_path / "answers.db")
    with file:
        file.execute("UPDATE responses SET value = (SELECT value FROM responses WHERE key = 'a') WHERE key = 'b'")
    assert (kept.get("a"), kept.get("b")) == (1.25, None)
    for value in ("1.5", "", 7, None, b"\xff"):
        with file:
            file.execute("INSERT OR REPLACE INTO responses VALUES ('a', ?)", ("null" if value is None else value,))
        assert kept.get("a") is None
    kept.put({"a": 1.5})
    assert kept.get("a") == 1.5
    assert Responses(tmp_path / "answers.db").get("a") == 1.5


def test_a_table_of_something_else_is_left_alone(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "other.db")
    with other:
        other.execute("CREATE TABLE responses (name TEXT)")
    with pytest.raises(UserError, match="cannot be opened as a file of answers"):
        Responses(tmp_path / "other.db")
    assert [place.name for place in tmp_path.iterdir()] == ["other.db"]


@pytest.mark.parametrize("count", [pytest.param(150, id="few"), pytest.param(4000, id="many", marks=pytest.mark.slow)])
def test_a_damaged_record_is_none(tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture) -> None:
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({"right": generator.random(50) < 0.5, "value": generator.random(50), "text": [f"w{number}" for number in range(50)]})
    write_record(tmp_path, "whole", frame, {"arm": "base", "digits": "_" * 64})
    found = read_record(tmp_path, "whole")
    assert found is not None
    pd.testing.assert_frame_equal(found[0], frame)
    assert found[1] == {"arm": "base", "digits": "_" * 64}
    assert pd.read_parquet(tmp_path / "whole.parquet").equals(frame)
    assert read_record(tmp_path, "nowhere") is None
    assert not caplog.records
    for file in each_damage(tmp_path, count):
        caplog.clear()
        assert read_record(tmp_path, "whole") is None
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert file.name in caplog.text
    assert read_record(tmp_path, "whole") is not None
