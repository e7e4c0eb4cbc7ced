"""Decoding-time logit arithmetic: members, mixtures of them, generation and scoring.

Knows token ids, logits and caches only.
"""

from proxytune.bias import Bias as Bias
from proxytune.drafting import rounded_draft as rounded_draft
from proxytune.errors import UserError as UserError
from proxytune.exported import export as export
from proxytune.member import Member as Member
from proxytune.member import Weights as Weights
from proxytune.member import fingerprint as fingerprint
from proxytune.member import load_member as load_member
from proxytune.member import load_members as load_members
from proxytune.member import load_tokenizer as load_tokenizer
from proxytune.mixture import Context as Context
from proxytune.mixture import Mixture as Mixture
from proxytune.mixture import Rule as Rule
from proxytune.mixture import combine as combine
from proxytune.mixture import pair as pair
from proxytune.mixture import proxy_tuning as proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM as ProxyTunedForCausalLM
from proxytune.prepacked import prepack_linear_layers as prepack_linear_layers
from proxytune.scoring import Request as Request
from proxytune.scoring import cut_to_window as cut_to_window
from proxytune.scoring import score as score
from proxytune.scoring import score_greedily as score_greedily
from proxytune.speculation import SpeculationReport as SpeculationReport
from proxytune.token_map import TokenMap as TokenMap
from proxytune.token_map import map_tokens as map_tokens
from proxytune.vocabulary import check_same_vocabulary as check_same_vocabulary
