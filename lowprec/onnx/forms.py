"""Which operator of onnxruntime computes a scheme on CPUs, to the number.

| scheme                     | operator                                                              |
|----------------------------|-----------------------------------------------------------------------|
| bf16                       | MatMul in float32                                                     |
| w4a16-g*, w3a16-g*         | MatMulNBits, accuracy level 1                                         |
| w4a8-block-g*              | MatMulNBits, accuracy level 4: inputs in blocks, which are the groups |
| w8a8-block                 | the same with 8 bits and blocks of 128                                |
| w8a8-int8                  | QuantizeLinear by row, MatMulIntegerToFloat (`lowprec.onnx.token`)    |
| w4a8-two-level-g*          | the same over INT8 codes; few rows: MatMulNBits, level 4 (`phases`)   |

Left out, as nothing is won by it. w8a16: at level 1 and 8 bits MatMulNBits writes the whole weight out in float32 at
every call, at one row tens of times as slow as float32. FP8: there is no product, it would run in float32.
DynamicQuantizeLinear with one scale for all tokens: 5 to 20 % faster than a scale for each, at a loss of half a model's
quality. INT8 inputs by token with 4-bit weights: there is no product. For INT8, too, a form for few
rows, with MatMulNBits over the same codes in the place of MatMulIntegerToFloat and the five operators around it: 5 to
7 % more tokens a second in decode on the 135M demo, for 42 % more bytes.
"""

from functools import partial

from lowprec.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS, held_bits, per_block, scheme_named
from lowprec.formats.rows import MixedRows
from lowprec.formats.schemes import BLOCK, TWO_LEVEL
from lowprec.formats.schemes import TOKEN as BY_TOKEN
from lowprec.onnx.layers import Product, saturates
from lowprec.onnx.nbits import EXACT, FAST, blocks_of, refuses_nbits
from lowprec.onnx.phases import MANY
from lowprec.onnx.products import PHASES, TOKEN, Level, product_at
from lowprec.onnx.token import PRODUCT
from lowprec.records import Scheme


def refuses(scheme: Scheme) -> str | None:
    """Why no operator computes a resolved `scheme`, None if one does."""
    if scheme.weight is None:
        return None
    fmt = WEIGHT_FORMATS[scheme.weight]
    if fmt.code_dtype.is_floating_point:
        return f"{scheme.name}: onnxruntime has no product of FP8 on CPUs, it would run in float32"
    if isinstance(fmt, MixedRows) or (scheme.activation is None and held_bits(fmt) == 8):
        return (
            f"{scheme.name}: with inputs in float onnxruntime writes INT8 weights out in float32 at every call, which "
            "takes many times as long as to leave them there"
        )
    if reason := refuses_nbits(scheme.weight):
        return f"{scheme.name}: {reason}"
    if scheme.activation is None:
        return None
    if level_of(scheme) in (TOKEN, PHASES):
        return f"{scheme.name}: INT8 products overflow in onnxruntime on this processor" if saturates() else None
    if not ACTIVATION_FORMATS[scheme.activation].dynamic:
        return (
            f"{scheme.name}: ranges of inputs are measured at each call here, by token (w8a8-int8) or by block "
            f"(w8a8{BLOCK}); there is no product with fixed ones"
        )
    if scheme.activation != f"int8{BLOCK}{blocks_of(scheme.weight).size}":
        return f"{scheme.name}: onnxruntime rounds inputs of these weights block by block (w{fmt.bits}a8{BLOCK})"
    return None


def level_of(scheme: Scheme) -> Level:
    """How the product of a scheme that quantises rounds its inputs; in float32 where none does it as scored."""
    if scheme.activation == BY_TOKEN and scheme.weight == "int8":
        return TOKEN
    if scheme.activation == BY_TOKEN and TWO_LEVEL in str(scheme.weight):
        return PHASES
    return FAST if per_block(scheme) else EXACT


def product_of(scheme: Scheme) -> tuple[str, Product]:
    """Name and maker of the product of such a scheme."""
    level = level_of(scheme)
    name = PRODUCT if level in (TOKEN, PHASES) else f"MatMulNBits level {level}"
    return name, partial(product_at, level=level)


def product_for(scheme: Scheme, rows: int) -> tuple[str, tuple[Product, str]]:
    """Name of what such a scheme's product comes to with so many rows; its maker and weight format, for timing."""
    if level_of(scheme) != PHASES:
        name, product = product_of(scheme)
        return name, (product, str(scheme.weight))
    if rows < MANY:
        return f"MatMulNBits level {FAST}", (partial(product_at, level=FAST), str(scheme.weight))
    return PRODUCT, (partial(product_at, level=TOKEN), "int8")


def forms_of(scheme: Scheme) -> tuple[Scheme, ...]:
    """The schemes whose bytes a weight takes there."""
    return (scheme,) if level_of(scheme) != PHASES else (scheme, scheme_named("w8a8-int8"))
