"""Transformers and PEFT."""
