"""What trainers need: loss, logits_to_keep, gradient checkpointing, adapters."""

from pathlib import Path

import pytest
import torch

from tests.model.longcat2_tiny import SHAPE, tiny, tokens


def test_loss_is_the_shifted_cross_entropy() -> None:
    model, ids = tiny(), tokens(3, 8)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3, -100)
    with torch.no_grad():
        out = model(ids, labels=labels)
        summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    logprobs = out.logits[:, :-1].log_softmax(-1)
    kept = labels[:, 1:] != -100
    picked = logprobs.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)[kept]
    assert abs(float(out.loss + picked.mean())) < 1e-6
    assert abs(float(summed * 100 + picked.sum())) < 1e-4


def test_logits_to_keep() -> None:
    model, ids = tiny(), tokens(2, 8)
    with torch.no_grad():
        full = model(ids).logits
        assert torch.allclose(model(ids, logits_to_keep=3).logits, full[:, -3:], atol=1e-6)
        assert torch.allclose(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]], atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    ids, gradients = tokens(2, 9), []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.model.layers)
        model(ids, labels=ids, use_cache=True).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_training_mode_makes_no_cache_unless_asked() -> None:
    model, ids = tiny(), tokens(1, 4)
    assert model.train()(ids).past_key_values is None
    assert model.eval()(ids).past_key_values.get_seq_length() == 4


def test_inputs_embeds_without_ngram_and_tuple_output() -> None:
    model, ids = tiny(ngram=False), tokens(2, 6)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
        assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)


def test_lora_adapters_work_on_every_linear_and_in_both_paths(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, ids = tiny(seed=3), tokens(2, 7)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    targets += ["gate_proj", "up_proj", "down_proj", "classifier"]
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=[*targets, "oe_embed_proj0"], init_lora_weights=False)
    )
    wrapped.eval()
    logits = {}
    with torch.no_grad():
        for path in ("naive", "absorbed"):
            model.set_attention_path(path)
            logits[path] = wrapped(input_ids=ids, use_cache=False).logits
        assert (logits["naive"] - logits["absorbed"]).abs().max() < 1e-4
        assert (logits["naive"] - plain).abs().max() > 1e-2
        merged = wrapped.merge_and_unload()
        assert (merged(ids, use_cache=False).logits - logits["naive"]).abs().max() < 1e-4


def test_lora_gets_gradients_and_the_base_none() -> None:
    peft = pytest.importorskip("peft")
    model, ids = tiny(seed=3).train(), tokens(2, 7)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_b_proj", "kv_b_proj"]))
    wrapped(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in wrapped.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_a_few_steps_memorise_a_batch() -> None:
    torch.manual_seed(0)
    from posttrain.model import Longcat2Config, Longcat2ForCausalLM

    model = Longcat2ForCausalLM(
        Longcat2Config(**SHAPE, oe_vocab_size_ratio=3.5, oe_neighbor_num=3, oe_split_num=1)
    ).train()
    ids = tokens(4, 16, low=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.9 and losses[-1] < 0.1


@pytest.mark.parametrize("packing", [False, True])
def test_trl_sft_trainer_accepts_the_model(packing: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(SHAPE["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), eos_token="w2", pad_token="w3"
    )
    model = tiny(seed=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = Dataset.from_dict({"input_ids": [tokens(1, 5 + i, seed=i)[0].tolist() for i in range(6)]})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        packing=packing,
        max_length=24,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    assert 2 < trainer.train().training_loss < 8
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
