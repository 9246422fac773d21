"""Train a small Mixture-of-Experts language model from scratch on a CPU, for demonstrations and measurements.

    python examples/train_tiny_moe.py OUT                                the built-in text, no download
    python examples/train_tiny_moe.py OUT --family qwen3_moe --data wiki.txt.xz --data code.jsonl@0.5

The tokenizer is trained too. A tenth of the built-in text (or the last part of the sequences of ``--data``) is never
trained on and gives the perplexity at the end. OUT/README.md says how the model was made.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conmoe.builtin_text import builtin_documents
from conmoe.data import TokenData, load_tokens, parse_spec
from conmoe.documents import read_pieces

END = "<|endoftext|>"
HELD_OUT = 64  # sequences

Config = transformers.PreTrainedConfig


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    torch.manual_seed(options.seed)
    specs = [parse_spec(text) for text in options.data]
    print("Training the tokenizer.", flush=True)
    tokenizer = train_tokenizer(specs, options.vocab)
    options.end = tokenizer.eos_token_id
    data = load_tokens(tokenizer, specs, tokens=options.unique_tokens, seq_len=options.seq_len, seed=options.seed)
    train_NS, held_NS = hold_out(tokenizer, data, options)
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        FAMILIES[options.family](options), dtype=torch.float32
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.family}: {parameters:,} parameters; {train_NS.numel():,} tokens of text.", flush=True)
    watch, started = RouterWatch(model), time.time()
    train(model, watch, train_NS, options)
    lines = report(model.to(torch.bfloat16), watch, held_NS)
    lines.append(f"Parameters: {parameters:,}. Training time: {(time.time() - started) / 60:.0f} minutes.")
    print("\n".join(lines))
    save(model, tokenizer, data, lines, options)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the finished checkpoint")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="olmoe")
    parser.add_argument("--data", action="append", default=[], metavar="SPEC", help="as in conmoe; default: built-in")
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--width", type=int, default=40, help="intermediate size of one expert")
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=12_000_000, help="tokens to train on, in several rounds")
    parser.add_argument("--unique-tokens", type=int, default=1_500_000, help="tokens of text in one round")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--balance", type=float, default=0.005, help="coefficient of the load-balancing loss")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the matrix products")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.command = shlex.join("OUT" if text == str(options.out) else text for text in arguments)
    return options


def train_tokenizer(specs: list[Any], vocab: int) -> PreTrainedTokenizerFast:
    def text() -> Iterator[str]:
        if not specs:
            yield from builtin_documents("calibration")
        for spec in specs:
            yield from (piece.content for piece in read_pieces(spec.source) if isinstance(piece.content, str))

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(text(), vocab_size=vocab, min_frequency=2, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=trained._tokenizer, eos_token=END, bos_token=END, pad_token=END, model_max_length=1024
    )


def hold_out(tokenizer: PreTrainedTokenizerFast, data: TokenData, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Text to train on and text to measure on: another part of the built-in text, or the last sequences of --data."""
    if options.data:
        return data.ids_NS[:-HELD_OUT], data.ids_NS[-HELD_OUT:]
    tokens = HELD_OUT * options.seq_len
    held = load_tokens(tokenizer, [], tokens=tokens, seq_len=options.seq_len, part="evaluation")
    return data.ids_NS, held.ids_NS


def common(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "num_experts_per_tok": options.top_k,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), options.end),
    }


def olmoe(options: argparse.Namespace) -> Config:
    return transformers.OlmoeConfig(
        **common(options), num_experts=options.experts, intermediate_size=options.width, clip_qkv=None
    )


def mixtral(options: argparse.Namespace) -> Config:
    return transformers.MixtralConfig(
        **common(options), num_local_experts=options.experts, intermediate_size=options.width, sliding_window=None
    )


def qwen2_moe(options: argparse.Namespace) -> Config:
    return transformers.Qwen2MoeConfig(
        **common(options),
        num_experts=options.experts,
        moe_intermediate_size=options.width,
        shared_expert_intermediate_size=2 * options.width,
        intermediate_size=options.top_k * options.width,
    )


def qwen3_moe(options: argparse.Namespace) -> Config:
    return transformers.Qwen3MoeConfig(
        **common(options),
        num_experts=options.experts,
        moe_intermediate_size=options.width,
        intermediate_size=options.top_k * options.width,
        norm_topk_prob=True,
    )


def deepseek_v3(options: argparse.Namespace) -> Config:
    head = options.hidden // options.heads
    return transformers.DeepseekV3Config(
        **common(options),
        n_routed_experts=options.experts,
        moe_intermediate_size=options.width,
        intermediate_size=options.top_k * options.width,
        first_k_dense_replace=1,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        q_lora_rank=None,
        kv_lora_rank=2 * head,
        qk_nope_head_dim=head,
        qk_rope_head_dim=head,
        v_head_dim=head,
    )


FAMILIES: dict[str, Callable[[argparse.Namespace], Config]] = {
    builder.__name__: builder for builder in (olmoe, mixtral, qwen2_moe, qwen3_moe, deepseek_v3)
}


class RouterWatch:
    """Sees what every router puts out; routers of all families here return (logits, gates, chosen experts)."""

    def __init__(self, model: nn.Module) -> None:
        self.routers: list[Any] = [
            module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")
        ]
        self.outputs: list[tuple[Tensor, Tensor]] = []
        for router in self.routers:
            router.register_forward_hook(lambda module, args, out: self.outputs.append((out[0], out[2])))

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """The mean probability and the share of the slots of every expert, per layer, since the last call."""
        taken = []
        for router, (logits_TE, index_Tk) in zip(self.routers, self.outputs, strict=True):
            biased = hasattr(router, "e_score_correction_bias")
            score_TE = logits_TE.float().sigmoid() if biased else logits_TE.float().softmax(-1)
            share_E = torch.bincount(index_Tk.flatten(), minlength=logits_TE.shape[1]) / index_Tk.numel()
            if biased and logits_TE.requires_grad:  # DeepSeek-V3 balances by moving a bias, and by little else
                router.e_score_correction_bias.add_(torch.sign(share_E.mean() - share_E), alpha=1e-3)
            taken.append(((score_TE / score_TE.sum(-1, keepdim=True)).mean(0), share_E))
        self.outputs.clear()
        return taken


def balance_loss(layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Switch Transformer (arXiv:2101.03961), equation 4, averaged over layers: 1 when all experts are used equally."""
    return torch.stack([len(share_E) * (probability_E @ share_E) for probability_E, share_E in layers]).mean()


def train(model: nn.Module, watch: RouterWatch, train_NS: Tensor, options: argparse.Namespace) -> None:
    steps = max(1, options.tokens // (options.batch * options.seq_len))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    batches = shuffled(train_NS, options.batch, options.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    model.train()
    with Progress(*columns, TextColumn("{task.fields[rate]:,.0f} tokens/s")) as progress:
        task, started = progress.add_task("training", total=steps, rate=0.0), time.time()
        for step in range(1, steps + 1):
            ids_BS = next(batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
                loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
            balance = balance_loss(watch.take())
            (loss + options.balance * balance).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update(task, advance=1, rate=step * ids_BS.numel() / (time.time() - started))
            if step % 100 == 0:
                progress.console.print(f"step {step}/{steps}  loss {loss.item():.3f}  balance {balance.item():.2f}")


def learning_rate(step: int, steps: int) -> float:
    """A warm-up over a fiftieth of the steps, then half a cosine down to a twentieth."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def shuffled(train_NS: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.split(train_NS[torch.randperm(len(train_NS), generator=generator)], batch)


@torch.no_grad()
def report(model: nn.Module, watch: RouterWatch, held_NS: Tensor) -> list[str]:
    """Held-out perplexity, and how unevenly each layer uses its experts."""
    model.eval()
    losses, shares = [], []
    for ids_BS in torch.split(held_NS, 8):
        losses.append(float(model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss) * len(ids_BS))
        shares.append(torch.stack([share_E for _, share_E in watch.take()]) * len(ids_BS))
    share_LE = torch.stack(shares).sum(0) / len(held_NS)
    uneven = ", ".join(f"{float(share_E.std() / share_E.mean()):.2f}" for share_E in share_LE)
    unused = int((share_LE == 0).sum())
    perplexity = math.exp(sum(losses) / len(held_NS))
    return [
        f"Held-out perplexity over {held_NS.numel():,} tokens, stored in bfloat16: {perplexity:.2f}.",
        f"Use of the experts, standard deviation over mean, per layer: {uneven} ({unused} experts never used).",
    ]


def save(model: Any, tokenizer: Any, data: TokenData, lines: list[str], options: argparse.Namespace) -> None:
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    sources = "; ".join(source.source for source in data.sources)
    text = [
        f"# A small {options.family} model",
        "",
        "Trained from scratch to show what consolidating experts does; of no use for anything else.",
        "",
        f"    python examples/train_tiny_moe.py {options.command}",
        "",
        f"Text: {sources}; {data.tokens:,} tokens, {options.tokens / data.tokens:.1f} times over.",
        f"{options.layers} layers, {options.experts} experts of width {options.width}, top-{options.top_k}, "
        f"hidden size {options.hidden}, byte-level BPE vocabulary of {options.vocab:,}.",
        "",
        *(f"- {line}" for line in lines),
        f"- Made with torch {torch.__version__}, transformers {transformers.__version__}, seed {options.seed}.",
    ]
    (options.out / "README.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
