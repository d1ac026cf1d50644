"""A plain Lightning script, written for a GPU: two ranks without torchrun, no NeMo.

Also what test_accelerators.py trains. Started as a script it prints one JSON line a rank.
"""

import json
import sys

import lightning.pytorch as pl
import torch


class Line(pl.LightningModule):
    """y = A x, fitted; notes the dtype that a product has in the training step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)
        self.losses: list[float] = []
        self.dtypes: set[str] = set()

    def training_step(self, batch):
        out = self.layer(batch)
        self.dtypes.add(str(out.dtype))
        loss = (out.float() - batch.float().sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)

    def train_dataloader(self):
        data = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return torch.utils.data.DataLoader(data[rank::world], batch_size=16 // world)


def trainer(**given):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(**quiet | {"max_epochs": 3, "use_distributed_sampler": False} | given)


def main() -> None:
    model = Line()
    run = trainer(accelerator="gpu", devices=2, strategy="ddp")
    run.fit(model)
    weights = [round(value, 6) for value in model.layer.weight.flatten().tolist()]
    found = {"rank": run.global_rank, "world": run.world_size, "weights": weights, "losses": model.losses}
    sys.stdout.write(f"FOUND {json.dumps(found)}\n")


if __name__ == "__main__":
    main()
