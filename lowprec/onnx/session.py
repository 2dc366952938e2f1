"""Runs an exported model in onnxruntime on the CPU: `Session` for text and scores, `OnnxDecoder` step by step.

No activation is rounded that the graph does not round. Left as it is, onnxruntime fuses DequantizeLinear and MatMul
into a product that rounds its inputs to INT8 block by block (accuracy level 4); level 1 computes in float32.

Source: onnxruntime.ai/docs, session.qdq_matmulnbits_accuracy_level.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from packaging.version import Version
from torch import Tensor

from lowprec.errors import ArtifactError, ConfigError
from lowprec.onnx import RUNTIME_NEEDED
from lowprec.onnx.binding import Run, empty_cache, holds_codes, score_in_steps
from lowprec.onnx.phases import MANY
from lowprec.onnx.sampling import Array, Sampler

ACCURACY, EXACT = "session.qdq_matmulnbits_accuracy_level", "1"
MODEL = "model.onnx"
EXPORT_FIRST = "write one with lowprec export RUN --target onnxruntime --out FOLDER"
CHUNK = 256
"""Attention works on whole squares of a part, so that smaller parts work less; below, products get slower."""
Cache = list[Tensor]
Tokens = Sequence[int] | Tensor


def open_session(path: Path, threads: int = 0) -> Any:
    """An onnxruntime session of the model at `path`; 0 threads: as many as there are cores.

    Raises:
        ArtifactError: onnxruntime does not load it.
    """
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(ACCURACY, EXACT)
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).partition("\n")[0]
        oldest = RUNTIME_NEEDED["onnxruntime"]
        remedy = f"; graphs for onnxruntime need {oldest}" if Version(onnxruntime.__version__) < Version(oldest) else ""
        raise ArtifactError(
            path, f"does not load in onnxruntime {onnxruntime.__version__} ({reason}){remedy}"
        ) from error


def run_session(session: Any, given: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs of a session for inputs by name, in the order of the graph."""
    return [torch.from_numpy(a) for a in session.run(None, {name: t.numpy() for name, t in given.items()})]


class OnnxDecoder:
    """A decoder's graph, called with token ids.

    Args:
        path: model.onnx.
        threads: 0 for as many as there are cores.

    Raises:
        ArtifactError: not loadable, or no decoder with a cache.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        self._session = open_session(path, threads)
        self._past = [i for i in self._session.get_inputs() if i.name.startswith("past_key_values.")]
        if not self._past:
            raise ArtifactError(path, "is no decoder: it takes no past_key_values")

    def empty(self, batch: int) -> Cache:
        """The cache before the first token."""
        return [torch.from_numpy(empty_cache(i, batch, 0)) for i in self._past]

    def step(self, ids: Tensor, mask: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        """Goes on from a cache.

        Args:
            ids: [B, T] the next tokens.
            mask: [B, P + T] 1 for real tokens, 0 for padding, those in the cache first.
            past: of P tokens.

        Returns:
            Logits [B, T, V], and the cache of P + T tokens.
        """
        names = [i.name for i in self._past]
        given = {"input_ids": ids, "attention_mask": mask, **dict(zip(names, past, strict=True))}
        logits, *present = run_session(self._session, given)
        return logits, present

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T] token ids, padded on either side where the mask is 0 -> logits [B, T, V], of no use at padding."""
        mask = torch.ones_like(ids) if mask is None else mask
        return self.step(ids, mask, self.empty(len(ids)))[0]


def left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[T_i] token ids each -> ids and mask [B, T], padding on the left; ConfigError when a row is empty."""
    if not rows or any(len(row) == 0 for row in rows):
        raise ConfigError("every prompt needs at least one token")
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


class Session:
    """A decoder that `lowprec export` has written, for `onnx` or `onnxruntime`.

    Args:
        path: the folder, or the model.onnx in it.
        threads: 0 for as many as there are cores.

    Attributes:
        positions: how many tokens a sequence may have; None where nothing says.
        stop: tokens that end an answer, from generation_config.json.

    Raises:
        ArtifactError: no decoder of lowprec's there, or none that onnxruntime loads.
        ConfigError: onnxruntime is too old for the form.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        self.path = _file_of(Path(path))
        self._session = open_session(self.path, threads)
        facts = self._session.get_modelmeta().custom_metadata_map
        if facts.get("lowprec.kind") != "decoder":
            raise ArtifactError(self.path, "is no decoder that lowprec has written; " + EXPORT_FIRST)
        if (made_for := facts.get("lowprec.target")) is not None:
            raise ArtifactError(
                self.path, f"is the form for {made_for}; export the run with --target onnxruntime to run it here"
            )
        self.vocabulary = int(self._session.get_outputs()[0].shape[2])
        config, generation = (_json(self.path.parent / name) for name in ("config.json", "generation_config.json"))
        most = facts.get("lowprec.positions", config.get("max_position_embeddings", config.get("n_positions")))
        self.positions: int | None = None if most is None else int(most)
        ends = generation.get("eos_token_id", config.get("eos_token_id"))
        self.stop: tuple[int, ...] = tuple(ends if isinstance(ends, list) else [] if ends is None else [ends])

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the folder.

        Raises:
            ArtifactError: there is none.
        """
        if not (self.path.parent / "tokenizer_config.json").exists():
            raise ArtifactError(self.path.parent, "has no tokenizer; give token ids")
        # Takes seconds, which those who bring token ids need not wait.
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.path.parent, local_files_only=True)

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the model expects after each token of texts that are given whole, as it would while it generates them:
        where the KV cache is in codes every token sees codes.

        Args:
            ids: [B, T] tokens.
            mask: [B, T] 0 where padding stands, on either side; None for nowhere.

        Returns:
            [B, T, V] float32, of no use at padding.

        Raises:
            ConfigError: tokens that the model does not know, or more of them than it has positions for; ids or a mask
                that are none.
        """
        given = torch.ones_like(ids) if mask is None else mask
        if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point():
            raise ConfigError(f"token ids are [B, T] integers, at least one of each, not {list(ids.shape)} {ids.dtype}")
        if given.shape != ids.shape or not bool(((given == 0) | (given == 1)).all()):
            raise ConfigError(f"the mask is 0 or 1 for each of {list(ids.shape)} tokens, not {list(given.shape)}")
        self._check(ids, ids.shape[1])
        if holds_codes(self._session):
            return torch.from_numpy(score_in_steps(self._session, _int64(ids), _int64(given), MANY - 1))
        return torch.from_numpy(Run(self._session, len(ids)).step(_int64(ids), _int64(given)))

    def generate(self, prompts: Sequence[Tokens], tokens: int = 128, **choice: Any) -> list[list[int]]:
        """Continues prompts of any lengths as one batch; arguments and errors as of `stream`.

        Returns:
            The new tokens of each prompt; the last is a stop token where one ended it.
        """
        made: list[list[int]] = [[] for _ in prompts]
        for step in self.stream(prompts, tokens, **choice):
            for row, token in zip(made, step, strict=True):
                row += [] if token is None else [token]
        return made

    def stream(
        self,
        prompts: Sequence[Tokens],
        tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] | None = None,
        chunk: int = CHUNK,
    ) -> Iterator[list[int | None]]:
        """Continues prompts of any lengths as one batch, a token of each at a time.

        Args:
            prompts: token ids of each.
            tokens: how many are made at most.
            temperature, top_p, seed: `lowprec.onnx.sampling.Sampler`; at temperature 0 the likeliest token is taken.
            stop: tokens that end an answer; None for those of the model's own configuration.
            chunk: prompts are read in parts of so many tokens, which bounds the memory that they need.

        Yields:
            The next token of each prompt, None where its answer has ended.

        Raises:
            ConfigError: no prompt, an empty one, tokens that the model does not know, more than it has positions for;
                a number that makes no sense.
        """
        sampler = Sampler(temperature=temperature, top_p=top_p, seed=seed)
        if tokens < 0 or chunk < 1:
            raise ConfigError(f"{tokens} tokens in parts of {chunk} were asked for; give 0 or more, and 1 or more")
        ids, mask = left_padded([_tokens(prompt) for prompt in prompts])
        # The last token is told, not read.
        self._check(ids, ids.shape[1] + max(tokens - 1, 0))
        ends = set(self.stop if stop is None else stop)
        return self._stream(_int64(ids), _int64(mask), tokens, sampler, ends, chunk)

    def _stream(
        self, ids: Array, mask: Array, tokens: int, sampler: Sampler, ends: set[int], chunk: int
    ) -> Iterator[list[int | None]]:
        batch, width = ids.shape
        run = Run(self._session, batch, capacity=width + tokens)
        ended = [False] * batch
        seen = np.concatenate([mask, np.ones((batch, tokens), dtype=np.int64)], axis=1)
        for start in range(0, width if tokens else 0, chunk):
            end = min(start + chunk, width)
            logits = run.step(ids[:, start:end], seen[:, :end], keep=1)
        for made in range(1, tokens + 1):
            chosen = sampler.choose(logits[:, -1])
            yield [None if over else int(token) for over, token in zip(ended, chosen, strict=True)]
            ended = [over or int(token) in ends for over, token in zip(ended, chosen, strict=True)]
            if all(ended) or made == tokens:
                return
            logits = run.step(chosen[:, None], seen[:, : width + made], keep=1)

    def _check(self, ids: Tensor, length: int) -> None:
        if self.positions is not None and length > self.positions:
            raise ConfigError(
                f"{length} tokens are asked for, the model has positions for {self.positions}; give fewer"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            raise ConfigError(f"tokens run from {int(ids.min())} to {int(ids.max())}, the model has {self.vocabulary}")


def _tokens(prompt: Tokens) -> Tensor:
    """[T] ids; ConfigError for what are none."""
    try:
        found = torch.as_tensor(prompt)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a prompt is a list of token ids, not {prompt!r:.40}: use session.tokenizer") from error
    if found.ndim != 1 or (len(found) and (found.is_floating_point() or found.dtype == torch.bool)):
        raise ConfigError(f"a prompt is a list of token ids, not {prompt!r:.40}")
    return found.long()


def _file_of(path: Path) -> Path:
    file = path / MODEL if path.is_dir() else path
    if not file.exists():
        raise ArtifactError(path, f"has no {MODEL}; {EXPORT_FIRST}")
    return file


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _int64(tensor: Tensor) -> Array:
    numbers: Array = tensor.to(torch.int64).contiguous().numpy()
    return numbers
