"""The world's model family: a tokenizer, a large model (base) and a small one, pretrained on one corpus.

The default family of three seeds ships with the package, with the recipe, the corpus hash and the training log that made
it; `build_family` makes it again. What a family is and knows follows from its size's name and its seed alone.
"""

import json
import tempfile
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TrainerCallback

from finetune.pretraining import KeepCheckpoints, Pretraining, pretrain
from probes.world.corpus import SIZES, World, make_world, vocabulary
from probes.world.ledger import items_of, make_ledger, write_ledger
from proxytune.digests import DIGESTS, find_damage, is_whole, publish, seal
from proxytune.errors import UserError

RECIPES = {
    "default": {
        "base": Pretraining(layers=4, hidden=96, heads=4, learning_rate=2e-3, epochs=5),
        "small": Pretraining(layers=2, hidden=48, heads=4, learning_rate=4e-3, epochs=5),
    },
    "tiny": {
        "base": Pretraining(layers=3, hidden=48, heads=4, learning_rate=6e-3, epochs=12),
        "small": Pretraining(layers=2, hidden=32, heads=4, learning_rate=8e-3, epochs=12),
    },
}
SHIPPED = Path(__file__).parent / "families"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level: one id a word, a BOS before every text, no end token of its own accord."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = {word: identifier for identifier, word in enumerate([*special, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])])
    names = dict(zip(["pad_token", "bos_token", "eos_token", "unk_token"], special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, padding_side="left", **names)


@cache
def world_of(size: str, seed: int) -> World:
    """The people and documents behind a family. Raises `UserError` for an unknown size."""
    if size not in SIZES:
        raise UserError(f"world: there is no size '{size}'; the sizes are {', '.join(SIZES)}")
    return make_world(SIZES[size], seed)


def build_family(size: str, seed: int, folder: Path, watcher: TrainerCallback | None = None, *, checkpoints: bool = False) -> Path:
    """Pretrains base and small model and writes `folder`/`size`/seed-N: two model folders, ledger.parquet, recipe.json, digests.

    With `checkpoints` also checkpoints/step-N, the base as it was on the way (`KeepCheckpoints`), and knowledge.jsonl to read them
    by; all else is the same bytes.
    The folder appears whole or not at all.
    """
    world = world_of(size, seed)
    tokenizer = build_tokenizer()
    target = family_folder(size, seed, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    documents = [document.text for document in world.documents]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        result = Path(scratch) / "result"
        losses = {}
        for name, recipe in RECIPES[size].items():
            watchers = [] if watcher is None else [watcher]
            if checkpoints and name == "base":
                watchers.append(KeepCheckpoints(result / "checkpoints", tokenizer))
            model, losses[name] = pretrain(recipe, documents, tokenizer, seed=seed, scratch=Path(scratch) / "trainer", watchers=watchers)
            model.save_pretrained(result / name)
            tokenizer.save_pretrained(result / name)
            seal(result / name)
        write_ledger(world, result / "ledger.parquet")
        if checkpoints:
            items = items_of(make_ledger(world), "test")
            (result / "knowledge.jsonl").write_text("".join(item.model_dump_json(exclude_none=True) + "\n" for item in items))
        (result / "recipe.json").write_text(json.dumps(_recipe(size, world) | {"losses": losses}, indent=1) + "\n")
        publish(result, target)
    return target


def find_family(size: str, seed: int, folder: Path) -> Path | None:
    """The folder of a family that is shipped or was built into `folder`; None where it has yet to be built, or is damaged there.

    A family without digests is taken as it is. Raises `UserError` where its corpus is not the one that today's code draws (its
    ledger would not be true of it), and where a shipped one is damaged.
    """
    for place in (SHIPPED, folder):
        family = family_folder(size, seed, place)
        if place == SHIPPED and family.exists() and (damage := find_damage(family)) is not None:
            raise UserError(f"world: '{family}' is damaged ({damage}); install proxytune again")
        if place != SHIPPED and (family / DIGESTS).exists() and not is_whole(family):
            return None
        if not (family / "recipe.json").exists():
            continue
        try:
            found = str(json.loads((family / "recipe.json").read_bytes())["corpus_hash"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"world: '{family}/recipe.json' cannot be read; remove the folder, or build it with 'proxytune world build'") from error
        if found != world_of(size, seed).corpus_hash:
            raise UserError(f"world: '{family}' was trained on another corpus ({found[:12]}); build it again with 'proxytune world build'")
        return family
    return None


def family_folder(size: str, seed: int, folder: Path) -> Path:
    return folder / size / f"seed-{seed}"


def _recipe(size: str, world: World) -> dict[str, object]:
    return {
        "size": {"name": size} | asdict(world.size),
        "seed": world.seed,
        "corpus_hash": world.corpus_hash,
        "documents": len(world.documents),
        "models": {name: asdict(recipe) for name, recipe in RECIPES[size].items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
    }
