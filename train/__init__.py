"""Stages, engines, checkpoints and the loop around them."""
