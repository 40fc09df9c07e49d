"""Distillation plugins for TRL."""
