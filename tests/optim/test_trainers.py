"""Drop-in: a fine-tune through transformers.Trainer and through Lightning, saved half-way and resumed bit for bit."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from steepest.optim import RandomLayers, build

METHODS = ("muon", "clipped_scion", "symmetry_stack", "drop_muon")
STEPS, HALF, BATCH = 30, 15, 4

transformers = pytest.importorskip("transformers", reason="the extra llm is not installed")


def tokens() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(32, (HALF * BATCH, 1), generator=generator)
    rows = (start + 3 * torch.arange(12)) % 32  # sequences that can be learned
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)  # with its dropout: the state of the random numbers counts


def optimizers(model: nn.Module, method: str) -> tuple[torch.optim.Optimizer, LambdaLR]:
    optimizer = build(model, method)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))


def check(method: str, whole: nn.Module, resumed: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    fresh = gpt2()
    for (name, p), q, start in zip(whole.named_parameters(), resumed.parameters(), fresh.parameters(), strict=True):
        assert p.isfinite().all() and not torch.equal(p, start), name
        assert torch.equal(p, q), name
    assert all(parameter.requires_grad for parameter in whole.parameters())
    if method == "drop_muon":
        assert isinstance(optimizer, RandomLayers) and optimizer.iteration == STEPS


def hugging_face(method: str, folder: Path, steps: int, resume: bool = False) -> Any:
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate, of the extra test")
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        save_steps=HALF,
        logging_steps=5,
        max_grad_norm=1.0,
        seed=0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    model = gpt2()
    trainer = transformers.Trainer(
        model=model, args=settings, train_dataset=tokens(), optimizers=optimizers(model, method)
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
    return trainer


@pytest.mark.parametrize("method", METHODS)
def test_transformers_trainer(method: str, tmp_path: Path) -> None:
    whole = hugging_face(method, tmp_path / "whole", STEPS)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert whole.state.global_step == STEPS
    resumed = hugging_face(method, tmp_path / "whole", STEPS, resume=True)
    inner = getattr(whole.optimizer, "optimizer", whole.optimizer)
    check(method, whole.model, resumed.model, inner)


def lightning(method: str, folder: Path, epochs: int, resume: Path | None = None) -> Any:
    library = pytest.importorskip("lightning", reason="Lightning is not installed (the extra test has it)")

    class Fine(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = gpt2()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.network(**batch).loss

        def configure_optimizers(self) -> Any:
            optimizer, schedule = optimizers(self.network, method)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    torch.manual_seed(0)
    module = Fine()
    module.network.config.loss_type = "ForCausalLM"
    for layer in module.network.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # Lightning does not keep the state of the random numbers
    trainer = library.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        default_root_dir=str(folder),
    )
    data = torch.utils.data.DataLoader(tokens(), batch_size=BATCH)  # pyright: ignore[reportArgumentType]
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume), weights_only=True)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return trainer


@pytest.mark.parametrize("method", METHODS)
def test_lightning_trainer(method: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers and logging
        whole = lightning(method, tmp_path, 2)
        lightning(method, tmp_path, 1)
        resumed = lightning(method, tmp_path, 2, tmp_path / "1.ckpt")
    assert whole.global_step == resumed.global_step == STEPS
    check(method, whole.lightning_module.network, resumed.lightning_module.network, resumed.optimizers[0])
