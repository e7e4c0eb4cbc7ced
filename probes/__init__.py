"""What tuning did to a model: what it still knows, what changed inside it, and where; and worlds with counted exposure.

A probe takes models and items and returns scores. It writes no results, and only `recoverability` trains.
"""

from probes.density import density as density
from probes.drift import divergence as divergence
from probes.drift import weight_drift as weight_drift
from probes.inside import read_inside as read_inside
from probes.internals.activations import read_states as read_states
from probes.internals.blocks import random_delta as random_delta
from probes.knowledge.candidates import known as known
from probes.knowledge.counts import count_documents as count_documents
from probes.knowledge.exposure import matched_contrast as matched_contrast
from probes.knowledge.exposure import rank_correlation as rank_correlation
from probes.knowledge.familiarity import familiarity as familiarity
from probes.knowledge.readouts import choose as choose
from probes.knowledge.readouts import continuations as continuations
from probes.lens import fit_translators as fit_translators
from probes.lens import read_lens as read_lens
from probes.linear_probe import linear_probe as linear_probe
from probes.patching import patch_subject as patch_subject
from probes.recoverability import Relearning as Relearning
from probes.recoverability import relearn as relearn
from probes.restoration import restorations as restorations
from probes.restoration import restore as restore
from probes.restoration import shapley as shapley
from probes.verdict import verdict as verdict
