"""The embedded world: a synthetic corpus whose every exposure is counted, and a family of models pretrained on it."""

from probes.world.corpus import SIZES as SIZES
from probes.world.corpus import World as World
from probes.world.corpus import WorldSize as WorldSize
from probes.world.corpus import make_world as make_world
from probes.world.family import build_family as build_family
from probes.world.family import find_family as find_family
from probes.world.ledger import items_of as items_of
from probes.world.ledger import make_ledger as make_ledger
