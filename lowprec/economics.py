"""Microseconds and a price per hour -> dollars per million output tokens.

    dollars = workload_us / (batch output_tokens)  1e6 tokens  price / 3.6e9 us

The machine is taken to be busy with this workload alone. A price that the user gives is theirs; the default ones are
on-demand list prices as they stood in the first half of 2026 and are `modelled`. Left out: spot and reserved prices,
egress, storage, idle time.
"""

from dataclasses import dataclass

from lowprec.errors import ConfigError
from lowprec.records import Origin, Workload
from lowprec.registry import closest

US_PER_HOUR = 3.6e9
TOKENS_PER_MILLION = 1e6

# Dollars per device and hour, on demand. h100: median over 37 providers, aimultiple.com/gpu-index (May 2026).
# h200, a100: middle of the specialised providers' range, mercatus-ai.com/blog/cloud-gpu-pricing (May 2026: 3.50-4.50
# and 1.10-1.50). l40s: AWS g6e in us-east-1, modal.com/blog/nvidia-l40s-price-article (August 2025). mi300x: middle
# of 3-5, codesota.com/hardware/mi300x (April 2026). ascend-910b has no comparable list price: the user must give one.
LIST_PRICES: dict[str, float] = {"h100": 2.95, "h200": 4.00, "a100": 1.30, "l40s": 1.86, "mi300x": 4.00}
UNPRICED = ("ascend-910b", "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Dollars per hour of one device; `origin` is "measured" when the user gave it."""

    dollars_per_hour: float
    origin: Origin


def price_of(device: str, dollars_per_hour: float | None = None) -> Price:
    """The price to reckon with: what the user gave, or the list price of `device`.

    Raises:
        ConfigError: a price that is not positive, or none given for a device without a list price.
    """
    if dollars_per_hour is not None:
        if not 0.0 < dollars_per_hour < float("inf"):
            raise ConfigError(f"price {dollars_per_hour:g} dollars per hour: give a positive number")
        return Price(dollars_per_hour=dollars_per_hour, origin="measured")
    if device in LIST_PRICES:
        return Price(dollars_per_hour=LIST_PRICES[device], origin="modelled")
    if device in UNPRICED:
        raise ConfigError(f"no list price is known for {device}: give the price per hour of your machine")
    raise ConfigError(f"no list price for device {device!r}: {closest(device, list(LIST_PRICES))}; or give one")


def dollars(microseconds: float, price: Price) -> float:
    """Dollars that `microseconds` of the device cost."""
    return microseconds / US_PER_HOUR * price.dollars_per_hour


def dollars_per_million_output_tokens(workload: Workload, workload_us: float, price: Price) -> float:
    """All of a workload's cost, prompts included, over its output tokens (over its input where it has no output)."""
    tokens = workload.batch * (workload.output_tokens or workload.prompt_tokens)
    return dollars(workload_us, price) / tokens * TOKENS_PER_MILLION
