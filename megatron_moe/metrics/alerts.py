"""What goes wrong with experts, said in one line with what to change.

A condition must hold in 3 logged steps in a row before it is reported: one noisy step is no news. It is reported once per layer, and
again only when it comes back after 100 logged steps without it. Layers that have the same condition to report share one line, which is
about the worst of them. What was reported is forgotten when a run resumes.

    dropping    more than --moe-alert-dropped-fraction of the assignments are dropped
    dead        the same experts get no token at all (not looked at while balanced experts would get fewer than 16 tokens)
    collapse    the busiest expert has 4 times the mean, or three quarters of the way to the worst case, if that is less (2 experts of
                which one is chosen: 1.75)
    entropy     the router's entropy is below 1 % of that of a uniform one
    logits      their size (root mean square of logsumexp) is above 20
    bias        largest minus smallest expert bias is above 1: no score can make up for it
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_moe.config.moe import MoEConfig

Record = dict[str, Any]

STEPS_IN_A_ROW = 3
QUIET_STEPS = 100
MOST_LOAD = 4.0
FEW_TOKENS = 16
LEAST_ENTROPY = 0.01
MOST_LOGITS = 20.0
WIDEST_BIAS = 1.0


@dataclass(frozen=True)
class Alert:
    """One condition. `flag` is the first thing to change."""

    condition: str
    layer: int  # the worst
    layers: tuple[int, ...]  # all that have it to report
    value: float
    flag: str
    text: str  # what follows "layer 3 "

    @property
    def reason(self) -> str:
        """The whole sentence."""
        others = f", the worst of {len(self.layers)} layers ({', '.join(map(str, self.layers))})," if len(self.layers) > 1 else ""
        return f"layer {self.layer}{others} {self.text}"

    @property
    def badness(self) -> float:
        return -self.value if self.condition == "entropy" else self.value


@dataclass
class _State:
    """Of one condition in one layer."""

    in_a_row: int = 0
    quiet: int = 0
    is_reported: bool = False


class ExpertAlerts:
    """Looks at the `moe` records of every logged step."""

    def __init__(self, config: MoEConfig, dropped_fraction: float = 0.1):
        self.config, self.dropped_fraction = config, dropped_fraction
        self._states: dict[tuple[str, int], _State] = {}
        self._idle: dict[int, deque[set[int]]] = {}  # by layer: experts without a token in each of the last logged steps

    def check(self, layers: Sequence[Record], tokens: int) -> list[Alert]:
        """What is to be reported after this logged step, of so many tokens."""
        found: dict[str, list[Alert]] = {}
        for r in layers:
            for alert in self._of_layer(r, tokens):
                found.setdefault(alert.condition, []).append(alert)
        return [replace(max(same, key=lambda a: a.badness), layers=tuple(a.layer for a in same)) for same in found.values()]

    def _of_layer(self, r: Record, tokens: int) -> Iterator[Alert]:
        conditions = {
            "dropping": self._dropping,
            "dead": partial(self._dead, tokens=tokens),
            "collapse": self._collapse,
            "entropy": self._entropy,
            "logits": self._logits,
            "bias": self._bias,
        }
        for name, condition in conditions.items():
            state, found = self._states.setdefault((name, r["layer"]), _State()), condition(r)
            # dead experts are the same ones in several steps already
            if self._is_news(state, found is not None, 1 if name == "dead" else STEPS_IN_A_ROW):
                yield found

    @staticmethod
    def _is_news(state: _State, is_found: bool, steps: int) -> bool:
        state.in_a_row = state.in_a_row + 1 if is_found else 0
        state.quiet = 0 if is_found else state.quiet + 1
        if state.quiet >= QUIET_STEPS:
            state.is_reported = False
        if state.is_reported or state.in_a_row < steps:
            return False
        state.is_reported = True
        return True

    # ------------------------------------------------------------ conditions: None while all is well

    def _dropping(self, r: Record) -> Alert | None:
        value, c = r["dropped_fraction"], self.config
        if not value > self.dropped_fraction:
            return None
        return _alert("dropping", r, value, "--moe-train-capacity-factor",
            f"drops {100 * value:.1f}% of its assignments (alert above {100 * self.dropped_fraction:g}%): raise --moe-train-capacity-factor "
            f"({c.moe_train_capacity_factor:g}; the busiest expert gets {r['load_max_over_mean']:.2g} times the mean), {self._balance}, or add "
            "--disable-moe-token-dropping")  # fmt: skip

    def _dead(self, r: Record, tokens: int) -> Alert | None:
        shares = r["expert_load"]
        idle = self._idle.setdefault(r["layer"], deque(maxlen=STEPS_IN_A_ROW))
        idle.append({e for e, share in enumerate(shares) if share == 0})
        dead = set.intersection(*idle) if len(idle) == STEPS_IN_A_ROW else set()
        if not dead or tokens * self.config.topk < FEW_TOKENS * len(shares):
            return None
        names = ", ".join(map(str, sorted(dead)[:8])) + (", ..." if len(dead) > 8 else "")
        return _alert("dead", r, len(dead), self._balance_flag,
            f"has {len(dead)} dead of {len(shares)} experts ({names}), which got no token in {STEPS_IN_A_ROW} logged steps: {self._balance}, "
            "lower --lr or lengthen its warm-up, or add --moe-noisy-gate-policy Jitter")  # fmt: skip

    def _collapse(self, r: Record) -> Alert | None:
        load = r["load_max_over_mean"]
        worst = len(r["expert_load"]) / self.config.topk  # every token takes the same k experts
        limit = min(MOST_LOAD, 1 + 0.75 * (worst - 1))
        if worst <= 1 or not load > limit:
            return None
        return _alert("collapse", r, load, self._balance_flag,
            f"sends {load:.2f} times the mean to its busiest expert (alert above {limit:.2f}): {self._balance}, or lower --lr")  # fmt: skip

    def _entropy(self, r: Record) -> Alert | None:
        value = r["router_entropy"]
        if not 0 < value < LEAST_ENTROPY:  # exactly 0 is a router that computes no probabilities
            return None
        return _alert("entropy", r, value, "--moe-router-z-loss-coeff",
            f"has a router entropy of {100 * value:.2g}% of a uniform one (alert below {100 * LEAST_ENTROPY:g}%), so that hardly a choice "
            f"can change any more: {self._z_loss}, or lower --lr")  # fmt: skip

    def _logits(self, r: Record) -> Alert | None:
        value = r["router_logit_rms"]
        if not value > MOST_LOGITS:
            return None
        return _alert("logits", r, value, "--moe-router-z-loss-coeff",
            f"has router logits of size {value:.1f} (alert above {MOST_LOGITS:g}): {self._z_loss}, or lower --lr")  # fmt: skip

    def _bias(self, r: Record) -> Alert | None:
        if r["bias_min"] is None or not r["bias_max"] - r["bias_min"] > WIDEST_BIAS:
            return None
        value = r["bias_max"] - r["bias_min"]
        return _alert("bias", r, value, "--moe-router-bias-update-rate",
            f"has expert biases {value:.2f} apart (alert above {WIDEST_BIAS:g}, as far as scores can be): lower "
            f"--moe-router-bias-update-rate ({self.config.moe_router_bias_update_rate:g}), or add --moe-seq-loss-coeff 1e-4")  # fmt: skip

    # ------------------------------------------------------------ advice

    @property
    def _balance_flag(self) -> str:
        """What balances this run; the loss of a micro-batch where nothing does."""
        return next((name for name, value in self._balancing.items() if value), "--moe-loss-coeff")

    @property
    def _balance(self) -> str:
        return f"raise {self._balance_flag} ({self._balancing[self._balance_flag]:g})"

    @property
    def _balancing(self) -> dict[str, float]:
        c = self.config
        return {
            "--moe-router-bias-update-rate": c.moe_router_bias_update_rate if c.moe_router_enable_expert_bias else 0.0,
            "--moe-loss-coeff": c.moe_loss_coeff,
            "--moe-global-loss-coeff": c.moe_global_loss_coeff,
            "--moe-seq-loss-coeff": c.moe_seq_loss_coeff,
        }

    @property
    def _z_loss(self) -> str:
        coefficient = self.config.moe_router_z_loss_coeff
        return f"raise --moe-router-z-loss-coeff ({coefficient:g})" if coefficient else "add --moe-router-z-loss-coeff 1e-3"


def _alert(condition: str, r: Record, value: float, flag: str, text: str) -> Alert:
    return Alert(condition, r["layer"], (r["layer"],), value, flag, text)
