"""docs/flags.md is what the config classes say today."""

from pathlib import Path

from megatron_moe.config.docs import flags_page
from megatron_moe.config.flags import fields_of
from megatron_moe.config.leftovers import LEFTOVERS, NOT_YET
from megatron_moe.config.run import GROUPS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"


def test_the_page_in_the_repository_is_current():
    assert PAGE.read_text() == flags_page(), "run: python -m megatron_moe.config.docs > docs/flags.md"


def test_every_flag_is_on_the_page():
    page = flags_page()
    for name in [*LEFTOVERS, *NOT_YET, *(s.option[2:] for g in GROUPS.values() for s in fields_of(g))]:
        assert f"`--{name}`" in page


def test_every_row_has_the_cells_of_its_table():
    widths = {line.replace("\\|", "").count("|") for line in flags_page().splitlines() if line.startswith("| `")}
    assert widths == {3, 5}
