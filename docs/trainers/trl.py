"""MetaRM in TRL's RewardTrainer (TRL 1.16): J and the climb stand around the trainer's own step.

    bash run.sh                     # first: the paths below are the toy run's
    python docs/trainers/trl.py     # writes runs/trl, which ppo.py and eval.py read

The trap: with gradient accumulation, TRL takes several training steps per optimizer step. Each
would climb by the gradient of another part of S, so that is refused here.
"""

import random
import sys
from pathlib import Path

sys.path.pop(0)  # this file's folder, where `import trl` would find this very file
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

import data
import metarm
import rm


class MetaRewardTrainer(RewardTrainer):
    """samples: S, one list of k rows per prompt; eta, normalize: as in `metarm.lookahead`."""

    def __init__(self, *args, samples, eta, normalize=False, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.gradient_accumulation_steps > 1:
            fix = "set gradient_accumulation_steps=1 and a larger per_device_train_batch_size"
            raise ValueError(f"MetaRM climbs once for ALL pairs of a step: {fix}")
        self.samples, self.eta, self.normalize = samples, eta, normalize

    def training_step(self, model, inputs, *args, **kwargs):
        model.train()  # gradient checkpointing works in train mode only; TRL has turned dropout off
        # X_s: a seed per step and process, so that a resumed run draws the same.
        drawn = random.Random(f"{self.state.global_step} {self.args.process_index}")
        X_s = drawn.sample(self.samples, self.args.per_device_train_batch_size)
        rows = [row for group in X_s for row in group]
        batch = self._prepare_inputs(rm.collate(self.processing_class, rows))
        # J at theta (Eq. 2). `inputs` are X_t: TRL computes L on them (Eq. 4) inside the `with`.
        with self.compute_loss_context_manager():
            J = metarm.difference_loss(model(**batch).logits[:, 0].view(len(X_s), -1))
        self.accelerator.backward(J)
        # fp16 only: the GradScaler has multiplied grad J (a normalised climb does not feel it), and
        # it skips the step after an overflow.
        scaler = self.accelerator.scaler
        eta = self.eta
        if scaler and not self.normalize:
            eta = self.eta / scaler.get_scale()
        with metarm.lookahead(model, eta, self.normalize, scaler_follows=scaler is not None):
            return super().training_step(model, inputs, *args, **kwargs)


def ids(row, key):  # one encoding for D and S; TRL's own has no EOS where the pad token is EOS
    return sum(rm.encode(tokenizer, row["prompt"], row[key]), [])


try:
    # load_reward_model sees to a pad token that is not EOS, and to rewards in float32.
    model, tokenizer = rm.load_reward_model("runs/toy/sft", seed=0)
    pairs = data.read_preferences("runs/toy/pairs/train.jsonl")
    samples = data.read_meta("runs/toy/metarm-1/meta/samples.jsonl")
    _, S = rm.encode_groups(model, tokenizer, samples, "S")
except data.Mistake as error:  # a file that is missing or not as it should be
    sys.exit(f"trl.py: error: {error}")
D = [{f"{key}_ids": ids(row, key) for key in ("chosen", "rejected")} for row in pairs]
cpu = not torch.cuda.is_available()
config = RewardConfig("runs/trl", max_steps=3, per_device_train_batch_size=4, use_cpu=cpu)
trainer = MetaRewardTrainer(
    model=model,
    args=config,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(D),
    samples=S,
    eta=0.02,
    normalize=True,
)
trainer.train()
trainer.save_model()
