"""Prompts that ask a language model about solutions; data files."""
