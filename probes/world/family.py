"""The world's model family: a tokenizer, a large model (base) and a small one, pretrained on one corpus.

The default world's families of ten seeds ship with the package, with the description, the corpus hash and the training log that made
each; `build_family` makes it again. What a family is and knows follows from its recipe and its seed alone.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TrainerCallback

from finetune.pretraining import KeepCheckpoints, pretrain
from probes.world.corpus import make_world, vocabulary
from probes.world.ledger import items_of, make_ledger, write_ledger
from probes.world.recipes import Recipe, recipe_of
from probes.world.types import World
from proxytune.digests import DIGESTS, find_damage, is_whole, publish, seal
from proxytune.errors import UserError

logger = logging.getLogger("proxytune")
SHIPPED = Path(__file__).parent / "families"
CHECKPOINTS = "checkpoints"  # the folder in a family's folder


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Word-level: one id a word, a BOS before every text, no end token of its own accord."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = {word: identifier for identifier, word in enumerate([*special, *vocabulary(recipe)])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])])
    names = dict(zip(["pad_token", "bos_token", "eos_token", "unk_token"], special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, padding_side="left", **names)


def build_family(name: str, seed: int, folder: Path, watcher: TrainerCallback | None = None, *, checkpoints: bool = False) -> Path:
    """Pretrains base and small model and writes `folder`/`name`/seed-N: two model folders, ledger.parquet, recipe.json, digests.

    With `checkpoints` also checkpoints/step-N, the base as it was on the way (`KeepCheckpoints`), and knowledge.jsonl to read them
    by; all else is the same bytes. A family that is there already, whole and of the recipe of that name, is kept as it is; another
    one is replaced. The folder appears whole or not at all. Where another process builds the same family, this one waits and takes
    what it made. Raises `UserError` for an unknown name.
    """
    recipe = recipe_of(name)
    target = family_folder(name, seed, folder)
    with _alone(target):
        if not _is_there(target, recipe, seed) or (checkpoints and not (target / CHECKPOINTS).exists()):
            scratch = target.with_name(f".{target.name}.partial")
            shutil.rmtree(scratch, ignore_errors=True)  # of a build that was killed
            try:
                _pretrain_into(scratch / "result", name, recipe, seed, watcher, checkpoints)
                publish(scratch / "result", target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


def _pretrain_into(result: Path, name: str, recipe: Recipe, seed: int, watcher: TrainerCallback | None, checkpoints: bool) -> None:
    world = make_world(recipe, seed)
    tokenizer = build_tokenizer(recipe)
    documents = [document.text for document in world.documents]
    losses = {}
    for model_name, pretraining in recipe.models.items():
        watchers = [] if watcher is None else [watcher]
        if checkpoints and model_name == "base":
            watchers.append(KeepCheckpoints(result / CHECKPOINTS, tokenizer))
        model, losses[model_name] = pretrain(pretraining, documents, tokenizer, seed=seed, scratch=result.with_name("trainer"), watchers=watchers)
        model.save_pretrained(result / model_name)
        tokenizer.save_pretrained(result / model_name)
        seal(result / model_name)
    write_ledger(world, result / "ledger.parquet")
    if checkpoints:
        items = items_of(make_ledger(world), "test")
        (result / "knowledge.jsonl").write_text("".join(item.model_dump_json(exclude_none=True) + "\n" for item in items))
    (result / "recipe.json").write_text(json.dumps(_description(name, recipe, world) | {"losses": losses}, indent=1) + "\n")


def find_family(name: str, seed: int, folder: Path, *, checkpoints: bool = False) -> Path | None:
    """The folder of a family that is shipped or was built into `folder`; None where it has yet to be built, or is damaged there.

    With `checkpoints` only a family that was built with them (`build_family`); none is shipped with them.
    A family without digests is taken as it is. Raises `UserError` for an unknown name, where a family's recipe or corpus is not
    today's one of that name and seed (its ledger would not be true of it), and where a shipped one is damaged.
    """
    recipe = recipe_of(name)
    for place in (SHIPPED, folder):
        family = family_folder(name, seed, place)
        if checkpoints and not (family / CHECKPOINTS).exists():
            continue
        if place == SHIPPED and family.exists() and (damage := find_damage(family)) is not None:
            raise UserError(f"world: '{family}' is damaged ({damage}); install proxytune again")
        if place != SHIPPED and (family / DIGESTS).exists() and not is_whole(family):
            return None
        if (family / "recipe.json").exists():
            _check_recipe(family, recipe, seed)
            return family
    return None


def family_folder(name: str, seed: int, folder: Path) -> Path:
    return folder / name / f"seed-{seed}"


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Waits until no other process builds the family `target`, and keeps others waiting until the block ends or the process dies.

    The lock is the system's on an open file, so that the empty file that stays behind locks nothing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent.with_name(f".{target.parent.name}-{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is building '%s'; waiting for it", target)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_there(family: Path, recipe: Recipe, seed: int) -> bool:
    """Whether a family is there, whole, and the recipe's."""
    if find_damage(family) is not None:
        return False
    try:
        _check_recipe(family, recipe, seed)
    except UserError:
        return False
    return True


def _check_recipe(family: Path, recipe: Recipe, seed: int) -> None:
    """Raises `UserError` where a family's recipe.json is not of this recipe and seed. Those from before recipes had a key have none."""
    try:
        found = json.loads((family / "recipe.json").read_bytes())
        key, made, corpus = found.get("recipe", recipe.key), found["models"], str(found["corpus_hash"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"world: '{family}/recipe.json' cannot be read; remove the folder, or build it with 'proxytune world build'") from error
    if key != recipe.key or made != {name: asdict(model) for name, model in recipe.models.items()}:
        raise UserError(f"world: '{family}' was made by another recipe of that name; build it again with 'proxytune world build'")
    if corpus != make_world(recipe, seed).corpus_hash:
        raise UserError(f"world: '{family}' was trained on another corpus ({corpus[:12]}); build it again with 'proxytune world build'")


def _description(name: str, recipe: Recipe, world: World) -> dict[str, object]:
    return {
        "recipe": recipe.key,
        "size": {"name": name} | recipe.corpus,
        "seed": world.seed,
        "corpus_hash": world.corpus_hash,
        "documents": len(world.documents),
        "models": {name: asdict(model) for name, model in recipe.models.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
    }
