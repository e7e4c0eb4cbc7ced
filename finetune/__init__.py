"""LoRA and full fine-tuning, fitted logit biases, and pretraining of small models. Changes weights; scores nothing."""

from finetune.formats import read_items as read_items
from finetune.items import Item as Item
from finetune.logit_bias import fit_logit_bias as fit_logit_bias
from finetune.logit_bias import read_bias as read_bias
from finetune.pretraining import Pretraining as Pretraining
from finetune.pretraining import pretrain as pretrain
from finetune.pretraining import untrained as untrained
from finetune.recipe import BiasTuning as BiasTuning
from finetune.recipe import EarlyStopping as EarlyStopping
from finetune.recipe import Tuning as Tuning
from finetune.recipe import TuningRun as TuningRun
from finetune.tuning import TuningReport as TuningReport
from finetune.tuning import tune as tune
