"""Checkpoints in other forms: an upstream trainer's layout and back, and backbones for timm, torchvision, safetensors.

report.py     what became of every tensor, the file `FILE.meta.json`, and writing nothing over anything
upstream.py   training checkpoints; a method's folder says how its upstream calls things (`upstream_layout`)
backbone.py   one network's backbone under the names of another library
"""
