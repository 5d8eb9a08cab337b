"""The options, a group a file; ``hf_divguard.hf.arguments`` puts them together."""
