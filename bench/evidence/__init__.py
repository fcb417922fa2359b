"""What a method does to real models on real data, with its peers beside it: `python -m bench.evidence.spectral --help`.

| | |
|---|---|
| data sets of a folder, as examples of a task | `sets.py` |
| models with pre-trained weights, from packages | `models.py` |
| methods under comparison: deftcore's, and peers as records of the same kind | `sides.py` |
| losses, accuracy, BLEU, exact numbers, drift | `measures.py` |
| one run, through deftcore's own loop; a file of runs that goes on where it stopped | `runs.py` |
| step time and peak memory, on an idle machine | `cost.py` |
| an experiment: its sides, sets, steps | `spectral.py`, `light_peft.py`, `points.py`, `crops.py`, `deft.py` |
| small Mambas and a Transformer, pre-trained here | `mamba_models.py`, `mamba.py`, `mamba_shots.py` |
| its prose | `spectral_page.py` and the like |
| what came out, checked against the runs | `claims.yaml` |
| tables, verdicts and pictures from the files in `results/` | `report.py`, `adapted.py` |
| docs/evidence.md, of all experiments: `python -m bench.evidence` | `__main__.py` |
"""
