"""The Llama of the benchmark is transformers' Llama, compiled or not; compiled, a graph serves all its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.bench import decode, llama
from compress.bench.layers import Setting

SIZES = llama.Model(layers=2, hidden=64, intermediate=96, heads=4, vocabulary=50)
BATCH, PROMPT, STEPS = 3, 6, 5


class Counting:
    """A backend that compiles nothing, and the number of graphs that it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is compiled yet, nothing needs a gradient."""
    torch.manual_seed(0)
    torch.compiler.reset()
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def original() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=SIZES.hidden,
        intermediate_size=SIZES.intermediate,
        num_hidden_layers=SIZES.layers,
        num_attention_heads=SIZES.heads,
        vocab_size=SIZES.vocabulary,
        rms_norm_eps=llama.EPSILON,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    made = LlamaForCausalLM(config).eval()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return made


def copied(original: Any) -> llama.Llama:
    """With its weights."""
    made, source = llama.Llama(SIZES).eval(), original.model
    made.embedding.weight.copy_(source.embed_tokens.weight)
    made.norm.copy_(source.norm.weight)
    made.lm_head.weight.copy_(original.lm_head.weight)
    for block, layer in zip(made.blocks, source.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        both = attention.q_proj, attention.k_proj, attention.v_proj
        block.attention_norm.copy_(layer.input_layernorm.weight)
        block.qkv.weight.copy_(torch.cat([part.weight for part in both]))
        block.out.weight.copy_(attention.o_proj.weight)
        block.mlp_norm.copy_(layer.post_attention_layernorm.weight)
        block.gate_up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        block.down.weight.copy_(mlp.down_proj.weight)
    return made


@pytest.mark.parametrize("parts", [llama.STEP, llama.compiled("aot_eager")], ids=["eager", "compiled"])
def test_it_is_the_llama_of_transformers(original: Any, parts: llama.Parts) -> None:
    made, tokens = copied(original), torch.randint(0, SIZES.vocabulary, (BATCH, PROMPT))
    cache, positions = made.cache(BATCH, 16), torch.arange(16)
    logits = made(tokens, positions[:PROMPT], cache, llama.PROMPT)
    for place in range(PROMPT, PROMPT + STEPS):
        expected: Tensor = original(tokens).logits[:, -1]
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        chosen = logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], 1)
        logits = made(chosen, positions[place : place + 1], cache, parts)
    torch.testing.assert_close(logits, original(tokens).logits[:, -1], rtol=0, atol=1e-4)


def test_a_prompt_is_many_steps(original: Any) -> None:
    made, tokens = copied(original), torch.randint(0, SIZES.vocabulary, (BATCH, PROMPT))
    one, other, positions = made.cache(BATCH, 16), made.cache(BATCH, 16), torch.arange(16)
    together = made(tokens, positions[:PROMPT], one, llama.PROMPT)
    for place in range(PROMPT):
        last = made(tokens[:, place : place + 1], positions[place : place + 1], other, llama.STEP)
    torch.testing.assert_close(last, together, rtol=0, atol=1e-4)
    for mine, theirs in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
        assert mine.count_nonzero() == mine.numel() * PROMPT // 16


@pytest.mark.parametrize("method", ["dense", "w4", "spqr", "int8", "sparse-w4"])
def test_a_graph_serves_all_blocks(method: str) -> None:
    setting = Setting("cpu", torch.float32 if method == "dense" else torch.float16, std=0.05)
    sizes = llama.Model(layers=12, hidden=128, intermediate=128, heads=2, vocabulary=32)
    backend = Counting()
    model, parts = decode.build(sizes, method, setting), llama.compiled(backend)
    for batch, graphs in ((1, 4), (2, 8)):
        decoder = decode.Decoder(model, batch, 16, parts)
        decoder.prefill(torch.zeros(batch, 2, dtype=torch.long))
        for _ in range(3):
            decoder.step()
        assert backend.graphs == graphs  # norm, add, attend and gate, for each batch


def test_kinds_of_layers_share_graphs() -> None:
    sizes, setting = llama.Model(2, 128, 128, 2, 32), Setting("cpu", torch.float16, std=0.05)
    backend = Counting()
    for method in ("dense", "w4", "nf4"):
        decoder = decode.Decoder(decode.build(sizes, method, setting), 1, 16, llama.compiled(backend))
        decoder.step()
    assert backend.graphs == 4
