"""The command ``hf-divguard``: questions about a run, answered from its files.

Every command but ``run`` needs the files of a run alone, and neither torch nor transformers.
"""
