"""A process that works on one shard of a stage, started and watched by `journal.supervise`."""

import argparse
from pathlib import Path

import torch

from bench.gpu import ceilings, check, compare, decoder, precompile, tune
from bench.gpu.journal import Item, work
from bench.gpu.setting import Setting, setting

PLANS = {
    "ceilings": ceilings.items,
    "check": check.items,
    "large": lambda s: list(check.large_items(s)),
    "tune": tune.items,
    "compare": compare.items,
    "decoder": decoder.items,
}
CALLS = {"check": check.calls, "tune": tune.calls, "compare": compare.calls, "decoder": decoder.calls}
COMPILE = "compile"


def items_for(stage: str, wanted: list[str], number: int, count: int, s: Setting) -> list[Item]:
    """The items of a shard; `wanted` are the stages to compile for."""
    if stage == COMPILE:
        calls = [call for name in wanted if name in CALLS for call in CALLS[name](s)]
        return precompile.items(calls, s)[number::count]
    items = PLANS[stage](s)
    return check.shard(items, number, count) if stage == "check" else items[number::count]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--wanted", default="")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(options.shard)
    torch.set_num_threads(1)
    # Wrong in the last digits on purpose elsewhere; the truth here is float64, which this does not touch.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    wanted = [name for name in options.wanted.split(",") if name]
    found = items_for(options.stage, wanted, options.shard, options.shards, setting(options.smoke))
    work(found, options.journal, options.deadline)


if __name__ == "__main__":
    main()
