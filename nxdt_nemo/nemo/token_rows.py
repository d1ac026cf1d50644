"""NeMo's GPT on rows of token ids: `model.data.data_impl: arrow`, which NxD Training's `data.train_dir` becomes.

Room nemo/. A subclass, no patch: nxdt_nemo/nemo/examples/megatron_pretraining.py takes it where the configuration says
so. Proof: tests/nemo/test_hf_source.py.
"""

from __future__ import annotations

from typing import Any

from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

from nxdt_nemo.data.arrow import TokenRows
from nxdt_nemo.errors import ConfigError

__all__ = ["MegatronGPTRowsModel"]

SEED = 1234  # of NeMo's configurations


class MegatronGPTRowsModel(MegatronGPTModel):
    """Reads model.data.data_prefix.{train, validation, test}, a folder each, in place of Megatron's .bin and .idx.

    Rows are shuffled anew in each epoch, from model.seed, or 1234; model.data.shuffle_documents=False keeps the
    folder's order. Token ids need no tokenizer: model.tokenizer.library "null" says with vocab_size how many there
    are.
    """

    def _build_tokenizer(self) -> None:
        if self.cfg.tokenizer.get("library") != "null":
            super()._build_tokenizer()
            return
        size = self.cfg.tokenizer.get("vocab_size")
        if size is None:
            fix = "give the vocab_size of the model's config.json"
            raise ConfigError("model.tokenizer.vocab_size is not set, and no tokenizer says it", fix=fix)
        self.tokenizer = NullTokenizer(size - 1)  # which counts an end of text of its own

    def build_train_valid_test_datasets(self) -> tuple[Any, ...]:
        """NeMo's hook, called by setup on every rank; a split that has no folder is left out."""
        trainer, batch = self.trainer, self.cfg.global_batch_size
        validations = int(trainer.max_steps // trainer.val_check_interval) + 1
        held = trainer.limit_val_batches
        counts = {
            "train": trainer.max_steps * batch,
            "validation": None if isinstance(held, float) else validations * held * batch,
            "test": int(trainer.limit_test_batches * batch),
        }
        names = {"train": "_train_ds", "validation": "_validation_ds", "test": "_test_ds"}
        made = {split: self._rows(split, count) for split, count in counts.items() if count != 0}
        for split, rows in made.items():
            if rows is not None:
                setattr(self, names[split], rows)
        return tuple(made.get(split) for split in names)

    def _rows(self, split: str, samples: int | None) -> TokenRows | None:
        folders = self.cfg.data.data_prefix.get(split)
        if not folders:
            return None
        shuffled = split == "train" and self.cfg.data.get("shuffle_documents", True)
        length, vocab = self.cfg.data.seq_length, self.tokenizer.vocab_size
        seed = self.cfg.get("seed")
        seed = SEED if seed is None else seed
        return TokenRows(folders[0], length, vocab, samples=samples, seed=seed if shuffled else None)
