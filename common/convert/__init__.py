"""Conversion of checkpoints: to and from an upstream trainer's layout, and of backbones for other libraries.

layouts.py               description of an upstream's checkpoints; each method has one (`upstream_layout`)
training_checkpoints.py  training checkpoints between our layout and an upstream's
optimizer_state.py       the optimiser's state within these
runs.py                  a run made from an upstream's checkpoint, which `hvp resume` continues
backbone.py              one backbone under the names of timm or torchvision, or as safetensors
report.py                the outcome for every tensor, and the files written: FILE and FILE.meta.json
"""
