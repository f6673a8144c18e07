"""The original trainers: our patches for them, and runs of the patched ones.

patching.py     a patch, applied to the user's own clone; `hvp patch list|check|apply|diff`
original.py     what `methods/*/original.py` says of an original: its flags, and what it is compared on
job.py          a configuration of ours as an original's command; `hvp pretrain --engine upstream`
comparison.py   an original and our trainer on the same numbers; `hvp patch compare --upstream`
released.py     the selection in HVP's authors' code and ours on the same outputs; `hvp patch compare --hvp-code`
on_cpu.py       an original's script without what a small machine has not; xformers_on_cpu.py is xFormers for it
"""
