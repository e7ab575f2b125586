"""The models as transformers, PEFT and its Trainer train them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_layouts import save_layout
from tiny_models import VERSIONS, official_weights, save, save_own_tokenizer
from torch import Tensor

from rwkv_stream.model import load

transformers = pytest.importorskip("transformers", reason="no transformers: pip install 'rwkv-stream[transformers]'")
peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from rwkv_stream.transformers import RwkvStreamForCausalLM  # noqa: E402

TEXT = b"The keeper of the lamp wrote it down, and the sea wrote it again. "
MATRICES = ["receptance", "key", "value", "output"]

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(
    folder: Path, version: str = "7", dtype: torch.dtype = torch.float32, vocab_size: int = 256
) -> RwkvStreamForCausalLM:
    weights = official_weights(version=version, n_embd=32, head_size=16, d_ffn=64, vocab_size=vocab_size)
    path = save(weights, folder / "model.pth", dtype)
    return RwkvStreamForCausalLM.from_pretrained(path, device="cpu")


def rows(n: int = 4, T: int = 21) -> Tensor:
    return torch.tensor([list((TEXT * 2)[i : i + T]) for i in range(n)])


def steps(model: torch.nn.Module, n: int, rate: float = 0.01) -> list[float]:
    optimizer = torch.optim.AdamW([z for z in model.parameters() if z.requires_grad], lr=rate)
    losses = []
    for _ in range(n):
        loss = model(rows(), labels=rows()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_are_those_of_the_loss(version: str, tmp_path: Path) -> None:
    """Of every parameter; along their direction the loss rises as they say."""
    model = model_of(tmp_path, version)
    expected = model(rows(), labels=rows()).loss
    model.train()
    loss = model(rows(), labels=rows()).loss
    assert abs(loss.item() - expected.item()) < 1e-4
    loss.backward()
    gradients = {name: z.grad for name, z in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in gradients.values())
    norm = sum(float(grad.square().sum()) for grad in gradients.values()) ** 0.5
    step, losses = 5e-4 / norm, []
    for sign in (1, -2):
        with torch.no_grad():
            for name, z in model.named_parameters():
                z += sign * step * gradients[name]
            losses.append(model(rows(), labels=rows()).loss.item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(norm**2, rel=0.02)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_trained_reads_is_saved_and_loaded(version: str, tmp_path: Path) -> None:
    save_own_tokenizer(tmp_path / "tokenizer.json", vocab_size=384)
    model = model_of(tmp_path, version, torch.bfloat16, vocab_size=384)
    assert {z.dtype for z in model.parameters()} == {torch.bfloat16}, "as the file has them"
    before = model(rows()).logits
    model.train()
    assert {z.dtype for z in model.parameters()} == {torch.float32}
    losses = steps(model, 3)
    assert losses[2] < losses[0]
    trained = model(rows()).logits
    model.eval()
    assert not model(rows()).logits.requires_grad
    torch.testing.assert_close(model(rows()).logits, trained.detach(), rtol=0, atol=1e-4)
    assert (before - trained).abs().max() > 0.01
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device="cpu")
    assert torch.equal(again(rows()).logits, model(rows()).logits)
    assert again.rwkv.fingerprint == model.rwkv.fingerprint == load(tmp_path / "saved", device="cpu").fingerprint
    assert again.rwkv.tokenizer.id == model.rwkv.tokenizer.id
    assert [*again.state_dict()] == [*model.state_dict()]


def test_the_norm_of_heads_is_saved_with_its_eps(tmp_path: Path) -> None:
    folder = save_layout(tmp_path / "fla", official_weights(n_layer=3, head_size=32), "7", "fla_7")
    model = RwkvStreamForCausalLM.from_pretrained(folder, device="cpu")
    assert model.rwkv.config.group_norm_eps != 64e-5
    model.save_pretrained(tmp_path / "saved")
    again = RwkvStreamForCausalLM.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.rwkv.config == model.rwkv.config


def test_a_tuned_state_is_a_parameter(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    state = {f"blocks.{i}.att.time_state": torch.randn(2, 16, 16) for i in range(2)}
    torch.save(state, tmp_path / "state.pth")
    model = RwkvStreamForCausalLM.from_pretrained(model.rwkv.path, device="cpu", initial_state=tmp_path / "state.pth")
    expected = model(rows()).logits
    model.train()
    output = model(rows(), labels=rows())
    torch.testing.assert_close(output.logits.detach(), expected, rtol=0, atol=1e-4)
    output.loss.backward()
    assert all(model.get_parameter(name).grad.any() for name in state)
    model.save_pretrained(tmp_path / "saved")
    again = RwkvStreamForCausalLM.from_pretrained(tmp_path / "saved", device="cpu")
    assert torch.equal(again(rows()).logits, expected)


def test_a_state_dict_takes_the_place_of_the_parameters(tmp_path: Path) -> None:
    model, other = (
        model_of(folder) for folder in (tmp_path, tmp_path / "other") if folder.mkdir(exist_ok=True) is None
    )
    other.train()
    steps(other, 1)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(rows()).logits, other.eval()(rows()).logits)
    fresh = RwkvStreamForCausalLM.from_pretrained(model.rwkv.path, device="cpu")
    assert not torch.equal(fresh(rows()).logits, model(rows()).logits), "the file is as it was"


@pytest.mark.parametrize("version", VERSIONS)
def test_lora_by_peft(version: str, tmp_path: Path) -> None:
    base = model_of(tmp_path, version)
    before = base(rows()).logits
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=MATRICES, task_type="CAUSAL_LM"))
    assert torch.allclose(model.eval()(rows()).logits.detach(), before, atol=1e-4), "a LoRA begins at nothing"
    model.train()
    frozen = {name: z.clone() for name, z in model.named_parameters() if not z.requires_grad}
    losses = steps(model, 3)
    assert losses[2] < losses[0]
    assert all(torch.equal(z, frozen[name]) for name, z in model.named_parameters() if name in frozen)
    model.eval()
    expected = model(rows()).logits.detach()
    assert (expected - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    assert isinstance(merged, RwkvStreamForCausalLM) and not merged(rows()).logits.requires_grad
    torch.testing.assert_close(merged(rows()).logits, expected, rtol=0, atol=1e-4)
    fresh = RwkvStreamForCausalLM.from_pretrained(tmp_path / "model.pth", device="cpu")
    at_once = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(at_once(rows()).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_epoch_of_the_trainer(precision: str, tmp_path: Path) -> None:
    model = model_of(tmp_path)
    given = [{"input_ids": row, "labels": row} for row in rows(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="epoch",
        eval_strategy="epoch",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        bf16=precision == "bf16",
        seed=0,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=given, eval_dataset=given[:4])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    log: list[dict[str, Any]] = trainer.state.log_history
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 4
    assert losses[0] == pytest.approx(before, rel=0.2)
    after = next(row["eval_loss"] for row in reversed(log) if "eval_loss" in row)
    assert after < before - 0.1
    saved = RwkvStreamForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4", device="cpu")
    with torch.no_grad():
        assert torch.equal(saved(rows()).logits, model.eval()(rows()).logits)
