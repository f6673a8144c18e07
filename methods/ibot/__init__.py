"""iBOT (arXiv:2111.07832), with hard views."""
