"""Worlds: synthetic corpora whose every exposure is counted, and families of models pretrained on them."""

from probes.world.corpus import make_world as make_world
from probes.world.family import build_family as build_family
from probes.world.family import find_family as find_family
from probes.world.ledger import items_of as items_of
from probes.world.ledger import make_ledger as make_ledger
from probes.world.recipes import RECIPES as RECIPES
from probes.world.recipes import Recipe as Recipe
from probes.world.types import World as World
