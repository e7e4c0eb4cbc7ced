"""What tuning did to a model: read-outs of what it knows, forgetting by exposure, density of its states; and the world.

A probe takes models and items and returns scores: it trains nothing and writes nothing.
"""

from probes.density import density as density
from probes.density import erosion_verdict as erosion_verdict
from probes.density import gaussian_null as gaussian_null
from probes.forgetting import familiarity as familiarity
from probes.readouts import answer_greedily as answer_greedily
from probes.readouts import choose as choose
