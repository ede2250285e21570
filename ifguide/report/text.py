"""How figures are written for people: on the report's page, in its charts and in Markdown."""

from __future__ import annotations

import math


def number(value: float | None, digits: int = 3) -> str:
    """Fixed decimals with thousands separators and a true minus; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    text = "∞" if math.isinf(value) else f"{abs(value):,.{digits}f}"
    return f"−{text}" if value < 0 else text


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}%"


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """`[low, high]`, `[low, ∞]` where there is no upper end; empty without a lower one."""
    return "" if low is None else f"[{number(low, digits)}, {number(math.inf if high is None else high, digits)}]"


def signed(change: float | None, digits: int = 3) -> str:
    """A change with its sign, ± if it rounds to nothing; empty where there is none."""
    if change is None or not math.isfinite(change):
        return ""
    text = f"{abs(change):,.{digits}f}"
    return f"{'±' if not text.strip('0.,') else '+' if change > 0 else '−'}{text}"


def relative(value: float | None, base: float | None) -> str:
    """The change from `base` to `value` in percent of `base`, with its sign; empty where there is none."""
    if value is None or base is None or not (math.isfinite(value) and math.isfinite(base) and base):
        return ""
    text = signed(100 * (value / base - 1), 1)
    return text.removesuffix(".0") + "%"


def p_value(p: float | None) -> str:
    """`p = 0.012`; empty for None."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes, or hours and minutes; a dash for None."""
    if seconds is None or seconds < 59.95:
        return "–" if seconds is None else f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min"
