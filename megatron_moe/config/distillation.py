"""Learning from a trained model: knowledge distillation, and Mixture-of-Students (DeepSpeed-MoE, arXiv 2201.05596, section 4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.flags import checked, fields_of, flag, int_list


@dataclass(frozen=True)
class DistillationConfig:
    """Distillation. The model that is trained is the student; what has no flag of the teacher's is the same in both."""

    mos: bool = flag(
        False, "train against a teacher: loss = kd-alpha-ce x LM + kd-beta-ce x T^2 x KL(teacher || student); the student keeps its experts "
        "and has fewer layers (Mixture-of-Students)")  # fmt: skip
    kd: bool = flag(False, "the same for any student, also a dense one (knowledge distillation)")
    kd_alpha_ce: float = flag(1.0, "weight of the language-model loss while distilling", minimum=0)
    kd_beta_ce: float = flag(1.0, "weight of the distillation loss", minimum=0)
    kd_temp: float = flag(1.0, "temperature T: both models' logits are divided by it", above=0)
    kd_stop_iters: int | None = flag(
        None, "staged distillation: after this many steps go on with the language-model loss alone (the paper: 400000 steps of 1700000)",
        minimum=1)  # fmt: skip
    kd_stop_tokens: int | None = flag(None, "the same in tokens; with both, whichever comes first", minimum=1)
    load_teacher: str | None = flag(None, "run directory of the teacher, of any layout; its weights alone are read", metavar="DIR")
    num_layers_teacher: int | None = flag(None, "transformer layers of the teacher; the student's when not given", minimum=1)
    num_experts_teacher: tuple[int, ...] = flag(
        (1,), "experts of the teacher, as in --num-experts; 1 is a dense teacher", parse=int_list, minimum=1, metavar="N"
    )
    hidden_size_teacher: int | None = flag(None, "width of the teacher; the student's when not given", minimum=1)
    num_attention_heads_teacher: int | None = flag(None, "query heads of the teacher; the student's when not given", minimum=1)

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.is_on and self.kd_alpha_ce == self.kd_beta_ce == 0:
            yield "--kd-alpha-ce and --kd-beta-ce are both 0: nothing would be learned; give one of them a weight"

    @property
    def is_on(self) -> bool:
        return self.mos or self.kd

    @property
    def idle(self) -> list[str]:
        """Flags that were given and do nothing, because distillation is off."""
        given = [s.option for s in fields_of(type(self)) if getattr(self, s.name) != s.default]
        return [] if self.is_on else given

    def is_over(self, iteration: int, consumed_tokens: int) -> bool:
        """Whether the distillation stage of a run that has come this far has ended."""
        ends = ((self.kd_stop_iters, iteration), (self.kd_stop_tokens, consumed_tokens))
        return any(end is not None and done >= end for end, done in ends)
