"""Language models of moe-testbed: an encoder, a decoder or both, with or without experts.

This file lies beside the weights and needs torch and transformers alone. Weights are named as in moe-testbed.

Shape legend: B sequences, L positions, X those of what an encoder has read, T = B * L tokens, M model width, H heads, P
projected width, V token ids, E experts, K choices of a token, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, MaskedLMOutput, Seq2SeqLMOutput

NO_TARGET_LOGIT = -1e4
"""Logit of ids that no text has."""


class MoeTestbedConfig(PreTrainedConfig):
    """Sizes of a model.

    Args:
        vocab_size: rows of the embedding, special ids and unused ones included.
        num_targets: V of the output: ids from here on can be read and are never predicted.
        separate_embeddings: decoder and output layer have tables of their own.
        stacks: `encoder` or `decoder` or both -> `num_heads`; `dense_sizes`, the feed-forward width of each layer, 0
            for one with experts; and, if there are any, `num_experts`, `expert_size`, `top_k`, `shared_size`,
            `routers` (all layers have one, or the first decides for all),
            `scores` (softmax, logits, sigmoid, or a table of token ids), `normalise` and `scale`.
    """

    model_type = "moe_testbed"

    def __init__(
        self,
        vocab_size: int = 8,
        num_targets: int = 8,
        hidden_size: int = 8,
        num_hidden_layers: int = 1,
        norm_epsilon: float = 1e-6,
        rope_theta: float = 10_000.0,
        max_position_embeddings: int = 128,
        separate_embeddings: bool = False,
        stacks: dict[str, dict[str, Any]] | None = None,
        mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.num_targets, self.hidden_size = vocab_size, num_targets, hidden_size
        self.num_hidden_layers, self.norm_epsilon, self.rope_theta = num_hidden_layers, norm_epsilon, rope_theta
        self.max_position_embeddings, self.separate_embeddings = max_position_embeddings, separate_embeddings
        self.stacks, self.mask_token_id = stacks or {}, mask_token_id
        # There is one table, or there are several: no two that would have to be tied.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @property
    def first_stack(self) -> str:
        """The name of the stack that reads first. In a file the stacks are in the order of their names."""
        return "encoder" if "encoder" in self.stacks else "decoder"


class RMSNorm(nn.Module):
    """`x / rms(x) * w`, in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float() * (x.float().square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        return (scaled * self.weight.float()).to(x.dtype)


def rotated(x_BHLP: Tensor, theta: float) -> Tensor:
    """Queries or keys with their positions in them: features i and i + P / 2 turn by `l * theta ** (-2 i / P)`."""
    length, size = x_BHLP.shape[-2:]
    places = torch.arange(length, dtype=torch.float64, device=x_BHLP.device)
    features = torch.arange(0, size, 2, dtype=torch.float64, device=x_BHLP.device)
    angle = places[:, None] * theta ** (-features / size)
    cosine, sine = angle.cos().float(), angle.sin().float()
    first, second = x_BHLP.float().chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(x_BHLP.dtype)


class Attention(nn.Module):
    """Of the tokens of a text to one another."""

    def __init__(self, config: MoeTestbedConfig, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.theta = num_heads, config.rope_theta
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BLM: Tensor, seen_B1LL: Tensor) -> Tensor:
        query, key, value = (_heads(part, self.num_heads) for part in self.query_key_value(x_BLM).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(
            rotated(query, self.theta), rotated(key, self.theta), value, attn_mask=seen_B1LL
        )
        return self.output(mixed.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Of a decoder's tokens to what an encoder has made of its text, with the places in both."""

    def __init__(self, config: MoeTestbedConfig, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.theta = num_heads, config.rope_theta
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key_value = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BLM: Tensor, memory_BXM: Tensor, seen_B11X: Tensor) -> Tensor:
        key, value = (_heads(part, self.num_heads) for part in self.key_value(memory_BXM).chunk(2, dim=-1))
        query = rotated(_heads(self.query(x_BLM), self.num_heads), self.theta)
        mixed = F.scaled_dot_product_attention(query, rotated(key, self.theta), value, attn_mask=seen_B11X)
        return self.output(mixed.transpose(1, 2).flatten(2))


def _heads(x_BLM: Tensor, num_heads: int) -> Tensor:
    return x_BLM.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, size, bias=False)
        self.up = nn.Linear(hidden_size, size, bias=False)
        self.down = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Router(nn.Module):
    """Chooses K experts for each token, and weighs them, in float32. The bias counts in the choice alone."""

    table: Tensor
    selection_bias: Tensor

    def __init__(self, config: MoeTestbedConfig, stack: dict[str, Any]) -> None:
        super().__init__()
        self.scores, self.normalise, self.scale = stack["scores"], stack["normalise"], stack["scale"]
        self.top_k = stack["top_k"]
        experts = stack["num_experts"]
        if self.scores == "table":
            self.register_buffer("table", torch.zeros(config.vocab_size, self.top_k, dtype=torch.int64))
        else:
            self.scorer = nn.Linear(config.hidden_size, experts, bias=False)
            self.register_buffer("selection_bias", torch.zeros(experts))

    def forward(self, x_TM: Tensor, token_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the chosen experts and their weights, [T, K] each."""
        if self.scores == "table":
            chosen_TK = self.table[token_ids_T]
            return chosen_TK, torch.full(chosen_TK.shape, 1.0 / self.top_k, device=x_TM.device)
        logits_TE = F.linear(x_TM.float(), self.scorer.weight.float())
        affinity_TE = {"softmax": logits_TE.softmax(-1), "sigmoid": logits_TE.sigmoid(), "logits": logits_TE}[
            self.scores
        ]
        chosen_TK = (affinity_TE + self.selection_bias.float()).topk(self.top_k, dim=-1).indices
        weights_TK = affinity_TE.gather(-1, chosen_TK)
        if self.scores == "logits":
            weights_TK = weights_TK.softmax(-1)
        elif self.normalise:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return chosen_TK, self.scale * weights_TK


class Experts(nn.Module):
    """SwiGLU experts, [E, M, 2 F] and [E, F, M]: gate and up are side by side."""

    def __init__(self, number: int, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(0.02 * torch.randn(number, hidden_size, 2 * size))
        self.down = nn.Parameter(0.02 * torch.randn(number, size, hidden_size))

    def forward(self, x_TM: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum of the weighted outputs of each token's experts."""
        y_TM = torch.zeros_like(x_TM)
        for expert in range(len(self.gate_up)):
            token, choice = (chosen_TK == expert).nonzero(as_tuple=True)
            gate, up = (x_TM[token] @ self.gate_up[expert]).chunk(2, dim=-1)
            weighted = F.silu(gate) * up * weights_TK[token, choice, None].to(x_TM.dtype)
            y_TM = y_TM.index_add(0, token, weighted @ self.down[expert])
        return y_TM


class Block(nn.Module):
    """Attention, in a decoder with an encoder attention to that, then a feed-forward layer or experts."""

    def __init__(self, config: MoeTestbedConfig, stack: dict[str, Any], layer: int, decides: bool, cross: bool) -> None:
        super().__init__()
        width, heads = config.hidden_size, stack["num_heads"]
        self.attention_norm = RMSNorm(width, config.norm_epsilon)
        self.attention = Attention(config, heads)
        self.cross_attention = None
        if cross:
            self.cross_attention_norm = RMSNorm(width, config.norm_epsilon)
            self.cross_attention = CrossAttention(config, heads)
        self.feed_forward_norm = RMSNorm(width, config.norm_epsilon)
        self.dense = self.router = self.shared = None
        if size := stack["dense_sizes"][layer]:
            self.dense = FeedForward(width, size)
            return
        self.moe = Experts(stack["num_experts"], width, stack["expert_size"])
        if decides:
            self.router = Router(config, stack)
        if stack["shared_size"]:
            self.shared = FeedForward(width, stack["shared_size"])

    def forward(
        self,
        x_BLM: Tensor,
        token_ids_BL: Tensor,
        seen_B1LL: Tensor,
        memory: tuple[Tensor, Tensor] | None,
        decision: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Output, and the decision for the layers behind that have no router."""
        x_BLM = x_BLM + self.attention(self.attention_norm(x_BLM), seen_B1LL)
        if self.cross_attention is not None and memory is not None:
            x_BLM = x_BLM + self.cross_attention(self.cross_attention_norm(x_BLM), *memory)
        normed_BLM = self.feed_forward_norm(x_BLM)
        if self.dense is not None:
            return x_BLM + self.dense(normed_BLM), decision
        x_TM = normed_BLM.flatten(0, 1)
        if self.router is not None:
            decision = self.router(x_TM, token_ids_BL.flatten())
        assert decision is not None, "the first layer with experts decides"
        y_BLM = self.moe(x_TM, *decision).view_as(x_BLM)
        return x_BLM + (y_BLM if self.shared is None else y_BLM + self.shared(normed_BLM)), decision


class Stack(nn.Module):
    """An encoder, or a decoder: a table of its own if it is the first, blocks, and a norm."""

    main_input_name = "input_ids"

    def __init__(self, config: MoeTestbedConfig, name: str) -> None:
        super().__init__()
        stack = config.stacks[name]
        self.causal, is_first = name == "decoder", name == config.first_stack
        if is_first:
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(len(stack["dense_sizes"]))
        with_experts = [layer for layer in layers if not stack["dense_sizes"][layer]]
        deciding = with_experts[:1] if stack.get("routers") == "first" else with_experts
        self.blocks = nn.ModuleList(
            Block(config, stack, layer, layer in deciding, cross=not is_first) for layer in layers
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        table: nn.Embedding | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        **unused: Any,
    ) -> BaseModelOutput:
        """What the stack makes of a text, [B, L, M].

        Args:
            attention_mask: 0 for padding.
            table: what embeds the text; None: the stack's own.
            memory: an encoder's output and what of it is seen, [B, R, M] and [B, 1, 1, R].
        """
        x_BLM = (table or self.embedding)(input_ids)
        seen_B1LL = seen(input_ids, attention_mask)
        L = input_ids.shape[1]
        if self.causal:
            ones_LL = torch.ones(L, L, dtype=torch.bool, device=input_ids.device)
            # Padding in front sees itself: attention to nothing is no number.
            seen_B1LL = seen_B1LL & ones_LL.tril() | torch.eye(L, dtype=torch.bool, device=input_ids.device)
        decision = None
        for block in self.blocks:
            x_BLM, decision = block(x_BLM, input_ids, seen_B1LL, memory, decision)
        return BaseModelOutput(last_hidden_state=self.final_norm(x_BLM))


def seen(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which places can be looked at, bool [B, 1, 1, L]; all, where a text is nothing but padding."""
    mask_BL = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return (mask_BL | ~mask_BL.any(1, keepdim=True))[:, None, None]


class MoeTestbedPreTrainedModel(PreTrainedModel):
    """What the three models have in common."""

    config_class = MoeTestbedConfig
    _no_split_modules = ("Block",)

    def __init__(self, config: MoeTestbedConfig) -> None:
        super().__init__(config)
        for name in config.stacks:
            setattr(self, name, Stack(config, name))
        if config.separate_embeddings:
            if len(config.stacks) > 1:
                self.decoder_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
            self.output_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return getattr(self, self.config.first_stack).embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        getattr(self, self.config.first_stack).embedding = value

    def get_output_embeddings(self) -> None:
        return None

    def _logits(self, hidden_BLM: Tensor) -> Tensor:
        table = self.output_embedding if self.config.separate_embeddings else self.get_input_embeddings()
        targets = self.config.num_targets
        logits_BLV = hidden_BLM @ table.weight[:targets].t()
        return F.pad(logits_BLV, (0, self.config.vocab_size - targets), value=NO_TARGET_LOGIT)


class MoeTestbedForMaskedLM(MoeTestbedPreTrainedModel):
    """An encoder that predicts what is hidden."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **unused: Any
    ) -> MaskedLMOutput:
        hidden_BLM = self.encoder(input_ids, attention_mask).last_hidden_state
        logits_BLV = self._logits(hidden_BLM)
        loss = None if labels is None else F.cross_entropy(logits_BLV.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits_BLV, hidden_states=(hidden_BLM,))


class MoeTestbedForCausalLM(MoeTestbedPreTrainedModel, GenerationMixin):
    """A decoder that continues a text. It keeps nothing between the steps of `generate`."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **unused: Any
    ) -> CausalLMOutput:
        hidden_BLM = self.decoder(input_ids, attention_mask).last_hidden_state
        logits_BLV = self._logits(hidden_BLM)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits_BLV, hidden_states=(hidden_BLM,))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class MoeTestbedForConditionalGeneration(MoeTestbedPreTrainedModel, GenerationMixin):
    """A decoder that writes a text about what an encoder reads. It keeps nothing between the steps of `generate`, but
    what the encoder returned."""

    def get_encoder(self, *unused: Any, **unused_too: Any) -> Stack:
        return self.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> Seq2SeqLMOutput:
        """Logits of every place of `decoder_input_ids`, which are the labels, one place later, if they are not
        given."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        memory_BXM = encoder_outputs[0]
        seen_B11X = seen(memory_BXM[..., 0], attention_mask)
        if decoder_input_ids is None:
            assert labels is not None, "there are decoder_input_ids or labels"
            start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)
        hidden_BLM = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            table=self.decoder_embedding if self.config.separate_embeddings else self.get_input_embeddings(),
            memory=(memory_BXM, seen_B11X),
        ).last_hidden_state
        logits_BLV = self._logits(hidden_BLM)
        loss = None if labels is None else F.cross_entropy(logits_BLV.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(loss=loss, logits=logits_BLV, encoder_last_hidden_state=memory_BXM)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, encoder_outputs: Any = None, **unused: Any
    ) -> dict[str, Any]:
        return {"decoder_input_ids": input_ids, "attention_mask": attention_mask, "encoder_outputs": encoder_outputs}
