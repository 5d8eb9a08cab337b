"""The folder that ``hf-divguard run`` puts on ``PYTHONPATH``: Python imports its ``sitecustomize`` at start."""
