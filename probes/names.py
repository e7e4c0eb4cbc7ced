"""What density needs at names: the spread of states and neurons at a name's last token and at its sentence's last token.

Costs one forward pass of the model per sentence. Memory: one batch. Every number is a mean over the sentences that carry a name.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float

from probes.density import random_rotation, spread
from probes.internals.activations import read_states
from probes.knowledge.entities import Carried
from proxytune.member import Member

SITES = ("residual", "attention", "mlp", "neurons", "rotated")
PLACES = ("entity", "last")


def read_names(
    model: Member, carried: Sequence[Sequence[Carried]], *, batch_size: int, progress: Callable[[int], None] = lambda sentences_done: None
) -> dict[tuple[str, str, str], Float[np.ndarray, "names places states"]]:
    """`carried` has the same number of sentences for every name. Keyed by metric, cut (see `density.spread`) and site.

    Sites: `residual`, `attention` and `mlp` (what each adds), `neurons` (the input of the MLP's last projection) and `rotated` (the
    residual stream in another orthogonal basis). Attention, MLP and neurons have one state per layer, the others also that of the
    embeddings. Raises `UserError` for an architecture whose MLPs have no one last projection.
    """
    sentences = [sentence for of_name in carried for sentence in of_name]
    rotation = random_rotation(model.model.config.get_text_config().hidden_size, 0).to(model.model.device)
    prompts, positions = [sentence.ids for sentence in sentences], [[sentence.last, -1] for sentence in sentences]
    found: dict[tuple[str, str, str], np.ndarray] = {}
    for states in read_states(model.model, prompts, positions, batch_size=batch_size, pad=int(model.tokenizer.pad_token_id), neurons=True):
        assert states.neurons is not None
        with torch.inference_mode():
            vectors = (states.residual, states.attention, states.mlp, states.neurons, states.residual @ rotation)
            for site, of_site in zip(SITES, vectors, strict=True):
                for (metric, cut), values in spread(of_site).items():
                    kept = found.setdefault((metric, cut, site), np.full((len(sentences), *values.shape[1:]), np.nan))
                    kept[states.indices] = values.double().cpu().numpy()
        progress(len(states.indices))
    return {key: values.reshape(len(carried), -1, *values.shape[1:]).mean(axis=1) for key, values in found.items()}
