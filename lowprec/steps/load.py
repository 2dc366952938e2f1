"""A model from a Hugging Face name or folder, a GGUF file, or an `nn.Module` that is already there.

Weights are loaded in the precision they are stored in (GGUF's are dequantised to bfloat16); blocks are widened one at
a time by `lowprec.steps.stream`. Nothing is unpickled; remote code runs only when asked for; the network is used only
for a name that is no local path.
"""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from lowprec.artifacts.ct_checks import makes_logits
from lowprec.artifacts.loading import quiet
from lowprec.artifacts.source import check_gguf, check_model_folder, check_shapes, stored_bytes, weights_digest
from lowprec.errors import ArtifactError, ConfigError, LowprecError, ModelError, UnsupportedError
from lowprec.steps.outcome import Outcome, Tokens, Vector
from lowprec.steps.stream import Forward

Kind = Literal["decoder", "encoder", "module"]
Look = Callable[[nn.Module], object]
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Stored by early versions of transformers, though every model computes it.
COMPUTED = (".masked_bias", ".inv_freq", ".position_ids")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """What a model was before its hidden states were turned: the dtype that its weights are stored in, their bytes.

    `heads` is in how many places the inside of its heads was turned as well.
    """

    dtype: torch.dtype
    bytes: int
    heads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A model that can be optimised.

    Attributes:
        module: the weights, in their stored precision; those of a turned model in float32.
        forward: (module, batch) -> logits [B, T, V] of a decoder, or any output [B, ...].
        tokenizer: None when batches are given ready-made.
        config: transformers configuration; None for a plain module, which has no checkpoint format.
        revision: digest of the weights, so that results are never mixed up between models.
        metric: (reference output, output) -> [B] loss, for models without logits.
        original: what it was before its hidden states were turned (`lowprec.steps.rotate`); None where they are not.
    """

    module: nn.Module
    forward: Forward
    name: str
    revision: str
    kind: Kind
    tokenizer: Any = None
    config: Any = None
    generation_config: Any = None
    metric: Callable[[Tensor, Tensor], Tensor] | None = None
    original: Original | None = None

    @property
    def outcome(self) -> Outcome:
        """How the model's output is weighed."""
        return Tokens() if self.kind == "decoder" else Vector()

    @property
    def dtype(self) -> torch.dtype:
        """What most weights are stored in."""
        if self.original is not None:
            return self.original.dtype
        sizes: dict[torch.dtype, int] = {}
        for parameter in self.module.parameters():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def bytes(self) -> int:
        """Of all weights as they are stored."""
        own = None if self.original is None else self.original.dtype.itemsize
        return sum(p.numel() * (own or p.element_size()) for p in self.module.parameters())

    def tensors(self) -> Mapping[str, Tensor]:
        """Name -> tensor, as a checkpoint names them."""
        state: Mapping[str, Tensor] = self.module.state_dict()
        return state


def decoder_forward(module: nn.Module, batch: Any) -> Tensor:
    """Logits of right-padded windows; under the causal mask the padding reaches no real token."""
    ids = batch if isinstance(batch, Tensor) else batch.ids
    logits: Tensor = module(input_ids=ids, use_cache=False).logits
    return logits


def sentence_forward(module: nn.Module, batch: Any) -> Tensor:
    """Sentence embeddings [B, D]: the mean of the last hidden states of real tokens, normalised."""
    ids, mask = (batch, torch.ones_like(batch)) if isinstance(batch, Tensor) else (batch.ids, batch.mask().long())
    hidden = module(input_ids=ids, attention_mask=mask).last_hidden_state
    weight = mask.to(hidden)[..., None]
    return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def cosine_loss(reference: Tensor, output: Tensor) -> Tensor:
    """[B, D], [B, D] -> [B]: 1 - cos."""
    return 1.0 - nn.functional.cosine_similarity(reference, output, dim=-1)


def wrap(
    module: nn.Module,
    forward: Forward,
    *,
    tokenizer: Any = None,
    name: str | None = None,
    kind: Kind = "module",
    metric: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Model:
    """A model from an `nn.Module` of yours and a function that computes its output from a batch.

    Args:
        kind: "decoder" when the output is logits over the next token; then the budget is one of perplexity.
        metric: (reference output, output) -> [B] loss, zero when nothing changed.

    Raises:
        ModelError: weights that are not finite.
    """
    return Model(
        module=module.eval(),
        forward=forward,
        tokenizer=tokenizer,
        name=name or type(module).__name__,
        revision=weights_digest(module),
        kind=kind,
        config=getattr(module, "config", None),
        metric=metric,
    )


def load(source: str | Path, *, trust_remote_code: bool = False, before_weights: Look = lambda skeleton: None) -> Model:
    """Loads a model by Hugging Face name, from a folder, or from a GGUF file.

    Args:
        before_weights: is shown the model without its weights (on the meta device) and may refuse it by raising.

    Raises:
        ArtifactError, ModelError: missing, truncated or damaged files, unknown architectures, weights that are not
            finite, of the wrong shape, or no part of the model that would be optimised.
        UnsupportedError: a model that is neither a decoder nor an encoder of text.
        ConfigError: neither a path nor a name.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return _load_gguf(path, before_weights)
    folder = path if path.exists() or str(source).startswith((".", "/", "~")) else _download(str(source))
    files = check_model_folder(folder, trust_remote_code)
    with quiet():
        with _blamed(f"{folder / 'config.json'} makes no model", "correct it or get it again"):
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            decoder = _is_decoder(config)
            auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModel
            skeleton = _skeleton(auto, config, trust_remote_code)
        check_shapes(files, skeleton)
        before_weights(skeleton)
        with _blamed(f"{folder} cannot be loaded", "get the model again"):
            # Shapes that differ are collected, for an error that names them, not for random weights in their place.
            module, info = auto.from_pretrained(
                folder,
                dtype="auto",
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,
            )
        _check_complete(folder, files, module, info)
        with _blamed(f"{folder} has no tokenizer that loads", "save the model's tokenizer beside it"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return _model(module, tokenizer, str(source), decoder, tuple(info["missing_keys"]))


@contextlib.contextmanager
def _blamed(what: str, remedy: str) -> Iterator[None]:
    """Whatever transformers or the model's own code raises in this context is a ModelError about the user's files."""
    try:
        yield
    except LowprecError:
        raise
    except Exception as error:
        raise ModelError(f"{what} ({_reason(error)}); {remedy}") from error


def _reason(error: Exception) -> str:
    """The first line of an error's message, and the second where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _check_complete(folder: Path, files: Mapping[str, Path], module: nn.Module, info: Mapping[str, Any]) -> None:
    """Raises ModelError when what was loaded is not what the files hold, no more and no less."""
    if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
        raise ModelError(f"{folder} lacks weights of the model: {_some(missing)}; get the model again")
    for name, stored, expected in info["mismatched_keys"]:
        raise ModelError(
            f"{folder}: tensor {name} is {list(stored)}, the configuration says {list(expected)}; "
            "config.json and weights are not of one model"
        )
    buffers = tuple(f".{name}" for name, _ in module.named_buffers())
    unused = sorted(
        key for key in info["unexpected_keys"] if not f".{key}".endswith(buffers) and not key.endswith(COMPUTED)
    )
    if unused:
        raise ModelError(
            f"{folder} holds weights that are no part of a {type(module).__name__}, as which it would be optimised: "
            f"{_some(unused)} ({stored_bytes(files, unused):,} bytes); load the whole model yourself and give it with "
            "lowprec.wrap, or save the part that you want without them"
        )


def _some(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _skeleton(auto: Any, config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The model of a configuration, on the meta device."""
    with torch.device("meta"):
        module: nn.Module = auto.from_config(config, dtype=config.dtype, trust_remote_code=trust_remote_code)
    return module


def _is_decoder(config: Any) -> bool:
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{config.model_type} is an encoder-decoder", ("only decoders and encoders of text can be optimised yet",)
        )
    names = config.architectures
    if any(name.endswith("ForConditionalGeneration") for name in names):
        # With a tied head nothing would be left over when the decoder in it is taken for an encoder.
        raise UnsupportedError(
            f"{names[0]} answers to more than text", ("only decoders and encoders of text can be optimised yet",)
        )
    return any(makes_logits(name) for name in names)


def _model(module: Any, tokenizer: Any, name: str, decoder: bool, made_up: tuple[str, ...] = ()) -> Model:
    """`made_up` are weights that the checkpoint does not hold (an unused pooler): they differ from load to load."""
    return Model(
        module=module.eval(),
        forward=decoder_forward if decoder else sentence_forward,
        tokenizer=tokenizer,
        name=name,
        revision=weights_digest(module, made_up),
        kind="decoder" if decoder else "encoder",
        config=module.config,
        generation_config=getattr(module, "generation_config", None),
        metric=None if decoder else cosine_loss,
    )


def _download(name: str) -> Path:
    if not HUB_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no folder, no GGUF file and no Hugging Face name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{name!r} is no local path and cannot be had from the hub ({reason})") from error


def _load_gguf(path: Path, before_weights: Look) -> Model:
    check_gguf(path)
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("GGUF files need the package gguf: pip install 'lowprec[gguf]'") from error
    with quiet(), _read_once(gguf):
        before_weights(_skeleton(transformers.AutoModelForCausalLM, _from_gguf(transformers.AutoConfig, path)))
        loaded = _from_gguf(transformers.AutoModelForCausalLM, path)
        tokenizer = _from_gguf(transformers.AutoTokenizer, path)
        # What transformers makes of a GGUF file counts as quantised and refuses to be saved.
        config = type(loaded.config).from_dict(
            {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        )
        config.architectures = [type(loaded).__name__]
        with torch.device("meta"):
            module = type(loaded)(config)
        module.load_state_dict(loaded.state_dict(), assign=True)
        module.tie_weights()
        for name, buffer in loaded.named_buffers():
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = buffer
    return _model(module, tokenizer, str(path), decoder=True)


def _from_gguf(auto: Any, path: Path) -> Any:
    """What `auto` (configuration, model or tokenizer) makes of the file, in bfloat16, without its chatter.

    Raises:
        ArtifactError: the file is damaged.
        ModelError: transformers does not read GGUF files of its architecture.
    """
    wanted = {} if auto is transformers.AutoTokenizer else {"dtype": torch.bfloat16}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return auto.from_pretrained(str(path.parent), gguf_file=path.name, **wanted)
    except (ValueError, KeyError, OSError) as error:
        if "architecture" in str(error) and "not supported" in str(error):
            raise ModelError(
                f"{path}: transformers {transformers.__version__} does not read GGUF files of this architecture "
                f"({_reason(error)}); give the model's folder of safetensors files"
            ) from error
        raise ArtifactError(path, f"cannot be loaded ({error}); get the file again") from error


@contextlib.contextmanager
def _read_once(gguf: Any) -> Iterator[None]:
    """Transformers parses a GGUF header for each of config, tokenizer and weights, and the table of names for each
    module: half a minute for a small model. Within this context each is parsed once."""
    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    try:
        for name, original in originals.items():
            setattr(gguf, name, functools.cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


__all__ = ["Model", "cosine_loss", "decoder_forward", "load", "sentence_forward", "wrap"]
